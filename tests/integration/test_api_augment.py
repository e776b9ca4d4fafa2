"""A trainer's table in, the same rows in the same order out; whatever is wrong with it, a problem says so."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import redis

from das_service.metrics import Metrics
from das_service.role import RoleContext
from das_service.settings import Settings
from das_service.sink.sink import Sink
from das_service.supervision.buffers import BufferPool
from das_service.up.embedded import find_server, free_port
from schemas.wire import ARROW_STREAM, END_OF_STREAM, JSON, read_table
from tests.conftest import Server, make_settings
from tests.served import NOON, NOON_US, Api, Stand, arrow_body, examples, serve
from tests.spools import held_spools

PATH = "/v1/datasets/ads/supervision/augment"
TIMESTAMP = pa.timestamp("us", "UTC")
ADDED = ["f__status", "f__snapshot_id", "f__trained_through", "f__scored_at", "f__click__logit", "f__hidden"]
ALL = {"f__status": "present", "f__snapshot_id": "s1", "f__scored_at": "2026-03-01T12:00:00Z"}


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server is enough: the tables are what counts."""
    server = Server(program=find_server(), folder=tmp_path_factory.mktemp("server"), port=free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def spools(tmp_path: Path) -> Path:
    folder = tmp_path / "spools"
    folder.mkdir()
    return folder


@pytest.fixture
def settings(server: Server, tmp_path: Path, spools: Path) -> Settings:
    """One augment at a time, so that a permit that is not given back is noticed."""
    return make_settings(server, tmp_path, spool_folder=spools, max_concurrent_augments=1)


@pytest.fixture
def scored(api: Api, stand: Stand, store: redis.Redis) -> Api:
    """e0..e9 are in the tables, e10..e19 scored and not yet committed, e20..e29 wait; logit = i, hidden = [i, -i]."""
    stand.validate()
    api.post(examples(0, 10))
    stand.work()
    context = RoleContext(api.settings, role="sink", instance="sink-1", client=store, metrics=Metrics("sink"))
    sink = Sink(context)
    for now in range(1, 7):
        sink.step(now=float(now))
    sink.close()
    store.delete(*store.keys("*=f:*"))
    api.post(examples(10, 10))
    stand.work()
    api.post(examples(20, 10))
    return api


def mine(ids: list[str], **columns: Any) -> pa.Table:
    """Give a trainer's table."""
    times = pa.array([NOON] * len(ids), TIMESTAMP)
    made = {"row": np.arange(len(ids)), "event_time": times, "example_id": pa.array(ids, pa.string())}
    return pa.table({**made, **columns})


def post(api: Api, body: pa.Table | bytes, *, headers: dict[str, str] | None = None, **params: Any) -> Any:
    content = arrow_body(body) if isinstance(body, pa.Table) else body
    headers = {"Content-Type": ARROW_STREAM, **(headers or {})}
    return api.http.post(PATH, content=content, params={"fms": "f", **params}, headers=headers)


def augmented(api: Api, table: pa.Table, **params: Any) -> pa.Table:
    answer = post(api, table, **params)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, ARROW_STREAM), answer.text
    return read_table(answer.content)


def post_json(api: Api, **body: Any) -> Any:
    return api.http.post(PATH, json={"fms": ["f"], **body})


IDS = ["e15", "e3", "e25", "nobody", "e3", "e0", "é✓"]
LOGITS = [15.0, 3.0, None, None, 3.0, 0.0, None]


def test_rows_come_back_in_their_order_with_repeats_and_columns_appended(scored: Api) -> None:
    table = mine(IDS, label=[True, None, False, True, None, True, False])

    found = augmented(scored, table, embedding_format="float32")

    assert found.column_names == [*table.column_names, *ADDED]
    assert found.select(table.column_names).equals(table)
    assert found["f__click__logit"].to_pylist() == LOGITS
    assert found["f__hidden"].to_pylist() == [None if logit is None else [logit, -logit] for logit in LOGITS]


def test_statuses_are_those_of_lookup(scored: Api) -> None:
    found = augmented(scored, mine(IDS))["f__status"].to_pylist()

    looked_up = [row["f__status"] for row in scored.lookup(IDS)]
    assert found[0] == looked_up[0] == "present"
    assert found[1] == "present"  # from the table; its online value has expired
    assert [status in {"pending", "missing"} for status in found] == [logit is None for logit in LOGITS]


