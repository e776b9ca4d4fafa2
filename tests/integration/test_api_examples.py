"""Taking examples in: what is answered, what lies in the log, and that repeats change nothing."""

import asyncio
import json
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import redis

from das_service import service
from das_service.door.door import read_body
from das_service.door.validation import validate_json
from das_service.routes import examples as routes
from das_service.scored_wait import Awaited
from das_service.settings import Settings
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.entries import parse_entry
from schemas.wire import ARROW_STREAM
from tests.served import NOON, Api, Stand, arrow_body, examples, examples_table, serve, serve_over_tcp
from tests.spools import wait_until


def _ids(rows: list[dict[str, object]]) -> list[object]:
    return sorted(row["example_id"] for row in rows)


def test_rows_of_a_json_body_are_logged_as_sent(api: Api) -> None:
    answer = api.post(examples(0, 1, tags=["a", "b"], image=[1, 2.5, -3, 0], item=7))

    assert answer.status_code == 202
    body = answer.json()
    assert body["accepted"] == 1
    assert list(body["positions"].values()) == [0]
    (row,) = api.logged_rows()
    assert row == {
        "example_id": "e0",
        "example_digest": keys.digests([b"e0"]),
        "event_time": NOON,
        "price": 0.0,
        "user_id": "u0",
        "item": 7,
        "tags": ["a", "b"],
        "image": pa.array([1, 2.5, -3, 0], pa.float32()).to_numpy().tobytes(),
    }


def test_arrow_and_json_of_the_same_rows_are_the_same_entry(api: Api) -> None:
    api.post(examples(0, 20))
    answer = api.post(examples_table(0, 20))

    assert answer.json()["accepted"] == 20
    assert len(api.logged_rows()) == 20


def test_all_accepted_columns_of_other_types_are_logged_in_the_canonical_one(api: Api) -> None:
    table = examples_table(
        0,
        3,
        example_id=pa.array(["a", "b", "c"]).dictionary_encode(),
        event_time=pa.array([NOON] * 3, pa.timestamp("ns", "Europe/Paris")),
        price=pa.array([1.5, 2.5, 3.5], pa.float32()),
        user_id=pa.array(["u", "v", "u"]).cast(pa.string_view()),
        item=pa.array([1, None, 1], pa.int64()).dictionary_encode(),
        tags=pa.array([["x", "y"], None, []], pa.large_list(pa.large_string())),
        image=pa.array([[1, 2, 3, 4], None, [5, 6, 7, 8]], pa.list_(pa.float32())),
    ).select(["image", "tags", "item", "price", "event_time", "user_id", "example_id"])

    assert api.post(table).json()["accepted"] == 3
    logged = {row["example_id"]: row for row in api.logged_rows()}
    assert [logged[i]["price"] for i in "abc"] == [1.5, 2.5, 3.5]
    assert [logged[i]["user_id"] for i in "abc"] == ["u", "v", "u"]
    assert [logged[i]["item"] for i in "abc"] == [1, None, 1]
    assert [logged[i]["tags"] for i in "abc"] == [["x", "y"], None, []]
    assert logged["b"]["image"] is None
    assert logged["c"]["image"] == pa.array([5, 6, 7, 8], pa.float32()).to_numpy().tobytes()
    assert {row["event_time"] for row in logged.values()} == {NOON}


def test_a_request_sent_twice_is_logged_once_and_answered_alike(api: Api) -> None:
    first, second = api.post(examples(0, 50)), api.post(examples(0, 50))

    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() == second.json()
    assert len(api.logged_rows()) == 50
    metrics = api.http.get("/metrics").text
    assert 'das_duplicate_examples_total{dataset="ads"} 50.0' in metrics


def test_the_status_counts_repeats_as_accepted_and_duplicate(api: Api) -> None:
    api.post(examples(0, 50))
    api.post(examples(0, 50))

    status = api.http.get("/v1/datasets/ads/status").json()
    assert (status["accepted"], status["duplicates"], status["in_log"], status["distinct"]) == (100, 50, 50, 0)


def test_bad_rows_are_left_out_and_listed_and_the_others_are_logged(api: Api) -> None:
    rows = examples(0, 5)
    rows[1]["price"] = None
    rows[3]["event_time"] = "yesterday"

    answer = api.post(rows)

    assert answer.status_code == 202
    body = answer.json()
    assert (body["accepted"], body["rejected"], body["errors_truncated"]) == (3, 2, False)
    told = [(e["row"], e["example_id"], e["column"], e["code"]) for e in body["errors"]]
    assert told == [(1, "e1", "price", "null"), (3, "e3", "event_time", "malformed_time")]
    assert _ids(api.logged_rows()) == ["e0", "e2", "e4"]


