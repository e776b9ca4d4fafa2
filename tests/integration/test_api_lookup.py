"""Handing supervision out of the online store."""

from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis

from das_service.client import Client
from das_service.settings import Settings
from das_service.supervision import lookup
from schemas import keys
from schemas.codecs import decode, encode
from schemas.snapshot import OutputColumns
from schemas.wire import ARROW_STREAM, END_OF_STREAM, read_table
from tests.served import NOON, SPEC, Api, Stand, arrow_body, examples, serve, serve_over_tcp

PATH = "/v1/datasets/ads/supervision/lookup"


def statuses(rows: list[dict[str, Any]], fm: str = "f") -> list[str]:
    return [row[f"{fm}__status"] for row in rows]


def arrow_lookup(api: Api, table: pa.Table, **params: Any) -> pa.Table:
    answer = api.http.post(PATH, content=arrow_body(table), params=params, headers={"Content-Type": ARROW_STREAM})
    assert answer.status_code == 200, answer.text
    return read_table(answer.content)


@pytest.fixture
def scored(api: Api, stand: Stand) -> Api:
    """Ten examples e0..e9 that snapshot s1 has scored: logit = i, hidden = [i, -i]."""
    stand.validate()
    api.post(examples(0, 10))
    assert stand.work() == 10
    return api


def test_a_scored_row_has_all_its_values(scored: Api) -> None:
    (row,) = scored.lookup(["e3"])

    assert row == {
        "example_id": "e3",
        "f__status": "present",
        "f__snapshot_id": "s1",
        "f__trained_through": "2026-01-01T00:00:00Z",
        "f__scored_at": "2026-03-01T12:00:00Z",
        "f__click__logit": 3.0,
        "f__hidden": [3.0, -3.0],
    }


def test_order_and_repeats_of_the_request_are_kept(scored: Api) -> None:
    rows = scored.lookup(["e5", "e1", "e5", "nobody", "e0"])

    assert [row["example_id"] for row in rows] == ["e5", "e1", "e5", "nobody", "e0"]
    assert [row["f__click__logit"] for row in rows] == [5.0, 1.0, 5.0, None, 0.0]


def test_lookup_says_pending_before_the_worker_ran_and_missing_after(api: Api, stand: Stand) -> None:
    stand.validate()
    api.post(examples(0, 50))
    assert set(statuses(api.lookup(["e1", "e2", "nobody"]))) == {"pending"}

    stand.work()

    assert statuses(api.lookup(["e1", "e2", "nobody"])) == ["present", "present", "missing"]


def test_rows_that_were_delivered_and_not_published_are_pending(api: Api, stand: Stand, store: redis.Redis) -> None:
    stand.validate()
    api.post(examples(0, 50))
    for partition in range(2):
        store.xreadgroup(keys.group("f"), "slow", {keys.log("ads", partition, "examples"): ">"})

    assert set(statuses(api.lookup(["e1", "e2"]))) == {"pending"}


def test_an_fm_without_a_validated_snapshot_gives_its_status_alone(api: Api, stand: Stand) -> None:
    api.post(examples(0, 50))

    assert api.lookup(["e1"]) == [{"example_id": "e1", "f__status": "pending"}]


def test_examples_before_an_fm_was_declared_are_missing_for_it(api: Api) -> None:
    api.post(examples(0, 5))
    api.declare_fm()

    assert statuses(api.lookup(["e1"])) == ["missing"]


def test_dead_lettered_rows_are_failed_without_values(api: Api, stand: Stand) -> None:
    stand.validate()
    api.post(examples(0, 5))
    stand.work(fail=True)

    (row,) = api.lookup(["e1"])
    assert row["f__status"] == "failed"
    assert {value for name, value in row.items() if name not in {"example_id", "f__status"}} == {None}