def test_the_callers_columns_are_left_out_on_request(scored: Api) -> None:
    found = augmented(scored, mine(IDS, f__status=["mine"] * 7), columns="supervision", outputs="click")

    assert found.column_names == ADDED[:-1]
    assert found["f__click__logit"].to_pylist() == LOGITS


def test_an_answer_ends_with_its_marker_and_counts_its_rows(scored: Api) -> None:
    content = post(scored, mine(IDS * 3)).content

    batches = list(pa.ipc.open_stream(content))
    reader = pa.ipc.open_stream(content)
    stated = [reader.read_next_batch_with_custom_metadata()[1] for _ in batches]
    assert content.endswith(END_OF_STREAM)
    assert stated[-1] is not None
    assert stated[-1][b"das_rows"] == b"21"


def test_json_rows_come_back_as_json(scored: Api) -> None:
    rows = [
        {"example_id": "e15", "event_time": "2026-03-01T12:00:00Z", "label": 1, "tags": ["a", None], "note": "x"},
        {"example_id": "e3", "event_time": "2026-03-01T13:00:00+01:00", "more": {"nested": [1, 2]}, "rate": 0.5},
        {"example_id": "nobody", "event_time": "2026-03-01T12:00:00Z", "label": None},
    ]

    answer = post_json(scored, rows=rows, outputs=["click"])

    assert (answer.status_code, answer.headers["Content-Type"]) == (200, JSON), answer.text
    absent = dict.fromkeys(["label", "tags", "note", "more", "rate"])
    added = {**ALL, "f__trained_through": "2026-01-01T00:00:00Z"}
    nothing = {**dict.fromkeys(added), "f__status": answer.json()["rows"][2]["f__status"], "f__click__logit": None}
    time = "2026-03-01T12:00:00Z"
    assert answer.json() == {
        "rows": [
            {**absent, **rows[0], **added, "f__click__logit": 15.0},
            {**absent, **rows[1], "event_time": time, **added, "f__click__logit": 3.0},
            {**absent, **rows[2], **nothing},
        ]
    }


def test_an_arrow_table_is_answered_as_json_on_request(scored: Api) -> None:
    table = mine(
        ["e3", "e3"], tags=[["a"], None], rate=[float("nan"), 0.5], day=[datetime(2026, 3, 1, tzinfo=UTC).date()] * 2
    )

    answer = post(scored, table, headers={"Accept": JSON}, outputs="click")

    assert answer.status_code == 200, answer.text
    rows = answer.json()["rows"]
    assert [(row["tags"], row["rate"], row["day"], row["f__click__logit"]) for row in rows] == [
        (["a"], None, "2026-03-01", 3.0), (None, 0.5, "2026-03-01", 3.0),
    ]  # fmt: skip


def test_an_answer_that_is_too_large_as_json_is_413_and_names_what_is_smaller(settings: Settings) -> None:
    with serve(settings.model_copy(update={"max_answer_bytes": 1024 * 1024})) as api:
        api.declare()
        api.declare_fm()
        wide = mine(["e3"] * 1000, note=["x" * 100] * 1000)

        answer = post(api, wide, headers={"Accept": JSON})

        assert_problem(answer, 413, "answer_too_large", "Accept", "columns=supervision")
        assert len(post(api, wide, headers={"Accept": JSON}, columns="supervision").json()["rows"]) == 1000
        assert_problem(post(api, mine(["e3"] * 100_000), headers={"Accept": JSON}), 413, "answer_too_large")


def test_json_rows_are_answered_as_arrow_on_request(scored: Api) -> None:
    rows = [{"example_id": name, "event_time": "2026-03-01T12:00:00Z"} for name in IDS]
    body = json.dumps({"fms": ["f"], "rows": rows, "columns": "supervision"})

    answer = scored.http.post(PATH, content=body, headers={"Content-Type": JSON, "Accept": ARROW_STREAM})

    assert read_table(answer.content)["f__click__logit"].to_pylist() == LOGITS


def test_several_fms_stand_beside_each_other(scored: Api) -> None:
    scored.declare_fm("g")

    found = augmented(scored, mine(["e3", "e4"]), fms="g,f", columns="supervision")

    assert found.column_names == ["g__status", *ADDED]
    assert found["g__status"].to_pylist() == ["missing", "missing"]