def test_abort_stores_nothing_when_one_row_is_bad(api: Api) -> None:
    rows = examples(0, 5)
    rows[1]["price"] = None

    answer = api.post(rows, on_error="abort")

    assert answer.status_code == 422
    body = answer.json()
    assert (body["code"], body["accepted"], body["rejected"]) == ("invalid_rows", 0, 5)
    assert [error["row"] for error in body["errors"]] == [1]
    assert api.logged_rows() == []


def test_more_than_a_thousand_errors_are_truncated(api: Api) -> None:
    table = examples_table(0, 1501, price=[float("nan")] * 1500 + [1.0])

    body = api.post(table).json()

    assert (body["accepted"], body["rejected"], len(body["errors"]), body["errors_truncated"]) == (1, 1500, 1000, True)


def test_rows_are_split_over_partitions_by_their_digest(api: Api, store: redis.Redis) -> None:
    api.post(examples_table(0, 400))

    lengths = [store.xlen(keys.log("ads", partition, "examples")) for partition in range(2)]
    assert lengths == [1, 1]
    digest = keys.digest_array(pa.array([f"e{i}" for i in range(400)]))
    of_first = set(
        pc.filter(pa.array([f"e{i}" for i in range(400)]), pa.array(keys.partitions_of(digest, 2) == 0)).to_pylist()
    )
    rows = api.logged_rows()
    assert {row["example_id"] for row in rows[: len(of_first)]} == of_first


def test_a_large_request_becomes_chunks_of_at_most_5000_rows(api: Api, store: redis.Redis) -> None:
    answer = api.post(examples_table(0, 12_000))

    rows = [
        int(fields[b"n"])
        for partition in range(2)
        for _, fields in store.xrange(keys.log("ads", partition, "examples"))
    ]
    assert sum(rows) == 12_000
    assert max(rows) <= 5000
    last = [store.xlen(keys.log("ads", partition, "examples")) - 1 for partition in range(2)]
    assert answer.json()["positions"] == {"0": last[0], "1": last[1]}


def test_chunks_are_cut_at_four_megabytes(api: Api, store: redis.Redis) -> None:
    api.post(examples_table(0, 3000, user_id=["x" * 6000] * 3000))

    sizes = [len(fields[b"d"]) for p in range(2) for _, fields in store.xrange(keys.log("ads", p, "examples"))]
    assert max(sizes) <= 4 * 1024 * 1024
    assert len(sizes) > 4


def test_a_row_larger_than_a_chunk_is_refused(api: Api) -> None:
    answer = api.post(examples_table(0, 1, user_id=["x" * 5_000_000]))

    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert api.logged_rows() == []


def test_a_feature_that_is_declared_later_is_null_in_rows_without_it(api: Api) -> None:
    grown = {**api.http.get("/v1/datasets/ads").json()}
    grown["features"] = [*grown["features"], {"name": "hour", "type": "float", "nullable": True}]
    assert api.http.put("/v1/datasets/ads", json=grown).status_code == 200

    api.post([*examples(0, 1), *examples(1, 1, hour=5)])

    assert {row["example_id"]: row["hour"] for row in api.logged_rows()} == {"e0": None, "e1": 5.0}


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_buffers_are_read(api: Api, compression: str) -> None:
    assert api.post(arrow_body(examples_table(0, 500), compression=compression)).json()["accepted"] == 500


def test_an_answer_says_where_its_time_went(api: Api) -> None:
    timing = api.post(examples(0, 1)).headers["Server-Timing"]

    assert [part.split(";")[0].strip() for part in timing.split(",")] == [
        "read",
        "turn",
        "validate",
        "encode",
        "registry",
        "append",
    ]


def test_waiting_for_scores_answers_200_once_they_are_there(api: Api, stand: Stand) -> None:
    stand.validate()
    api.post(examples(0, 10))
    stand.work()

    answer = api.post(examples(0, 10), wait="scored", timeout_seconds=5)

    assert (answer.status_code, answer.json()["scored"]) == (200, True)


def test_waiting_for_scores_answers_202_when_time_is_up(api: Api, stand: Stand) -> None:
    answer = api.post(examples(0, 10), wait="scored", timeout_seconds=0.05)

    assert (answer.status_code, answer.json()["scored"]) == (202, False)
    assert answer.json()["accepted"] == 10