@pytest.mark.parametrize(
    ("after_event", "status"),
    [(timedelta(0), "present"), (timedelta(microseconds=1), "leaky"), (-timedelta(microseconds=1), "present")],
    ids=["tie", "after", "before"],
)
def test_a_snapshot_trained_through_a_later_time_is_leaky(
    api: Api, stand: Stand, after_event: timedelta, status: str
) -> None:
    stand.validate(trained_through=NOON + after_event)
    api.post(examples(0, 5))
    stand.work()

    (row,) = api.lookup(["e1"])
    assert row["f__status"] == status
    assert (row["f__click__logit"] is None) == (status == "leaky")


def test_leaky_values_are_not_in_the_bytes_of_an_arrow_answer_either(api: Api, stand: Stand) -> None:
    stand.validate(trained_through=NOON + timedelta(seconds=1))
    api.post(examples(0, 5))
    stand.work()

    table = arrow_lookup(api, pa.table({"example_id": ["e3"]}), fms="f")

    logits = table["f__click__logit"].chunk(0)
    assert np.frombuffer(logits.buffers()[1], np.float32)[0] == 0.0
    assert not any(table["f__hidden"].chunk(0).flatten().to_pylist())


@pytest.mark.parametrize(("gap_days", "status"), [(58.0, "stale"), (60.0, "present")])
def test_an_older_snapshot_than_asked_for_is_stale(scored: Api, gap_days: float, status: str) -> None:
    rows = scored.lookup(["e1"], max_freshness_gap_seconds=gap_days * 86_400)

    assert statuses(rows) == [status]


def test_another_event_day_than_the_callers_is_another_example(scored: Api) -> None:
    same_day = (NOON + timedelta(hours=3)).isoformat()
    other_day = (NOON + timedelta(days=1)).isoformat()

    rows = scored.lookup(["e1", "e1", "e1"], event_times=[same_day, other_day, None])

    assert statuses(rows) == ["present", "missing", "present"]


def test_days_are_counted_in_utc_whatever_the_zone(scored: Api) -> None:
    times = pa.array([NOON, NOON + timedelta(days=1)], pa.timestamp("s", "Asia/Tokyo"))

    table = arrow_lookup(scored, pa.table({"example_id": ["e1", "e1"], "event_time": times}), fms="f")

    assert table["f__status"].to_pylist() == ["present", "missing"]


def test_outputs_selects_columns(scored: Api) -> None:
    (row,) = scored.lookup(["e1"], outputs=["hidden"])

    assert "f__click__logit" not in row
    assert row["f__hidden"] == [1.0, -1.0]


def test_an_output_that_no_fm_has_is_refused(scored: Api) -> None:
    answer = scored.http.post(PATH, json={"fms": ["f"], "example_ids": ["e1"], "outputs": ["buy"]})

    assert (answer.status_code, answer.json()["code"]) == (422, "unknown_output")


def test_an_unknown_fm_is_404(api: Api) -> None:
    answer = api.http.post(PATH, json={"fms": ["f"], "example_ids": ["e1"]})

    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_fm")


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("form", ["encoded", "float16", "float32"])
def test_embeddings_come_as_encoded_or_decoded(settings: Settings, store: redis.Redis, codec: Any, form: str) -> None:
    with serve(settings) as api:
        api.declare()
        api.declare_fm()
        outputs = OutputColumns(tasks=(), embeddings={"z": (3, codec)})
        Stand(settings, store).validate(outputs=outputs)
        values = np.array([[0.5, -0.25, 0.125]], np.float32)
        packed = encode(values, codec)
        _put(store, packed, outputs)

        table = arrow_lookup(api, pa.table({"example_id": ["a"]}), fms="f", embedding_format=form)

    column = table["f__z"]
    if form == "encoded":
        assert column.to_pylist() == [packed.tobytes()]
        assert table.schema.field("f__z").metadata == {b"codec": codec.encode(), b"size": b"3"}
    else:
        assert column.type == pa.list_(pa.float16() if form == "float16" else pa.float32(), 3)
        expected = decode(packed, 3, codec).astype(np.float16 if form == "float16" else np.float32)
        assert [float(x) for x in column.to_pylist()[0]] == expected[0].astype(float).tolist()


