"""The client against a transport that answers from a list: what it sends, repeats, splits and raises."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from das_service.client import (
    Client,
    ConflictError,
    DasClientError,
    LostRaceError,
    NotFoundError,
    RowsRefusedError,
    SnapshotRejectedError,
    TruncatedStreamError,
    UnavailableError,
    UnreachableError,
)
from das_service.client import augment as augment_module
from das_service.client import client as client_module
from das_service.client.arrow import iter_chunks, to_table
from das_service.client.http import Clock, retry_after_seconds
from schemas.wire import read_table, write_table

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
ACCEPTED = {"accepted": 2, "rejected": 0, "errors": [], "errors_truncated": False, "positions": {"0": 3}}


@dataclass
class FakeTime:
    """A clock that moves when somebody sleeps."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def clock(self) -> Clock:
        return Clock(monotonic=lambda: self.now, sleep=self.sleep, chance=lambda: 1.0)


@dataclass
class Service:
    """A service that gives prepared answers, in turn; the last one again and again."""

    answers: list[Any]
    requests: list[httpx.Request] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer(request) if callable(answer) else answer


Connect = Callable[..., tuple[Client, Service]]


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def connect(time: FakeTime) -> Iterator[Connect]:
    """Make a client of a service that gives these answers."""
    clients = []

    def make(*answers: Any, **options: Any) -> tuple[Client, Service]:
        service = Service(list(answers))
        transport = httpx.MockTransport(service)
        clients.append(Client("http://das", transport=transport, clock=time.clock(), **options))
        return clients[-1], service

    yield make
    for client in clients:
        client.close()


def answer(body: Any, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers=headers)


def problem(status: int, code: str, retry_after: str | None = None, **extra: Any) -> httpx.Response:
    headers = {"Retry-After": retry_after} if retry_after else {}
    return httpx.Response(status, json={"detail": f"about {code}", "code": code, **extra}, headers=headers)


def rows(number: int = 2) -> pa.Table:
    return pa.table(
        {
            "example_id": [f"e{i}" for i in range(number)],
            "event_time": pa.array([NOON] * number),
            "price": [0.5] * number,
        }
    )


def sent(request: httpx.Request) -> pa.Table:
    return read_table(request.content)


def query(request: httpx.Request) -> dict[str, list[str]]:
    return {name: request.url.params.get_list(name) for name in request.url.params}


# ---- what can't be sent


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://a:b", "ftp://host", "", "http://a\nb"])
def test_an_address_that_is_none_is_refused_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAS_API_URL", url or "nothing")
    with pytest.raises(DasClientError, match="no address of a service") as caught:
        Client()
    assert (caught.value.code, caught.value.retryable) == ("bad_url", False)