def test_waiting_ends_with_the_last_row_that_is_settled_and_says_that_one_failed(
    api: Api, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand.validate()
    api.post(examples(0, 10))
    stand.work()
    api.post(examples(10, 10))
    stand.work(fail=True)
    looks = []
    real = routes.still_awaited
    monkeypatch.setattr(routes, "still_awaited", lambda *given: looks.append(given) or real(*given))

    answer = api.post(examples(0, 20), wait="scored", timeout_seconds=30)

    assert (answer.status_code, answer.json()["scored"]) == (202, False)
    assert len(looks) == 1


def test_a_wait_ends_as_soon_as_its_rows_are_dead_lettered(api: Api, stand: Stand) -> None:
    stand.validate()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.post, examples(0, 10), wait="scored", timeout_seconds=60)
        num_failed, deadline = 0, time.monotonic() + 20
        while num_failed < 10:
            num_failed += stand.work(fail=True)
            assert time.monotonic() < deadline
        answer = waiting.result(20)

    assert (answer.status_code, answer.json()["scored"], answer.json()["accepted"]) == (202, False, 10)


def test_a_caller_that_hangs_up_does_not_wait_any_longer(api: Api, settings: Settings) -> None:
    api.declare_fm()
    body = json.dumps(examples(0, 1)).encode()
    head = (
        "POST /v1/datasets/ads/examples?wait=scored&timeout_seconds=60 HTTP/1.1\r\nHost: x\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with serve_over_tcp(settings) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: len(api.logged_rows()) == 1)
        wait_until(lambda: 'code="499"' in httpx.get(f"http://127.0.0.1:{port}/metrics").text)


def test_a_wait_holds_neither_the_body_nor_the_rows(api: Api, stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    body_is_gone = threading.Event()
    held: list[weakref.ref[Any]] = []

    class Body(bytes):
        def __del__(self) -> None:
            body_is_gone.set()

    async def read(request: Any, **limits: Any) -> Body:
        return Body(await read_body(request, **limits))

    def validate(*given: Any, **limits: Any) -> Any:
        rows = validate_json(*given, **limits)
        held.append(weakref.ref(rows.batch))
        return rows

    async def wait(_: Any, awaited: list[Awaited], **__: Any) -> bool:
        is_gone = await asyncio.to_thread(body_is_gone.wait, 10)  # the thread that stored them is on its way out
        return is_gone and held[0]() is None and sum(len(item.digests) for item in awaited) == 16 * 50

    monkeypatch.setattr(service, "read_body", read)
    monkeypatch.setattr(routes, "validate_json", validate)
    monkeypatch.setattr(routes, "wait_until_scored", wait)

    assert api.post(examples(0, 50), wait="scored").json()["scored"] is True


@pytest.mark.parametrize("hour", [5, "five"])
def test_rows_are_held_against_what_another_process_has_declared_since(
    api: Api, monkeypatch: pytest.MonkeyPatch, hour: float | str
) -> None:
    grown = {**api.http.get("/v1/datasets/ads").json()}
    grown["features"] = [*grown["features"], {"name": "hour", "type": "float", "nullable": True}]
    specs: list[DatasetSpec] = []

    def validate(body: Any, spec: DatasetSpec, **limits: Any) -> Any:
        specs.append(spec)
        return validate_json(body, spec, **limits)

    assert api.post(examples(0, 1)).status_code == 202  # what is declared is known
    monkeypatch.setattr(routes, "validate_json", validate)
    with serve(api.settings) as other:
        assert other.http.put("/v1/datasets/ads", json=grown).status_code == 200

    answer = api.post(examples(1, 1, hour=hour))

    assert [len(spec.features) for spec in specs] == [5, 6]
    if hour == "five":
        assert (answer.status_code, answer.json()["columns"][0]["column"]) == (422, "hour")
    else:
        assert (answer.status_code, api.logged_rows()[-1]["hour"]) == (202, 5.0)


def test_rows_that_fit_what_was_declared_before_are_held_against_what_is_declared_now(api: Api) -> None:
    tighter = {**api.http.get("/v1/datasets/ads").json(), "max_age_days": 1}
    assert api.post(examples(0, 1)).status_code == 202
    with serve(api.settings) as other:
        assert other.http.put("/v1/datasets/ads", json=tighter).status_code == 200

    answer = api.post(examples(1, 1))

    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (422, "time_too_old")
    assert len(api.logged_rows()) == 1


def test_a_failure_beside_the_registry_leaves_no_reply_for_the_next_request(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a defect")

    assert api.post(examples(0, 1)).status_code == 202
    with monkeypatch.context() as patch:
        patch.setattr(routes, "validate_json", fail)
        assert [api.post(examples(1, 1)).status_code for _ in range(3)] == [500] * 3

    assert api.http.get("/v1/datasets/ads").status_code == 200
    assert api.post(examples(1, 1)).status_code == 202


def test_rows_are_taken_though_others_hold_all_turns(api: Api) -> None:
    turns = api.http.app_state["service"].turns
    held = 0
    while turns.acquire(blocking=False):
        held += 1
    try:
        assert api.post(examples_table(0, 10)).json()["accepted"] == 10
    finally:
        turns.release(held)
    assert api.post(examples_table(10, 10)).json()["accepted"] == 10
    assert turns.acquire(blocking=False)
    turns.release()


def test_waits_leave_threads_for_probes_and_other_requests(
    api: Api, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = api.http.app_state["service"]
    goes_on = threading.Event()
    real = routes.still_awaited

    def slow(*given: Any) -> Any:
        assert goes_on.wait(60)
        return real(*given)

    def wait_for_scores(number: int) -> int:
        while (answer := api.post(examples(number, 1), wait="scored", timeout_seconds=0)).status_code == 429:
            pass
        return int(answer.status_code)

    monkeypatch.setattr(routes, "still_awaited", slow)
    with ThreadPoolExecutor(80) as pool:
        waits = [pool.submit(wait_for_scores, number) for number in range(64)]
        deadline = time.monotonic() + 60
        while service.waits._free > 0:
            assert time.monotonic() < deadline
        try:
            ready = pool.submit(api.http.get, "/health/ready")
            others = [pool.submit(api.post, examples(100 + number, 1)) for number in range(8)]
            assert "a write" not in ready.result(30).text
            assert {other.result(30).status_code for other in others} == {202}
        finally:
            goes_on.set()
        assert {wait.result(60) for wait in waits} == {202}


TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACE = f"00-{TRACE_ID}-{SPAN_ID}-01"


def test_the_callers_trace_goes_with_every_chunk_and_does_not_make_a_repeat_a_new_one(
    api: Api, store: redis.Redis
) -> None:
    for trace in (TRACE, TRACE.replace("4", "5")):
        answer = api.http.post("/v1/datasets/ads/examples", json=examples(0, 50), headers={"traceparent": trace})
        assert answer.status_code == 202

    entries = [
        parse_entry(*pair) for partition in range(2) for pair in store.xrange(keys.log("ads", partition, "examples"))
    ]
    assert [(entry.meta, entry.trace_id) for entry in entries] == [({"traceparent": TRACE}, TRACE_ID)] * 2


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        TRACE.upper(),
        f"{TRACE}-x",
        f"ff{TRACE[2:]}",
        TRACE.replace(TRACE_ID, "0" * 32),
        TRACE.replace(SPAN_ID, "0" * 16),
        TRACE.replace(TRACE_ID, "x" * 32),
    ],
)
def test_a_trace_that_is_none_is_left_out(api: Api, store: redis.Redis, header: str) -> None:
    answer = api.http.post("/v1/datasets/ads/examples", json=examples(0, 1), headers={"traceparent": header})

    assert answer.status_code == 202
    (entry,) = [
        parse_entry(*pair) for partition in range(2) for pair in store.xrange(keys.log("ads", partition, "examples"))
    ]
    assert (entry.meta, entry.trace_id) == ({}, "")


def test_optional_fms_are_not_waited_for(api: Api) -> None:
    api.declare_fm("slow", required=False)

    assert api.post(examples(0, 3), wait="scored").status_code == 200


def test_an_unknown_dataset_is_404(api: Api) -> None:
    answer = api.post(examples(0, 1), dataset="other")

    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_dataset")
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_a_bare_list_is_taken_as_examples(api: Api) -> None:
    answer = api.http.post("/v1/datasets/ads/examples", json=examples(0, 2))

    assert answer.json()["accepted"] == 2


def test_a_charset_beside_the_media_type_does_no_harm(api: Api) -> None:
    headers = {"Content-Type": f"{ARROW_STREAM}; charset=binary"}
    answer = api.http.post("/v1/datasets/ads/examples", content=arrow_body(examples_table(0, 2)), headers=headers)

    assert answer.status_code == 202