def test_a_freshness_gap_makes_rows_stale(scored: Api) -> None:
    found = augmented(scored, mine(["e3", "e15"]), max_freshness_gap_seconds=3600)

    assert found["f__status"].to_pylist() == ["stale", "stale"]


@pytest.mark.parametrize("rows_each", [[], [0], [0, 3, 0, 0, 2, 0]], ids=["no batch", "an empty batch", "among others"])
def test_empty_tables_and_batches_are_served(scored: Api, rows_each: list[int]) -> None:
    table = mine([f"e{i}" for i in range(sum(rows_each))])
    sink = pa.BufferOutputStream()
    start = 0
    with pa.ipc.new_stream(sink, table.schema) as writer:
        for size in rows_each:
            batch = pa.RecordBatch.from_arrays(
                [column.combine_chunks().slice(start, size) for column in table.columns], schema=table.schema
            )
            writer.write_batch(batch)
            start += size

    found = read_table(post(scored, sink.getvalue().to_pybytes()).content)

    assert found.column_names == [*table.column_names, *ADDED]
    assert found["row"].to_pylist() == list(range(sum(rows_each)))
    assert found["f__click__logit"].to_pylist() == [float(i) for i in range(sum(rows_each))]


def test_no_json_rows_are_no_json_rows(scored: Api) -> None:
    assert post_json(scored, rows=[]).json() == {"rows": []}


def test_ids_and_times_of_all_types_are_taken_and_columns_of_all_types_come_back(scored: Api) -> None:
    ids = pa.array(["e3", "e15", "e3"])
    kinds = [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.large_string())]
    times = [pa.timestamp("ms", "UTC"), pa.timestamp("s", "Asia/Kolkata"), pa.timestamp("ns", "UTC")]
    columns = {
        "words": pa.array(["a", "b", "a"]).dictionary_encode(),
        "nested": pa.array([[{"x": 1}], None, []]),
        "raw": pa.array([b"a", None, b"c"]),
        "none": pa.nulls(3),
        "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())),
    }
    for kind, unit in zip(kinds, times, strict=True):
        table = mine(["e3"] * 3, **columns)
        table = table.set_column(2, "example_id", ids.cast(kind))
        table = table.set_column(1, "event_time", table["event_time"].cast(unit))

        found = augmented(scored, table)

        assert found.select(table.column_names).equals(table)
        assert found["f__click__logit"].to_pylist() == [3.0, 15.0, 3.0]


def test_dictionaries_that_change_from_batch_to_batch_come_back(scored: Api) -> None:
    parts = [mine([f"e{i}"], word=pa.array([word]).dictionary_encode()) for i, word in enumerate("abcab")]
    body = arrow_body(pa.concat_tables(parts))

    found = read_table(post(scored, body).content)

    assert found["word"].to_pylist() == list("abcab")
    assert found["f__click__logit"].to_pylist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_two_hundred_thousand_rows_are_one_answer(scored: Api, compression: str) -> None:
    numbers = np.random.default_rng(0).integers(0, 30, 200_000)
    body = arrow_body(mine([f"e{i}" for i in numbers]), compression=compression)

    found = read_table(post(scored, body).content)

    assert found["row"].to_numpy().tolist() == list(range(200_000))
    assert found["f__click__logit"].to_pylist() == [float(i) if i < 20 else None for i in numbers]