def _put(store: redis.Redis, packed: Any, outputs: OutputColumns) -> None:
    from schemas.supervision import online_layout, pack_values

    time_us = np.array([int(NOON.timestamp() * 1e6)])
    value = pack_values(
        online_layout(outputs), snapshot=0, event_time_us=time_us, scored_at_us=0, outputs={"z": packed}
    )
    digest = keys.digest_array(pa.array(["a"]))
    partition = int(keys.partitions_of(digest, 2)[0])
    store.set(keys.online_prefix("ads", partition, "f") + keys.digest_bytes(digest), value)


def test_several_fms_stand_side_by_side(scored: Api) -> None:
    scored.declare_fm("g", required=False)

    (row,) = scored.lookup(["e1"], fms=["f", "g"])

    assert (row["f__status"], row["g__status"]) == ("present", "missing")


def test_an_arrow_answer_says_its_rows_and_ends_with_the_marker(scored: Api) -> None:
    body = arrow_body(pa.table({"example_id": ["e1", "x"]}))
    answer = scored.http.post(PATH, content=body, params={"fms": "f"}, headers={"Content-Type": ARROW_STREAM})

    assert answer.headers["Content-Type"] == ARROW_STREAM
    assert answer.content.endswith(END_OF_STREAM)
    reader = pa.ipc.open_stream(answer.content)
    assert reader.read_next_batch_with_custom_metadata()[1][b"das_rows"] == b"2"


def test_accept_decides_the_form_of_the_answer(scored: Api) -> None:
    body = {"fms": ["f"], "example_ids": ["e1"]}
    arrow = scored.http.post(PATH, json=body, headers={"Accept": ARROW_STREAM})
    json = scored.http.post(
        PATH, content=arrow_body(pa.table({"example_id": ["e1"]})), params={"fms": "f"},
        headers={"Content-Type": ARROW_STREAM, "Accept": "application/json"},
    )  # fmt: skip

    assert read_table(arrow.content)["f__status"].to_pylist() == ["present"]
    assert statuses(json.json()["rows"]) == ["present"]


def test_nothing_asked_is_nothing_answered(scored: Api) -> None:
    assert scored.lookup([]) == []
    assert arrow_lookup(scored, pa.table({"example_id": pa.array([], pa.string())}), fms="f").num_rows == 0


def test_fms_may_repeat_or_be_separated_by_commas(scored: Api) -> None:
    scored.declare_fm("g")
    table = pa.table({"example_id": ["e1"]})

    answers = [arrow_lookup(scored, table, fms=fms) for fms in ("f,g", ["f", "g"])]

    assert answers[0].equals(answers[1])
    assert "g__status" in answers[0].column_names


