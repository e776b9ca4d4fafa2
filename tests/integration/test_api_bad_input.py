"""Whatever is wrong with a request: a problem says so, nothing is stored, and the service goes on."""

import json
import struct
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from das_service.settings import Settings
from das_service.up.embedded import find_server, free_port
from schemas.wire import ARROW_STREAM
from tests.conftest import Server
from tests.served import NOON, SPEC, Api, arrow_body, examples, examples_table, serve

JSON_HEADERS = {"Content-Type": "application/json"}
FUTURE = datetime.now(UTC) + timedelta(days=1)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server is enough: what is refused here reaches none."""
    server = Server(program=find_server(), folder=tmp_path_factory.mktemp("server"), port=free_port())
    server.start()
    yield server
    server.stop()


def assert_refused(api: Api, answer: Any, status: int, code: str) -> None:
    """A problem document with that status and code; nothing stored; a good request still works."""
    assert answer.headers["Content-Type"] == "application/problem+json"
    body = answer.json()
    assert (answer.status_code, body["status"], body["code"]) == (status, status, code), body
    assert {"type", "title", "detail", "instance", "retryable"} <= body.keys()
    assert api.logged_rows() == []
    assert api.post(examples(10_000, 1)).status_code == 202


def post_json(api: Api, content: str | bytes) -> Any:
    return api.http.post("/v1/datasets/ads/examples", content=content, headers=JSON_HEADERS)


ROW_FAULTS: list[tuple[str, dict[str, Any], str, str]] = [
    ("nan", {"price": [float("nan")]}, "price", "not_finite"),
    ("infinity", {"price": [float("-inf")]}, "price", "not_finite"),
    ("beyond float32", {"price": [3.5e38]}, "price", "out_of_range"),
    ("far beyond float32", {"price": [-1e300]}, "price", "out_of_range"),
    ("null id", {"example_id": pa.array([None], pa.string())}, "example_id", "null"),
    ("empty id", {"example_id": [""]}, "example_id", "empty_id"),
    ("id of 257 bytes", {"example_id": ["é" * 128 + "x"]}, "example_id", "too_long"),
    ("null time", {"event_time": pa.array([None], pa.timestamp("us", "UTC"))}, "event_time", "null"),
    ("future", {"event_time": pa.array([FUTURE], pa.timestamp("us", "UTC"))}, "event_time", "time_in_future"),
    ("year 0", {"event_time": pa.array([-(2**62)], pa.timestamp("us", "UTC"))}, "event_time", "time_too_old"),
    ("year 300000", {"event_time": pa.array([2**62], pa.timestamp("s", "UTC"))}, "event_time", "time_in_future"),
    ("nanosecond", {"event_time": pa.array([1001], pa.timestamp("ns", "UTC"))}, "event_time", "inexact_time"),
    ("null price", {"price": pa.array([None], pa.float64())}, "price", "null"),
    ("null category", {"user_id": pa.array([None], pa.string())}, "user_id", "null"),
    ("long list", {"tags": pa.array([["a"] * 4], pa.list_(pa.string()))}, "tags", "too_long"),
    ("null in list", {"tags": pa.array([["a", None]], pa.list_(pa.string()))}, "tags", "null_element"),
    ("vector of 3", {"image": pa.array([[1, 2, 3]], pa.list_(pa.float32()))}, "image", "wrong_size"),
    ("fixed vector of 5", {"image": pa.array([[1] * 5], pa.list_(pa.float32(), 5))}, "image", "wrong_size"),
    ("null in vector", {"image": pa.array([[1, 2, 3, None]], pa.list_(pa.float32(), 4))}, "image", "null_element"),
    ("nan in vector", {"image": pa.array([[1, 2, 3, float("nan")]], pa.list_(pa.float32(), 4))}, "image", "not_finite"),
]


@pytest.mark.parametrize(("columns", "column", "code"), [f[1:] for f in ROW_FAULTS], ids=[f[0] for f in ROW_FAULTS])
def test_a_bad_value_is_refused_by_row_with_its_reason(
    api: Api, columns: dict[str, Any], column: str, code: str
) -> None:
    answer = api.post(examples_table(0, 1, **columns))

    (error,) = answer.json()["errors"]
    assert (error["row"], error["column"], error["code"]) == (0, column, code)
    assert_refused(api, answer, 422, "invalid_rows")


JSON_ROW_FAULTS: list[tuple[str, dict[str, Any], str, str]] = [
    ("null id", {"example_id": None}, "example_id", "null"),
    ("half a surrogate pair", {"example_id": "\ud800"}, "example_id", "not_utf8"),
    ("no time zone", {"event_time": "2026-03-01T12:00:00"}, "event_time", "malformed_time"),
    ("a date", {"event_time": "2026-03-01"}, "event_time", "malformed_time"),
    ("february 30", {"event_time": "2026-02-30T12:00:00Z"}, "event_time", "malformed_time"),
    ("hour 25 of offset", {"event_time": "2026-02-20T12:00:00+25:00"}, "event_time", "malformed_time"),
    ("nanoseconds", {"event_time": "2026-03-01T12:00:00.123456789Z"}, "event_time", "inexact_time"),
    ("year 0 after the offset", {"event_time": "0001-01-01T00:00:00+01:00"}, "event_time", "time_too_old"),
    ("null price", {"price": None}, "price", "null"),
    ("number beyond float32", {"price": 3.5e38}, "price", "out_of_range"),
    ("integer beyond float32", {"price": 10**39}, "price", "out_of_range"),
    ("integer beyond floats", {"price": -(10**400)}, "price", "out_of_range"),
    ("integer beyond 64 bits", {"item": 2**63}, "item", "out_of_range"),
    ("long list", {"tags": ["a"] * 4}, "tags", "too_long"),
    ("null in list", {"tags": ["a", None]}, "tags", "null_element"),
    ("vector of 3", {"image": [1, 2, 3]}, "image", "wrong_size"),
    ("null in vector", {"image": [1, 2, 3, None]}, "image", "null_element"),
    ("vector beyond float32", {"image": [1, 2, 3, 1e300]}, "image", "out_of_range"),
    ("integer beyond floats in a vector", {"image": [1, 2, 3, 10**400]}, "image", "out_of_range"),
    ("infinity in a vector", {"image": [1, 2, 3, float("inf")]}, "image", "not_finite"),
]


@pytest.mark.parametrize(
    ("changes", "column", "code"), [f[1:] for f in JSON_ROW_FAULTS], ids=[f[0] for f in JSON_ROW_FAULTS]
)
def test_a_bad_json_value_is_refused_by_row(api: Api, changes: dict[str, Any], column: str, code: str) -> None:
    answer = post_json(api, json.dumps(examples(0, 1, **changes)))

    (error,) = answer.json()["errors"]
    assert (error["row"], error["column"], error["code"]) == (0, column, code)
    assert_refused(api, answer, 422, "invalid_rows")


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_numbers_that_are_none_are_refused_by_row(api: Api, literal: str) -> None:
    text = json.dumps(examples(0, 1)).replace('"price": 0.0', f'"price": {literal}')

    answer = post_json(api, text)

    assert answer.json()["errors"][0]["code"] == "not_finite"
    assert_refused(api, answer, 422, "invalid_rows")


def test_an_id_that_repeats_in_the_request_keeps_its_first_good_row(api: Api) -> None:
    table = examples_table(0, 4, example_id=["a", "b", "a", "a"], price=[float("nan"), 1.0, 2.0, 3.0])

    body = api.post(table).json()

    told = [(error["row"], error["code"]) for error in body["errors"]]
    assert told == [(0, "not_finite"), (3, "duplicate_in_request")]
    assert {row["example_id"]: row["price"] for row in api.logged_rows()} == {"a": 2.0, "b": 1.0}


def test_a_maximal_age_is_held(settings: Settings) -> None:
    with serve(settings) as api:
        api.declare(spec={**SPEC, "max_age_days": 1})
        answer = api.post(examples(0, 1))
        assert answer.json()["errors"][0]["code"] == "time_too_old"


SCHEMA_FAULTS: list[tuple[str, dict[str, Any], str, str]] = [
    ("missing column", {"price": None}, "price", "missing"),
    ("missing id", {"example_id": None}, "example_id", "missing"),
    ("unknown column", {"extra": [1]}, "extra", "unknown"),
    ("string for float", {"price": ["1.5"]}, "price", "type"),
    ("int for float", {"price": [1]}, "price", "type"),
    ("int for string", {"user_id": [1]}, "user_id", "type"),
    ("float for int", {"item": [1.0]}, "item", "type"),
    ("int32 for int64", {"item": pa.array([1], pa.int32())}, "item", "type"),
    ("naive time", {"event_time": pa.array([NOON.replace(tzinfo=None)], pa.timestamp("us"))}, "event_time", "type"),
    ("date", {"event_time": pa.array([NOON.date()])}, "event_time", "type"),
    ("string for time", {"event_time": ["2026-03-01T12:00:00Z"]}, "event_time", "type"),
    ("list of ints", {"tags": [[1]]}, "tags", "type"),
    ("no list", {"tags": ["a"]}, "tags", "type"),
    ("vector of float64", {"image": pa.array([[1.0] * 4], pa.list_(pa.float64(), 4))}, "image", "type"),
    ("binary id", {"example_id": [b"a"]}, "example_id", "type"),
    ("null column", {"price": pa.nulls(1)}, "price", "type"),
]


@pytest.mark.parametrize(
    ("columns", "column", "fault"), [f[1:] for f in SCHEMA_FAULTS], ids=[f[0] for f in SCHEMA_FAULTS]
)
def test_a_wrong_column_refuses_the_whole_request(api: Api, columns: dict[str, Any], column: str, fault: str) -> None:
    answer = api.post(examples_table(0, 1, **columns))

    assert [(item["column"], item["problem"]) for item in answer.json()["columns"]] == [(column, fault)]
    assert_refused(api, answer, 422, "schema_mismatch")


def test_all_wrong_columns_are_told_at_once(api: Api) -> None:
    answer = api.post(examples_table(0, 1, price=None, user_id=[1], extra=[1]))

    told = {(item["column"], item["problem"]) for item in answer.json()["columns"]}
    assert told == {("price", "missing"), ("user_id", "type"), ("extra", "unknown")}


def test_a_naive_time_is_told_how_to_mend_it(api: Api) -> None:
    answer = api.post(examples_table(0, 1, event_time=pa.array([NOON.replace(tzinfo=None)], pa.timestamp("us"))))

    assert "assume_timezone" in answer.json()["detail"]


def test_a_column_that_is_there_twice_refuses_the_request(api: Api) -> None:
    table = examples_table(0, 1)
    answer = api.post(table.append_column("price", table["price"]))

    assert answer.json()["columns"][0]["problem"] == "repeated"
    assert_refused(api, answer, 422, "schema_mismatch")


JSON_LIES: list[tuple[str, dict[str, Any]]] = [
    ("string for number", {"price": "1.5"}),
    ("bool for number", {"price": True}),
    ("list for number", {"price": [1.5]}),
    ("object for number", {"price": {"value": 1.5}}),
    ("number for string", {"user_id": 5}),
    ("float for integer", {"item": 1.0}),
    ("bool for integer", {"item": True}),
    ("number for time", {"event_time": 1_700_000_000}),
    ("number for id", {"example_id": 1}),
    ("string for list", {"tags": "a"}),
    ("list in list", {"tags": [["a"]]}),
    ("number in list", {"tags": [1]}),
    ("string in vector", {"image": [1, 2, 3, "4"]}),
    ("bool in vector", {"image": [1, 2, 3, True]}),
    ("unknown key", {"extra": 1}),
]


@pytest.mark.parametrize("changes", [lie[1] for lie in JSON_LIES], ids=[lie[0] for lie in JSON_LIES])
def test_json_that_lies_about_types_refuses_the_whole_request(api: Api, changes: dict[str, Any]) -> None:
    answer = api.post([*examples(0, 3), *examples(3, 1, **changes)])

    assert_refused(api, answer, 422, "schema_mismatch")


def test_a_key_that_no_json_row_has_is_a_missing_column(api: Api) -> None:
    rows = [{key: value for key, value in row.items() if key != "price"} for row in examples(0, 2)]

    answer = api.post(rows)

    assert [(item["column"], item["problem"]) for item in answer.json()["columns"]] == [("price", "missing")]
    assert_refused(api, answer, 422, "schema_mismatch")


BROKEN_JSON: dict[str, tuple[str | bytes, int, str]] = {
    "nothing": (b"", 400, "malformed"),
    "half": ('{"examples": [', 400, "malformed"),
    "no JSON": ("price=1", 400, "malformed"),
    "no UTF-8": (b'[{"example_id": "\xff"}]', 400, "malformed"),
    "100,000 lists deep": ("[" * 100_000, 400, "malformed"),
    "100,000 objects deep": ('{"examples":' * 100_000, 400, "malformed"),
    "a number of 100,000 digits": ('{"examples": [{"price": ' + "9" * 100_000 + "}]}", 400, "malformed"),
    "a key twice": ('{"examples": [{"example_id": "a", "example_id": "b"}]}', 400, "malformed"),
    "a string": ('"examples"', 422, "schema_mismatch"),
    "another object": ('{"rows": []}', 422, "schema_mismatch"),
    "no list": ('{"examples": {}}', 422, "schema_mismatch"),
    "a list of numbers": ("[1, 2]", 422, "schema_mismatch"),
    "no rows": ('{"examples": []}', 422, "empty"),
}


@pytest.mark.parametrize(("content", "status", "code"), BROKEN_JSON.values(), ids=BROKEN_JSON)
def test_broken_json_is_refused(api: Api, content: str | bytes, status: int, code: str) -> None:
    assert_refused(api, post_json(api, content), status, code)


GOOD = arrow_body(examples_table(0, 50))
EMPTY = arrow_body(examples_table(0, 1).slice(0, 0))
SCHEMA_ONLY = EMPTY[:-8]


def _without_last_batch() -> bytes:
    """Two batches and the end, cut after the first batch: pyarrow reads it without a word."""
    table = examples_table(0, 50)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=25)
        cut = sink.tell()
        writer.write_table(examples_table(50, 50))
    return sink.getvalue().to_pybytes()[:cut]


BROKEN_ARROW: Mapping[str, bytes] = {
    "nothing": b"",
    "text": b"example_id,price\n",
    "zeros": bytes(1000),
    "no end marker": GOOD[:-8],
    "half an end marker": GOOD[:-4],
    "cut in the middle": GOOD[: len(GOOD) // 2],
    "cut between batches": _without_last_batch(),
    "bytes after the end": GOOD + b"x",
    "a second stream after the end": GOOD + GOOD,
    "a schema alone": SCHEMA_ONLY,
    "the end alone": GOOD[-8:],
    "negative length": struct.pack("<Ii", 0xFFFFFFFF, -8),
    "huge length": struct.pack("<Ii", 0xFFFFFFFF, 2**31 - 1) + bytes(100),
    "a file, not a stream": b"ARROW1\0\0" + GOOD,
}


@pytest.mark.parametrize("content", BROKEN_ARROW.values(), ids=BROKEN_ARROW)
def test_broken_arrow_is_refused(api: Api, content: bytes) -> None:
    assert_refused(api, api.post(content), 400, "malformed")


def test_invalid_utf8_in_arrow_is_refused(api: Api) -> None:
    text = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())

    assert_refused(api, api.post(examples_table(0, 1, user_id=text)), 400, "malformed")


def test_an_empty_batch_is_refused(api: Api) -> None:
    assert_refused(api, api.post(EMPTY), 422, "empty")


@pytest.mark.parametrize("kind", ["text/csv", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_415(api: Api, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = api.http.post("/v1/datasets/ads/examples", content=b"a,b", headers=headers)

    assert_refused(api, answer, 415, "media_type")


def test_arrow_called_json_is_refused(api: Api) -> None:
    assert_refused(api, post_json(api, GOOD), 400, "malformed")


def test_json_called_arrow_is_refused(api: Api) -> None:
    headers = {"Content-Type": ARROW_STREAM}
    answer = api.http.post("/v1/datasets/ads/examples", json={"examples": examples(0, 1)}, headers=headers)

    assert_refused(api, answer, 400, "malformed")


def test_a_compressed_body_is_415(api: Api) -> None:
    headers = {"Content-Type": ARROW_STREAM, "Content-Encoding": "gzip"}
    answer = api.http.post("/v1/datasets/ads/examples", content=GOOD, headers=headers)

    assert_refused(api, answer, 415, "media_type")


def test_a_bad_query_parameter_is_400(api: Api) -> None:
    assert_refused(api, api.post(GOOD, on_error="ignore"), 400, "malformed")
    assert api.post(GOOD, timeout_seconds=61).status_code == 400


@pytest.mark.parametrize("dataset", ["Ads", "a" * 64, "1ads", "ads.x", "%00"])
def test_a_name_that_no_dataset_can_have_is_refused(api: Api, dataset: str) -> None:
    answer = api.http.get(f"/v1/datasets/{dataset}")
    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "application/problem+json")

    answer = api.http.put(f"/v1/datasets/{dataset}", json=SPEC)
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_name")


@pytest.mark.parametrize(
    ("method", "path", "wrong", "known"),
    [
        ("POST", "/v1/datasets/ads/examples", "on_eror", "on_error"),
        ("POST", "/v1/datasets/ads/labels", "dry-run", "on_error"),
        ("POST", "/v1/datasets/ads/supervision/lookup", "fm", "fms"),
        ("POST", "/v1/datasets/ads/supervision/augment", "outptus", "outputs"),
        ("GET", "/v1/datasets/ads/batches", "form", "from"),
        ("GET", "/v1/datasets/ads", "verbose", "no query parameters"),
    ],
)
def test_a_parameter_that_a_route_does_not_know_is_refused(
    api: Api, method: str, path: str, wrong: str, known: str
) -> None:
    answer = api.http.request(method, path, params={wrong: "x"}, headers={"Content-Type": ARROW_STREAM})
    assert_refused(api, answer, 400, "malformed")
    assert f"query.{wrong}" in answer.json()["detail"]
    assert known in answer.json()["detail"]