@pytest.mark.parametrize("token", ["s\u00e9cret", "sec\nret"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(DasClientError, match="DAS_TOKEN") as caught:
        Client("http://das", token=token)
    assert token not in str(caught.value)


def test_white_space_around_a_token_is_left_out(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAS_TOKEN", " secret\n")
    client, service = connect(answer({}))
    client.status()
    assert service.requests[0].headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("name", ["ads/status", "..", ".", ""])
def test_a_name_that_would_lead_elsewhere_names_nothing(connect: Connect, name: str) -> None:
    client, service = connect(answer({}))
    for call in (lambda: client.get_dataset(name), lambda: client.get_snapshot("ads", "f", name)):
        with pytest.raises(NotFoundError, match="nothing is named"):
            call()
    assert service.requests == []


@pytest.mark.parametrize("name", ["a?b=c", "a#b", "a%2Fb", "\u00e9 \n", "\udcff"])
def test_a_name_of_odd_characters_is_asked_for_as_it_is(connect: Connect, name: str) -> None:
    client, service = connect(answer({}))
    client.get_dataset(name)
    said = name.encode("utf-8", "replace").decode()
    assert (service.requests[0].url.path, service.requests[0].url.query) == (f"/v1/datasets/{said}", b"")


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b""])
def test_an_answer_of_somebody_else_is_told_from_the_services(connect: Connect, body: bytes) -> None:
    client, _ = connect(httpx.Response(200, content=body))
    with pytest.raises(DasClientError, match="is the address right") as caught:
        client.status()
    assert caught.value.code == "bad_answer"


# ---- what is sent


def test_ingest_sends_the_rows_as_a_complete_arrow_stream(connect: Connect) -> None:
    client, service = connect(answer(ACCEPTED, 202))
    result = client.ingest("ads", rows())
    assert (result.accepted, result.rejected, dict(result.positions), result.scored) == (2, 0, {0: 3}, None)
    (request,) = service.requests
    assert (request.method, request.url.path, query(request)) == (
        "POST", "/v1/datasets/ads/examples", {"on_error": ["skip"]},
    )  # fmt: skip
    assert request.headers["Content-Type"] == "application/vnd.apache.arrow.stream"
    assert sent(request).equals(rows())


def test_ingest_says_when_the_rows_were_scored(connect: Connect) -> None:
    client, service = connect(answer({**ACCEPTED, "scored": True}))
    assert client.ingest("ads", rows(), wait="scored", timeout_seconds=3).scored is True
    assert query(service.requests[0]) == {"on_error": ["skip"], "wait": ["scored"], "timeout_seconds": ["3"]}


def test_a_token_goes_into_the_header(connect: Connect) -> None:
    client, service = connect(answer({"datasets": []}), token="secret")
    client.list_datasets()
    assert service.requests[0].headers["Authorization"] == "Bearer secret"


def test_the_environment_says_where_and_who(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAS_API_URL", "http://elsewhere:9000/")
    monkeypatch.setenv("DAS_TOKEN", "from-environment")
    service = Service([answer({"datasets": []})])
    with Client(transport=httpx.MockTransport(service)) as client:
        client.list_datasets()
    assert str(service.requests[0].url) == "http://elsewhere:9000/v1/datasets"
    assert service.requests[0].headers["Authorization"] == "Bearer from-environment"


# ---- tables of all kinds


@pytest.mark.parametrize(
    "data",
    [
        rows(),
        rows().to_batches()[0],
        rows().to_pandas(),
        pl.from_arrow(rows()),
        rows().to_pylist(),
        rows().to_pydict(),
        pa.RecordBatchReader.from_batches(rows().schema, rows().to_batches()),
    ],
    ids=["table", "batch", "pandas", "polars", "rows", "columns", "reader"],
)
def test_every_kind_of_table_becomes_the_same_columns(data: Any) -> None:
    table = to_table(data)
    assert table.column_names == ["example_id", "event_time", "price"]
    assert table.schema.field("example_id").type == pa.string()
    assert table.to_pylist() == rows().to_pylist()
    assert table.schema.metadata is None


def test_views_large_types_and_categoricals_become_plain() -> None:
    frame = pl.DataFrame({"a": ["x", "y"], "tags": [["p"], ["q", "r"]]}).with_columns(
        pl.col("a").cast(pl.Categorical).alias("c")
    )
    table = to_table(frame)
    assert table.schema.field("a").type == pa.string()
    assert table.schema.field("tags").type == pa.list_(pa.string())
    assert table.schema.field("c").type.value_type == pa.string()
    assert table.to_pylist() == frame.to_dicts()


def test_a_pandas_categorical_stays_a_dictionary() -> None:
    table = to_table(pd.DataFrame({"c": pd.Categorical(["x", "y", "x"])}))
    assert pa.types.is_dictionary(table.schema.field("c").type)
    assert table["c"].to_pylist() == ["x", "y", "x"]


def test_something_else_is_refused_with_a_hint() -> None:
    with pytest.raises(TypeError, match="int is no table"):
        to_table(3)


@pytest.mark.parametrize("data", [rows(7), [rows(3), rows(4)], rows(7).to_reader()], ids=["table", "list", "reader"])
def test_chunks_hold_all_rows_in_order_and_no_more_than_asked(data: Any) -> None:
    chunks = list(iter_chunks(data, rows=3))
    assert max(chunk.num_rows for chunk in chunks) == 3
    assert sum(chunk.num_rows for chunk in chunks) == 7


# ---- bulk


def test_bulk_ingest_adds_up_and_counts_rows_from_the_first(connect: Connect) -> None:
    error = {"row": 1, "example_id": "x", "column": "price", "code": "not_finite", "message": "no"}
    partial = {**ACCEPTED, "accepted": 1, "rejected": 1, "errors": [error]}
    client, _ = connect(answer(ACCEPTED, 202), answer(partial, 202), answer(ACCEPTED, 202))
    seen = []
    result = client.ingest_batches("ads", rows(6), rows_per_request=2, concurrency=1, on_progress=seen.append)
    assert (result.accepted, result.rejected, [e.row for e in result.errors]) == (5, 1, [3])
    assert [progress.accepted for progress in seen] == [2, 3, 5]


def test_bulk_ingest_counts_a_request_whose_rows_are_all_bad(connect: Connect) -> None:
    errors = [{"row": i, "example_id": None, "column": "price", "code": "null", "message": "no"} for i in range(2)]
    client, _ = connect(problem(422, "invalid_rows", accepted=0, rejected=2, errors=errors), answer(ACCEPTED, 202))
    result = client.ingest_batches("ads", rows(4), rows_per_request=2, concurrency=1)
    assert (result.accepted, result.rejected, [e.row for e in result.errors]) == (2, 2, [0, 1])


def test_bulk_ingest_stops_at_a_schema_that_does_not_fit(connect: Connect) -> None:
    client, service = connect(problem(422, "schema_mismatch"))
    with pytest.raises(RowsRefusedError, match="about schema_mismatch"):
        client.ingest_batches("ads", (rows(2) for _ in range(1000)), rows_per_request=2, concurrency=2)
    assert len(service.requests) <= 4


def test_bulk_ingest_reads_no_further_ahead_than_it_may(connect: Connect) -> None:
    drawn, settled = [], []
    client, _ = connect(answer(ACCEPTED, 202))

    def batches() -> Iterator[pa.Table]:
        for i in range(50):
            drawn.append(i)
            assert len(drawn) - len(settled) <= 3 + 1
            yield rows(2)

    client.ingest_batches("ads", batches(), concurrency=3, on_progress=settled.append)
    assert len(settled) == 50


# ---- lookup


def lookup_answer(request: httpx.Request) -> httpx.Response:
    ids = sent(request)["example_id"]
    status = pa.array(["present"] * len(ids), pa.string()).dictionary_encode()
    return httpx.Response(200, content=write_table(pa.table({"example_id": ids, "f__status": status})))


def test_lookup_keeps_order_and_repeats_over_several_requests(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("das_service.client.client.IDS_PER_REQUEST", 2)
    client, service = connect(lookup_answer)
    ids = ["b", "a", "b", "c", "a"]
    table = client.lookup("ads", ids, fms=["f", "g"], outputs=["click"], max_freshness_gap_seconds=60)
    assert table["example_id"].to_pylist() == ids
    assert table["f__status"].to_pylist() == ["present"] * 5
    assert [sent(request).num_rows for request in service.requests] == [2, 2, 1]
    assert query(service.requests[0]) == {
        "fms": ["f", "g"], "outputs": ["click"], "embedding_format": ["float16"], "max_freshness_gap_seconds": ["60"],
    }  # fmt: skip


def at_most(max_ids: int) -> Callable[[httpx.Request], httpx.Response]:
    """A service whose bound on an answer lets so many ids through."""

    def reply(request: httpx.Request) -> httpx.Response:
        too_large = problem(413, "answer_too_large", max_ids=max_ids)
        return too_large if sent(request).num_rows > max_ids else lookup_answer(request)

    return reply


def test_lookup_halves_what_it_asks_for_at_once_while_the_answer_is_too_large(connect: Connect, time: FakeTime) -> None:
    client, service = connect(at_most(3))
    ids = [f"e{i}" for i in range(13)]

    assert client.lookup("ads", ids, fms=["f"])["example_id"].to_pylist() == ids

    assert [sent(request).num_rows for request in service.requests] == [13, 6, 3, 3, 3, 3, 1]
    assert time.slept == []


def test_lookup_gives_up_where_not_even_one_id_fits(connect: Connect) -> None:
    client, service = connect(at_most(0))
    with pytest.raises(DasClientError) as caught:
        client.lookup("ads", ["a", "b", "c"], fms=["f"])
    assert (caught.value.code, caught.value.status) == ("answer_too_large", 413)
    assert [sent(request).num_rows for request in service.requests] == [3, 1]


def test_lookup_does_not_halve_for_another_refusal(connect: Connect) -> None:
    client, service = connect(problem(413, "too_large"))
    with pytest.raises(DasClientError, match="too_large"):
        client.lookup("ads", ["a", "b", "c"], fms=["f"])
    assert len(service.requests) == 1


def test_lookup_sends_event_times_as_microseconds_utc(connect: Connect) -> None:
    client, service = connect(lookup_answer)
    client.lookup("ads", ["a"], fms=["f"], event_times=[NOON])
    assert sent(service.requests[0]).schema.field("event_time").type == pa.timestamp("us", "UTC")
    assert sent(service.requests[0])["event_time"].to_pylist() == [NOON]


def test_a_single_name_is_not_taken_apart(connect: Connect) -> None:
    client, service = connect(lookup_answer)
    assert client.lookup("ads", "c30", fms="f", outputs="click")["example_id"].to_pylist() == ["c30"]
    assert query(service.requests[0]) == {"fms": ["f"], "outputs": ["click"], "embedding_format": ["float16"]}


def test_answers_from_before_and_after_an_fms_first_snapshot_are_one_table(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("das_service.client.client.IDS_PER_REQUEST", 1)
    before = write_table(pa.table({"example_id": ["a"], "f__status": ["pending"]}))
    after = write_table(pa.table({"example_id": ["b"], "f__status": ["present"], "f__click__logit": [0.5]}))
    client, _ = connect(httpx.Response(200, content=before), httpx.Response(200, content=after))
    assert client.lookup("ads", ["a", "b"], fms=["f"])["f__click__logit"].to_pylist() == [None, 0.5]


def test_ids_that_are_no_text_are_refused_before_they_are_sent(connect: Connect) -> None:
    client, service = connect(lookup_answer)
    with pytest.raises(TypeError, match="values of type string are needed"):
        client.lookup("ads", [1, 2], fms=["f"])
    assert service.requests == []


def test_lookup_of_no_id_asks_once_for_the_columns(connect: Connect) -> None:
    client, service = connect(lookup_answer)
    assert client.lookup("ads", [], fms=["f"]).column_names == ["example_id", "f__status"]
    assert len(service.requests) == 1


@pytest.mark.parametrize("cut", [lambda body: body[:-8], lambda body: body[: len(body) // 2]], ids=["marker", "half"])
def test_lookup_refuses_an_answer_that_was_cut(connect: Connect, cut: Callable[[bytes], bytes]) -> None:
    whole = write_table(pa.table({"example_id": ["a"]}))
    client, _ = connect(httpx.Response(200, content=cut(whole)))
    with pytest.raises(TruncatedStreamError):
        client.lookup("ads", ["a"], fms=["f"])


def test_lookup_refuses_an_answer_without_its_row_count(connect: Connect) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows().schema) as writer:
        writer.write_table(rows())
    client, _ = connect(httpx.Response(200, content=sink.getvalue().to_pybytes()))
    with pytest.raises(TruncatedStreamError, match="without saying how many"):
        client.lookup("ads", ["a"], fms=["f"])


# ---- repeats


def test_a_lost_connection_is_tried_again_with_growing_pauses(connect: Connect, time: FakeTime) -> None:
    client, service = connect(
        httpx.ConnectError("refused"), httpx.ReadError("lost"), httpx.ReadTimeout("slow"), answer(ACCEPTED, 202)
    )
    assert client.ingest("ads", rows()).accepted == 2
    assert len({request.content for request in service.requests}) == 1
    assert time.slept == [0.1, 0.2, 0.4]


def test_retry_after_is_obeyed(connect: Connect, time: FakeTime) -> None:
    client, _ = connect(problem(429, "backlog", "3"), problem(503, "unavailable", "2"), answer(ACCEPTED, 202))
    assert client.ingest("ads", rows()).accepted == 2
    assert time.slept == [3.0, 2.0]


def test_the_deadline_ends_the_repeats(connect: Connect, time: FakeTime) -> None:
    client, service = connect(problem(429, "backlog", "3"), timeout_seconds=10)
    with pytest.raises(UnavailableError) as caught:
        client.ingest("ads", rows())
    assert (caught.value.code, caught.value.status, caught.value.retryable) == ("backlog", 429, True)
    assert time.now < 10
    assert len(service.requests) == 4


def test_no_answer_until_the_deadline_is_unreachable(connect: Connect, time: FakeTime) -> None:
    client, _ = connect(httpx.ConnectError("refused"), timeout_seconds=5)
    with pytest.raises(UnreachableError, match="no answer from http://das: refused") as caught:
        client.status()
    assert (caught.value.status, caught.value.retryable) == (None, True)
    assert time.slept == [0.1, 0.2, 0.4, 0.8, 1.6]


def augmented(request: httpx.Request) -> httpx.Response:
    keys = sent(request)
    return httpx.Response(200, content=write_table(pa.table({"f__status": ["present"] * keys.num_rows})))


@pytest.mark.parametrize(
    "failure", [httpx.ConnectError("refused"), problem(429, "busy"), problem(503, "unavailable")],
    ids=["refused", "429", "503"],
)  # fmt: skip
def test_augment_tries_a_service_that_does_not_take_it_as_long_as_any_call(
    connect: Connect, time: FakeTime, failure: Any
) -> None:
    client, service = connect(failure, timeout_seconds=5)
    with pytest.raises(DasClientError) as caught:
        client.augment("ads", rows(), fms=["f"])
    assert caught.value.retryable
    assert (time.slept, len(service.requests)) == ([0.1, 0.2, 0.4, 0.8, 1.6], 6)


def test_augment_is_tried_again_when_the_service_is_lost_while_it_works(connect: Connect, time: FakeTime) -> None:
    def loses(_: httpx.Request) -> httpx.Response:
        time.now += 300
        raise httpx.ReadError("lost")

    refused = httpx.ConnectError("refused")
    client, service = connect(loses, refused, refused, augmented, timeout_seconds=5)
    assert client.augment("ads", rows(), fms=["f"])["f__status"].to_pylist() == ["present"] * 2
    waits = [request.extensions["timeout"]["read"] for request in service.requests]
    assert waits == pytest.approx([600, 299.9, 299.7, 299.3])


def test_augment_of_a_service_that_works_for_ever_ends(connect: Connect, time: FakeTime) -> None:
    def hangs(request: httpx.Request) -> httpx.Response:
        time.now += request.extensions["timeout"]["read"]
        raise httpx.ReadTimeout("slow")

    client, service = connect(hangs)
    with pytest.raises(UnreachableError):
        client.augment("ads", rows(), fms=["f"])
    assert (time.now, len(service.requests)) == (600, 1)


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (problem(404, "unknown_dataset"), NotFoundError),
        (problem(409, "dataset_conflict", differences=[{"field": "partitions"}]), ConflictError),
        (problem(412, "lost_race"), LostRaceError),
        (problem(422, "schema_mismatch"), RowsRefusedError),
        (problem(500, "bug"), DasClientError),
        (problem(507, "disk_reserve", retryable=False), DasClientError),
        (problem(503, "log_lost", "2", retryable=False), UnavailableError),
        (httpx.Response(500, text="<html>"), DasClientError),
    ],
)
def test_what_a_repeat_cannot_help_is_raised_at_once(
    connect: Connect, refusal: httpx.Response, kind: type[DasClientError]
) -> None:
    client, service = connect(refusal)
    with pytest.raises(kind) as caught:
        client.put_dataset("ads", {})
    assert type(caught.value) is kind
    assert caught.value.status == refusal.status_code
    assert len(service.requests) == 1


def test_an_error_holds_the_refused_rows(connect: Connect) -> None:
    error = {"row": 4, "example_id": "a", "column": "price", "code": "not_finite", "message": "it is NaN"}
    client, _ = connect(problem(422, "invalid_rows", errors=[error]))
    with pytest.raises(RowsRefusedError) as caught:
        client.ingest("ads", rows(), on_error="abort")
    assert [(e.row, e.example_id, e.column, e.code) for e in caught.value.errors] == [(4, "a", "price", "not_finite")]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(None, 0), ("", 0), ("7", 7), ("0.5", 0.5), ("-3", 0), ("soon", 0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0)],
)
def test_retry_after_may_be_anything(text: str | None, seconds: float) -> None:
    assert retry_after_seconds(text) == seconds


# ---- snapshots


def test_waiting_for_a_snapshot_ends_when_it_is_validated(connect: Connect, time: FakeTime) -> None:
    client, _ = connect(
        answer({"state": "validating"}), answer({"state": "validating"}), answer({"state": "validated"})
    )
    assert client.wait_for_snapshot("ads", "f", "s1", poll_seconds=1) == {"state": "validated"}
    assert time.slept == [1, 1]


def test_a_rejected_snapshot_raises_its_reasons(connect: Connect) -> None:
    client, _ = connect(answer({"state": "rejected", "reasons": ["wrong sum", "wrong width"]}))
    with pytest.raises(SnapshotRejectedError, match="wrong sum; wrong width"):
        client.wait_for_snapshot("ads", "f", "s1")


def test_waiting_for_a_snapshot_has_a_deadline(connect: Connect, time: FakeTime) -> None:
    client, _ = connect(answer({"state": "validating"}))
    with pytest.raises(DasClientError, match="is a worker running"):
        client.wait_for_snapshot("ads", "f", "s1", timeout_seconds=3, poll_seconds=1)
    assert time.now == 3


def test_activation_names_the_state_that_it_was_decided_on(connect: Connect) -> None:
    client, service = connect(answer({"snapshot_id": "s1"}, ETag='"7"'), answer({"snapshot_id": "s2"}))
    client.activate_snapshot("ads", "f", "s2")
    assert [(r.method, r.headers.get("If-Match")) for r in service.requests] == [("GET", None), ("PUT", '"7"')]
    assert json.loads(service.requests[1].content) == {"snapshot_id": "s2"}


def test_activation_whose_answer_was_lost_is_no_lost_race(connect: Connect) -> None:
    client, _ = connect(
        answer({"snapshot_id": "s1"}, ETag='"7"'),
        httpx.ReadError("lost"),
        problem(412, "lost_race"),
        answer({"snapshot_id": "s2"}, ETag='"8"'),
    )
    assert client.activate_snapshot("ads", "f", "s2") == {"snapshot_id": "s2"}


def test_the_loser_of_a_race_hears_of_it(connect: Connect) -> None:
    client, _ = connect(problem(412, "lost_race"))
    with pytest.raises(LostRaceError):
        client.activate_snapshot("ads", "f", "s2", if_match='"6"')


def test_not_ready_is_an_answer(connect: Connect) -> None:
    client, service = connect(answer({"ready": False, "problems": ["no sink is alive"]}, 503))
    assert client.ready() == {"ready": False, "problems": ["no sink is alive"]}
    assert len(service.requests) == 1


# ---- long calls: what ends them, and how far they are


class Pool(ThreadPoolExecutor):
    """Threads; `is_ending` is set once they are told to end and what is to be cancelled is."""

    is_ending = threading.Event()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)
        self.is_ending.set()
        super().shutdown(wait=wait)


def interrupt(_: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("added", "on_progress", "kind"),
    [("price", None, ValueError), ("f__status", interrupt, KeyboardInterrupt)],
    ids=["collision", "interrupt"],
)
def test_augment_that_fails_sends_no_more_pieces(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, added: str, on_progress: Any, kind: type[BaseException]
) -> None:
    Pool.is_ending.clear()

    def first_then_late(request: httpx.Request) -> httpx.Response:
        if sent(request)["example_id"][0].as_py() != "e0":
            assert Pool.is_ending.wait(30)
        return httpx.Response(200, content=write_table(pa.table({added: ["present"]})))

    monkeypatch.setattr(client_module, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(client_module, "ROWS_PER_AUGMENT", 1)
    client, service = connect(first_then_late)
    with pytest.raises(kind):
        client.augment("ads", rows(20), fms=["f"], on_progress=on_progress)
    assert len(service.requests) <= 3


def told_rows(account: Any) -> int:
    return account if isinstance(account, int) else account.accepted


def accepted(request: httpx.Request) -> httpx.Response:
    return answer({**ACCEPTED, "accepted": sent(request).num_rows}, 202)


LONG_CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "augment": (augmented, lambda client, **options: client.augment("ads", rows(7), fms=["f"], **options)),
    "ingest": (accepted, lambda client, **more: client.ingest_batches("ads", rows(7), rows_per_request=3, **more)),
    "labels": (accepted, lambda client, **more: client.label_batches("ads", rows(7), rows_per_request=3, **more)),
}


@pytest.mark.parametrize("name", LONG_CALLS)
def test_a_long_call_draws_a_bar_beside_telling(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(client_module, "ROWS_PER_AUGMENT", 3)
    service, call = LONG_CALLS[name]
    client, _ = connect(service)
    told: list[int] = []

    call(client, progress=True, on_progress=lambda account: told.append(told_rows(account)))

    drawn = capsys.readouterr()
    assert told == [3, 6, 7]
    assert drawn.out == ""
    assert f"{name}: 7 rows" in drawn.err


@pytest.mark.parametrize("name", LONG_CALLS)
def test_a_long_call_is_silent_unless_asked(connect: Connect, capsys: pytest.CaptureFixture[str], name: str) -> None:
    service, call = LONG_CALLS[name]
    call(connect(service)[0])
    assert capsys.readouterr() == ("", "")


def test_a_bar_of_rows_that_are_read_as_they_are_sent_has_no_end(
    connect: Connect, capsys: pytest.CaptureFixture[str]
) -> None:
    client, _ = connect(accepted)
    client.ingest_batches("ads", (rows(2) for _ in range(3)), progress=True)
    assert "ingest: 6 rows" in capsys.readouterr().err


# ---- `das augment` as a process

STUBBORN = """#!/bin/sh
trap '' TERM INT
echo $$ > {begun}
while :; do sleep 0.1; done
"""


def test_a_join_that_does_not_end_when_told_to_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, program = tmp_path / "begun", tmp_path / "python"
    os.mkfifo(begun)
    program.write_text(STUBBORN.format(begun=begun))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(augment_module, "TIDY_SECONDS", 0.2)

    joins: list[int] = []

    def interrupt_once_begun() -> None:
        joins.append(int(begun.read_text()))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt_once_begun)
    thread.start()
    with Client("http://das") as client, pytest.raises(KeyboardInterrupt):
        client.augment_files("ads", "in.parquet", "out.parquet", fms=["f"])
    thread.join()
    with pytest.raises(ProcessLookupError):  # it is gone, and waited for
        os.kill(joins[0], 0)


# ---- what is imported: I10

_BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError("No module named " + repr(name) + " (blocked)", name=name)
sys.meta_path.insert(0, Block())
"""
_LIGHT = {
    "torch", "fastapi", "duckdb", "redis", "deltalake", "pandas", "polars", "pydantic", "pydantic_settings", "numpy",
    "typer", "rich", "xxhash", "uvicorn", "prometheus_client",
}  # fmt: skip


def run_python(program: str, blocked: set[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BLOCK.format(blocked=blocked) + program],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_the_client_works_with_httpx_and_pyarrow_alone() -> None:
    program = """
import httpx
from das_service.client import Client
from schemas.wire import read_table, write_table
def service(request):
    if request.url.path.endswith("/examples"):
        return httpx.Response(202, json={"accepted": read_table(request.read()).num_rows, "positions": {}})
    return httpx.Response(200, content=write_table(read_table(request.read())))
client = Client("http://das", transport=httpx.MockTransport(service))
assert client.ingest("ads", [{"example_id": "a"}]).accepted == 1
assert client.lookup("ads", ["b", "a"], fms=["f"]).to_pylist() == [{"example_id": "b"}, {"example_id": "a"}]
"""
    done = run_python(program, _LIGHT)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_bar_without_rich_says_what_to_install_before_anything_is_sent() -> None:
    program = """
from das_service.client import Client, DasClientError
try:
    Client("http://127.0.0.1:1").ingest_batches("ads", [{"example_id": "a"}], progress=True)
except DasClientError as error:
    print(error.code, error)
"""
    done = run_python(program, _LIGHT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("no_rich ")
    assert "pip install rich" in done.stdout


def test_the_api_imports_without_torch() -> None:
    done = run_python("import das_service.app", {"torch"})
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_line_says_what_to_install_when_only_the_client_is() -> None:
    done = run_python("from das_service.cli import main\nmain()", _LIGHT)
    assert done.returncode == 1
    assert "pip install 'das-service[service]'" in done.stderr
    assert "Traceback" not in done.stderr