def test_the_buffers_of_a_long_table_are_given_back_once_no_table_is_joined(
    scored: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay from window to window and from request to request, as long as these follow each other."""
    kept: list[int] = []

    def cleared(pool: BufferPool) -> None:
        kept.append(pool.free_bytes)
        clear(pool)
        kept.append(pool.free_bytes)

    clear = BufferPool.clear
    monkeypatch.setattr(BufferPool, "clear", cleared)
    num_rows = 300_000  # of eight bytes and more: longer than what is taken from malloc

    found = augmented(scored, mine([f"e{i % 10}" for i in range(num_rows)]), columns="supervision")

    assert found["f__click__logit"].to_pylist() == [float(i % 10) for i in range(num_rows)]
    assert kept[0] > 8 * num_rows
    assert kept[1:] == [0]


# ---- bad input


def is_served(api: Api, spools: Path) -> None:
    """The next request is served, and no table of an earlier one is held."""
    assert augmented(api, mine(["e3"]))["f__click__logit"].to_pylist() == [3.0]
    assert held_spools(spools) == []


def assert_problem(answer: Any, status: int, code: str, *words: str) -> dict[str, Any]:
    assert answer.headers["Content-Type"] == "application/problem+json", answer.text
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["status"], body["code"]) == (status, status, code), body
    assert [word for word in words if word not in body["detail"]] == [], body
    return body


def changed(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


GOOD = mine(["e1", "e2", "e3"])
NULLS_LAST = pa.array([NOON, NOON, None], TIMESTAMP)
TABLES: list[tuple[str, pa.Table, str, tuple[str, ...]]] = [
    ("no example_id", GOOD.drop_columns(["example_id"]), "schema_mismatch", ("example_id", "missing")),
    ("no event_time", GOOD.drop_columns(["event_time"]), "schema_mismatch", ("event_time", "missing")),
    ("no column", pa.table({}), "schema_mismatch", ("example_id", "event_time")),
    ("integer ids", changed(GOOD, "example_id", pa.array([1, 2, 3])), "schema_mismatch", ("int64", "string")),
    ("binary ids", changed(GOOD, "example_id", pa.array([b"a"] * 3)), "schema_mismatch", ("example_id", "binary")),
    (
        "naive times", changed(GOOD, "event_time", GOOD["event_time"].cast(pa.timestamp("us"))), "schema_mismatch",
        ("event_time", "without a time zone"),
    ),
    ("text times", changed(GOOD, "event_time", pa.array(["2026"] * 3)), "schema_mismatch", ("event_time", "string")),
    ("dates", changed(GOOD, "event_time", GOOD["event_time"].cast(pa.date32())), "schema_mismatch", ("date32",)),
    ("null times", changed(GOOD, "event_time", NULLS_LAST), "invalid_rows", ("event_time is null", "row 2")),
    ("null ids", changed(GOOD, "example_id", pa.array(["a", None, None])), "invalid_rows", ("2 rows", "row 1")),
    (
        "nanoseconds", changed(GOOD, "event_time", pa.array([0, 1, 0], pa.timestamp("ns", "UTC"))), "invalid_rows",
        ("finer than a microsecond", "row 1"),
    ),
    (
        "year 300000", changed(GOOD, "event_time", pa.array([0, 2**62, 0], pa.timestamp("s", "UTC"))), "invalid_rows",
        ("years 1 to 9999", "row 1"),
    ),
    ("collision", GOOD.append_column("f__hidden", pa.nulls(3)), "schema_mismatch", ("f__hidden", "rename yours")),
    ("status", GOOD.append_column("f__status", pa.nulls(3)), "schema_mismatch", ("f__status",)),
    ("twice", GOOD.append_column("row", pa.nulls(3)), "schema_mismatch", ("row", "twice")),
]  # fmt: skip


@pytest.mark.parametrize(("table", "code", "words"), [t[1:] for t in TABLES], ids=[t[0] for t in TABLES])
def test_a_table_that_can_not_be_joined_is_told_why(
    scored: Api, spools: Path, table: pa.Table, code: str, words: tuple[str, ...]
) -> None:
    answer = post(scored, table)

    assert_problem(answer, 422, code, *words)
    is_served(scored, spools)


def test_a_bad_row_in_the_last_of_many_batches_is_told_before_the_answer_starts(scored: Api, spools: Path) -> None:
    times = pa.array([NOON_US] * 99_999 + [None], pa.int64()).cast(TIMESTAMP)
    table = changed(mine([f"e{i}" for i in range(100_000)]), "event_time", times)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)

    answer = post(scored, sink.getvalue().to_pybytes())

    assert_problem(answer, 422, "invalid_rows", "1 rows", "row 99999")
    is_served(scored, spools)


def repeated(value: str, times: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int8()), pa.array([value]))


LONG = repeated("x" * 1_000_000, 20)
SHARING: list[tuple[str, pa.Array, int, str]] = [
    ("dictionary", LONG, 413, "answer_too_large"),
    ("dictionaries in objects", pa.StructArray.from_arrays([LONG], ["text"]), 413, "answer_too_large"),
    ("nulls in a list", pa.ListArray.from_arrays([0, 3_000_000] + [3_000_000] * 19, pa.nulls(3_000_000)), 413,
     "answer_too_large"),
    ("runs", pa.RunEndEncodedArray.from_arrays([20], ["x"]), 422, "not_json"),
    ("list views", pa.array([[1]] * 20, pa.list_view(pa.int64())), 422, "not_json"),
    ("numbers in a dictionary", pa.array([0.5] * 20).dictionary_encode(), 422, "not_json"),
    ("a key twice", pa.StructArray.from_arrays([pa.array([1] * 20)] * 2, ["a", "a"]), 422, "not_json"),
    ("year 292277", pa.array([2**62] * 20, pa.timestamp("us")), 422, "not_json"),
    ("zone nowhere", pa.array([0] * 20, pa.timestamp("us", "No/Where")), 422, "not_json"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "status", "code"), [s[1:] for s in SHARING], ids=[s[0] for s in SHARING])
def test_columns_that_json_can_not_give_back_are_told_and_come_back_as_arrow(
    scored: Api, spools: Path, column: pa.Array, status: int, code: str
) -> None:
    table = mine(["e3"] * 20, own=column)

    assert_problem(post(scored, table, headers={"Accept": JSON}), status, code, "Arrow", "columns=supervision")
    assert post(scored, table, headers={"Accept": JSON}, columns="supervision").status_code == 200
    assert augmented(scored, table)["own"].combine_chunks().equals(column)
    is_served(scored, spools)


@pytest.mark.parametrize("wrap", [lambda own: own, lambda own: {"more": [own]}], ids=["rows", "objects"])
def test_json_rows_with_a_key_of_its_own_each_are_413(scored: Api, spools: Path, wrap: Any) -> None:
    keys = ({"example_id": "e1", "event_time": "2026-03-01T12:00:00Z", **wrap({f"k{i}": None})} for i in range(6_000))

    assert_problem(post_json(scored, rows=list(keys)), 413, "too_large", "columns of their own")
    is_served(scored, spools)


NAMES: list[tuple[str, dict[str, Any], int, str, str]] = [
    ("unknown fm", {"fms": "f,nope"}, 404, "unknown_fm", "nope"),
    ("no fm", {"fms": ""}, 422, "invalid_body", "fms"),
    ("unknown task", {"outputs": "click,nope"}, 422, "unknown_output", "nope"),
    ("unknown embedding", {"outputs": "nope"}, 422, "unknown_output", "hidden"),
    ("unknown format", {"embedding_format": "float64"}, 400, "malformed", "embedding_format"),
    ("unknown columns", {"columns": "mine"}, 400, "malformed", "columns"),
    ("gap that is none", {"max_freshness_gap_seconds": "nan"}, 400, "malformed", "max_freshness_gap_seconds"),
]


@pytest.mark.parametrize(("params", "status", "code", "word"), [n[1:] for n in NAMES], ids=[n[0] for n in NAMES])
def test_what_is_asked_for_must_be_there(
    scored: Api, spools: Path, params: dict[str, Any], status: int, code: str, word: str
) -> None:
    assert_problem(post(scored, GOOD, **params), status, code, word)
    is_served(scored, spools)


def test_an_unknown_dataset_is_404(scored: Api, spools: Path) -> None:
    path = "/v1/datasets/nope/supervision/augment"
    answer = scored.http.post(
        path, content=arrow_body(GOOD), params={"fms": "f"}, headers={"Content-Type": ARROW_STREAM}
    )

    assert_problem(answer, 404, "unknown_dataset", "nope")
    is_served(scored, spools)


BODY = arrow_body(GOOD)
BODIES: list[tuple[str, bytes, int, str]] = [
    ("empty", b"", 400, "malformed"),
    ("junk", b"junk" * 100, 400, "malformed"),
    ("no end", BODY[:-8], 400, "malformed"),
    ("cut in a batch", BODY[: len(BODY) // 2], 400, "malformed"),
    ("bytes after the end", BODY + b"\0", 400, "malformed"),
    ("parquet", b"PAR1" + b"\0" * 100 + b"PAR1", 400, "malformed"),
]


@pytest.mark.parametrize(("body", "status", "code"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_a_stream_that_is_not_whole_is_refused(scored: Api, spools: Path, body: bytes, status: int, code: str) -> None:
    assert_problem(post(scored, body), status, code)
    is_served(scored, spools)


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_a_stream_with_any_byte_damaged_is_refused_or_answered_and_never_a_defect(
    scored: Api, spools: Path, compression: str | None
) -> None:
    body = arrow_body(mine([f"e{i}" for i in range(40)]), compression=compression)
    for place in np.random.default_rng(3).integers(0, len(body), 60).tolist():
        damaged = body[:place] + bytes([body[place] ^ 0x5A]) + body[place + 1 :]

        answer = post(scored, damaged)

        assert answer.status_code in {200, 400, 413, 422}, (place, answer.text)
    is_served(scored, spools)


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Content-Type": "text/csv"}, 415, "media_type"),
        ({"Content-Type": ""}, 415, "media_type"),
        ({"Content-Encoding": "gzip"}, 415, "media_type"),
        ({"Accept": "text/csv"}, 406, "not_acceptable"),
    ],
    ids=["csv", "none", "gzip", "accept"],
)
def test_another_media_type_is_refused(
    scored: Api, spools: Path, headers: dict[str, str], status: int, code: str
) -> None:
    assert_problem(post(scored, GOOD, headers=headers), status, code)
    is_served(scored, spools)


TIME = '"event_time": "2026-03-01T12:00:00Z"'
JSON_BODIES: list[tuple[str, str, int, str]] = [
    ("no json", "{", 400, "malformed"),
    ("a list", "[]", 422, "invalid_body"),
    ("no fms", '{"rows": []}', 422, "invalid_body"),
    ("no rows", '{"fms": ["f"]}', 422, "invalid_body"),
    ("unknown member", '{"fms": ["f"], "rows": [], "filter": 1}', 422, "invalid_body"),
    ("unknown fm", '{"fms": ["nope"], "rows": []}', 404, "unknown_fm"),
    ("no id", f'{{"fms": ["f"], "rows": [{{{TIME}}}]}}', 422, "invalid_body"),
    ("null id", f'{{"fms": ["f"], "rows": [{{"example_id": null, {TIME}}}]}}', 422, "invalid_body"),
    ("a number as id", f'{{"fms": ["f"], "rows": [{{"example_id": 1, {TIME}}}]}}', 422, "invalid_body"),
    ("no time", '{"fms": ["f"], "rows": [{"example_id": "a"}]}', 422, "invalid_body"),
    (
        "naive time", '{"fms": ["f"], "rows": [{"example_id": "a", "event_time": "2026-03-01T12:00:00"}]}', 422,
        "invalid_body",
    ),
    ("collision", f'{{"fms": ["f"], "rows": [{{"example_id": "a", {TIME}, "f__status": 1}}]}}', 422, "schema_mismatch"),
    (
        "no common type",
        f'{{"fms": ["f"], "rows": [{{"example_id": "a", {TIME}, "x": 1}}, {{"example_id": "a", {TIME}, "x": "b"}}]}}',
        422, "invalid_body",
    ),
    ("huge integer", f'{{"fms": ["f"], "rows": [{{"example_id": "a", {TIME}, "x": {2**70}}}]}}', 422, "invalid_body"),
    ("half a surrogate", f'{{"fms": ["f"], "rows": [{{"example_id": "\\ud800", {TIME}}}]}}', 400, "malformed"),
    ("half in a value", f'{{"fms": ["f"], "rows": [{{"example_id": "a", {TIME}, "x": "\\ud800"}}]}}', 400, "malformed"),
    ("half in a name", f'{{"fms": ["f"], "rows": [{{"example_id": "a", {TIME}, "\\ud800": 1}}]}}', 400, "malformed"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "code"), [b[1:] for b in JSON_BODIES], ids=[b[0] for b in JSON_BODIES])
def test_a_json_body_of_another_shape_is_refused(scored: Api, spools: Path, body: str, status: int, code: str) -> None:
    answer = scored.http.post(PATH, content=body, headers={"Content-Type": JSON})

    assert_problem(answer, status, code)
    is_served(scored, spools)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_numbers_that_are_none_are_refused_or_null_and_never_a_defect(
    scored: Api, spools: Path, literal: str
) -> None:
    body = f'{{"fms": ["f"], "rows": [{{"example_id": "a", {TIME}, "x": {literal}}}]}}'

    answer = scored.http.post(PATH, content=body, headers={"Content-Type": JSON})

    assert answer.status_code in {200, 400, 422}, answer.text
    is_served(scored, spools)