LOOKUP_FAULTS: dict[str, tuple[Any, dict[str, Any], int, str]] = {
    "no fm": (pa.table({"example_id": ["a"]}), {}, 422, "invalid_body"),
    "null id": (pa.table({"example_id": pa.array([None], pa.string())}), {"fms": "f"}, 422, "invalid_rows"),
    "no ids": (pa.table({"event_time": [NOON]}), {"fms": "f"}, 422, "schema_mismatch"),
    "int ids": (pa.table({"example_id": [1]}), {"fms": "f"}, 422, "schema_mismatch"),
    "unknown column": (pa.table({"example_id": ["a"], "x": [1]}), {"fms": "f"}, 422, "schema_mismatch"),
    "bad format": (pa.table({"example_id": ["a"]}), {"fms": "f", "embedding_format": "int8"}, 400, "malformed"),
    "negative gap": (
        pa.table({"example_id": ["a"]}), {"fms": "f", "max_freshness_gap_seconds": -1}, 400, "malformed",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("table", "params", "status", "code"), LOOKUP_FAULTS.values(), ids=LOOKUP_FAULTS)
def test_a_bad_lookup_is_refused(scored: Api, table: pa.Table, params: dict[str, Any], status: int, code: str) -> None:
    answer = scored.http.post(PATH, content=arrow_body(table), params=params, headers={"Content-Type": ARROW_STREAM})

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["Content-Type"] == "application/problem+json"


JSON_FAULTS: dict[str, tuple[str, int]] = {
    "half": ('{"fms": ["f"]', 400),
    "no ids": ('{"fms": ["f"]}', 422),
    "no fms": ('{"example_ids": ["a"]}', 422),
    "empty fms": ('{"fms": [], "example_ids": ["a"]}', 422),
    "numbers": ('{"fms": ["f"], "example_ids": [1]}', 422),
    "unknown key": ('{"fms": ["f"], "example_ids": ["a"], "x": 1}', 422),
    "times of another length": ('{"fms": ["f"], "example_ids": ["a"], "event_times": []}', 422),
    "naive time": ('{"fms": ["f"], "example_ids": ["a"], "event_times": ["2026-03-01T12:00:00"]}', 422),
    "NaN gap": ('{"fms": ["f"], "example_ids": ["a"], "max_freshness_gap_seconds": NaN}', 422),
    "deep": ("[" * 100_000, 400),
}


@pytest.mark.parametrize(("content", "status"), JSON_FAULTS.values(), ids=JSON_FAULTS)
def test_a_bad_json_lookup_is_refused(scored: Api, content: str, status: int) -> None:
    answer = scored.http.post(PATH, content=content, headers={"Content-Type": "application/json"})

    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_more_ids_than_a_request_may_have_are_413(settings: Settings) -> None:
    with serve(settings.model_copy(update={"max_rows": 10})) as api:
        api.declare(spec=SPEC)
        api.declare_fm()
        answer = api.http.post(PATH, json={"fms": ["f"], "example_ids": ["a"] * 11})
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


WIDE = OutputColumns(tasks=("click",), embeddings={"wide": (4096, "float16")})
WIDE_QUERIES: dict[str, tuple[dict[str, Any], str, int]] = {
    "float16": ({}, ARROW_STREAM, 2**20 // (24 + 4 + 8192)),
    "float32": ({"embedding_format": "float32"}, ARROW_STREAM, 2**20 // (25 + 16384)),
    "encoded": ({"embedding_format": "encoded"}, ARROW_STREAM, 2**20 // (24 + 4 + 8192)),
    "the logit alone, whose value holds the embedding too": (
        {"outputs": ["click"]}, ARROW_STREAM, 2**20 // (24 + 4 + 8192),
    ),
    "JSON numbers": ({}, "application/json", 2**20 // (16 * (25 + 16384))),
    "JSON base64": ({"embedding_format": "encoded"}, "application/json", 2**20 // (16 * 25 + 4 * 8192)),
}  # fmt: skip


@pytest.mark.parametrize(("asked", "accept", "fitting"), WIDE_QUERIES.values(), ids=WIDE_QUERIES)
def test_an_answer_over_the_bound_is_413_before_anything_is_fetched(
    settings: Settings, store: redis.Redis, asked: dict[str, Any], accept: str, fitting: int
) -> None:
    with serve(settings.model_copy(update={"max_answer_bytes": 2**20})) as api:
        api.declare(spec=SPEC)
        api.declare_fm()
        Stand(settings, store).validate(outputs=WIDE)

        def look(num_ids: int) -> Any:
            body = {"fms": ["f"], "example_ids": ["a"] * num_ids, **asked}
            return api.http.post(PATH, json=body, headers={"Accept": accept})

        store.config_resetstat()
        refused = look(fitting + 1)

        assert (refused.status_code, refused.json()["code"]) == (413, "answer_too_large")
        assert refused.json()["max_ids"] == fitting
        assert f"at most {fitting} ids" in refused.json()["detail"]
        assert "cmdstat_mget" not in store.info("commandstats")
        answer = look(fitting)
        assert answer.status_code == 200
        assert len(answer.content) <= 2**20
        assert "cmdstat_mget" in store.info("commandstats")


def test_all_fms_asked_for_count_towards_the_bound(settings: Settings, store: redis.Redis) -> None:
    with serve(settings.model_copy(update={"max_answer_bytes": 2**20})) as api:
        api.declare(spec=SPEC)
        for fm in ("f", "g"):
            api.declare_fm(fm)
            Stand(settings, store, fm=fm).validate(outputs=WIDE)
        body = {"fms": ["f", "g"], "example_ids": ["a"] * 64}

        refused = api.http.post(PATH, json=body, headers={"Accept": ARROW_STREAM})

        assert refused.json()["max_ids"] == 2**20 // (2 * (24 + 4 + 8192))


def test_the_client_gets_a_wide_answer_in_as_many_pieces_as_the_bound_asks_for(
    settings: Settings, store: redis.Redis
) -> None:
    with serve(settings) as api:
        api.declare(spec=SPEC)
        api.declare_fm()
        Stand(settings, store).validate(outputs=WIDE)
    ids = [f"e{i}" for i in range(300)]
    narrow = settings.model_copy(update={"max_answer_bytes": 2**20})
    with serve_over_tcp(narrow) as port, Client(f"http://127.0.0.1:{port}") as client:
        table = client.lookup("ads", ids, fms=["f"])

    assert table["example_id"].to_pylist() == ids
    assert set(table["f__status"].to_pylist()) == {"missing"}


def test_looked_up_rows_are_counted_by_status(scored: Api) -> None:
    scored.lookup(["e1", "e2", "x"])

    metrics = scored.http.get("/metrics").text
    assert 'das_lookup_rows_total{dataset="ads",fm="f",status="present"} 2.0' in metrics
    assert 'das_coverage_ratio{dataset="ads",fm="f"} 0.66' in metrics


def test_a_value_of_another_width_or_format_is_absent(scored: Api, store: redis.Redis) -> None:
    for example_id, change in (("e1", lambda value: value[:-1]), ("e2", lambda value: b"\x09" + value[1:])):
        digest = keys.digest_array(pa.array([example_id]))
        key = keys.online_prefix("ads", int(keys.partitions_of(digest, 2)[0]), "f") + keys.digest_bytes(digest)
        store.set(key, change(store.get(key)))

    assert statuses(scored.lookup(["e1", "e2", "e3"])) == ["missing", "missing", "present"]


def test_twenty_thousand_ids_are_one_answer(scored: Api) -> None:
    ids = [f"e{i % 20}" for i in range(20_001)]

    table = arrow_lookup(scored, pa.table({"example_id": ids}), fms="f", max_freshness_gap_seconds=1e9)

    assert table["example_id"].to_pylist() == ids
    assert table["f__click__logit"].to_pylist() == [float(i % 20) if i % 20 < 10 else None for i in range(20_001)]


def test_a_row_that_is_scored_between_the_two_looks_is_not_called_missing(
    api: Api, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand.validate()
    api.post(examples(0, 10))
    real = lookup.unfinished_partitions

    def finish_first(*arguments: Any) -> set[int]:
        stand.work()
        return real(*arguments)

    monkeypatch.setattr(lookup, "unfinished_partitions", finish_first)

    assert statuses(api.lookup(["e1", "nobody"])) == ["present", "missing"]


def test_a_snapshot_that_was_registered_since_the_catalog_was_read_is_found(api: Api, stand: Stand) -> None:
    stand.validate("s1")
    api.lookup(["e1"])
    cache = api.http.app_state["service"].catalog
    old = cache.current()
    stand.validate("s2")
    api.post(examples(0, 10))
    stand.work()
    answers = iter([old, cache.current()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cache), "current", lambda _: next(answers))
        (row,) = api.lookup(["e1"])

    assert (row["f__status"], row["f__snapshot_id"]) == ("present", "s2")
