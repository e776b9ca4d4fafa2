"""Callers who mean harm or know no better: each gets a problem document with the right status; others are served."""

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pyarrow as pa
import pytest

from das_service.up.embedded import find_server, free_port
from schemas.wire import ARROW_STREAM, JSON, PROBLEM_JSON
from tests.conftest import Server, make_settings
from tests.served import SPEC, Api, arrow_body, examples, serve, serve_over_tcp
from tests.spools import wait_until

EXAMPLES = "/v1/datasets/ads/examples"
LOOKUP = "/v1/datasets/ads/supervision/lookup"
FM = "/v1/datasets/ads/fms/f"
JSON_ROUTES = {
    "examples": ("POST", EXAMPLES),
    "lookup": ("POST", LOOKUP),
    "dataset": ("PUT", "/v1/datasets/new"),
    "fm": ("PUT", FM),
    "snapshot": ("POST", f"{FM}/snapshots"),
    "active": ("PUT", f"{FM}/active"),
    "replay": ("POST", "/v1/datasets/ads/dead-letters/replay"),
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One server and one API are enough: nothing that is sent here may leave a trace."""
    folder = tmp_path_factory.mktemp("hostile")
    server = Server(program=find_server(), folder=folder / "server", port=free_port())
    server.start()
    with serve(make_settings(server, folder)) as api:
        api.declare()
        api.declare_fm()
        yield api
    server.stop()


def assert_problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.headers["Content-Type"] == PROBLEM_JSON
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["status"], body["code"]) == (status, status, code), body
    return body


BROKEN_JSON: dict[str, bytes] = {
    "100,000 lists deep": b"[" * 100_000,
    "100,000 objects deep": b'{"a":' * 100_000,
    "a number of 100,000 digits": b'{"a":' + b"9" * 100_000 + b"}",
    "a key twice": b'{"fm": "f", "fm": "f"}',
    "UTF-16": '{"required": true}'.encode("utf-16"),
    "UTF-8 with a mark": b'\xef\xbb\xbf{"required": true}',
    "Latin-1": '{"é": 1}'.encode("latin-1"),
    "a control character": b'{"a": "\x00"}',
    "more after the end": b'{"required": true} x',
    "a comment": b'{"required": true /* yes */}',
    "nothing": b"",
}


@pytest.mark.parametrize(("method", "path"), JSON_ROUTES.values(), ids=JSON_ROUTES)
def test_broken_json_is_malformed_on_every_route(api: Api, method: str, path: str) -> None:
    for body in BROKEN_JSON.values():
        answer = api.http.request(method, path, content=body, headers={"Content-Type": JSON})
        assert_problem(answer, 400, "malformed")


@pytest.mark.parametrize(("method", "path"), JSON_ROUTES.values(), ids=JSON_ROUTES)
@pytest.mark.parametrize("body", [b"null", b"1", b'"a"', b"[1]", b"1e999", b"NaN", b'{"x": Infinity}'])
def test_json_of_another_shape_is_refused_on_every_route(api: Api, method: str, path: str, body: bytes) -> None:
    answer = api.http.request(method, path, content=body, headers={"Content-Type": JSON})

    assert answer.headers["Content-Type"] == PROBLEM_JSON
    assert (answer.status_code, answer.json()["code"]) in [(422, "invalid_body"), (422, "schema_mismatch")]


MANY_FAULTS: dict[str, tuple[str, str, bytes]] = {
    "features": ("PUT", "/v1/datasets/new", b'{"features": [' + b",".join([b"{}"] * 300_000) + b"]}"),
    "ids": ("POST", LOOKUP, b'{"fms": ["f"], "example_ids": [' + b",".join([b"1"] * 3_000_000) + b"]}"),
    "times": (
        "POST", LOOKUP, b'{"fms": ["f"], "example_ids": [], "event_times": [' + b",".join([b"1"] * 3_000_000) + b"]}",
    ),
    "letters": (
        "POST", "/v1/datasets/ads/dead-letters/replay",
        b'{"fm": "f", "example_ids": [' + b",".join([b"1"] * 1_000_000) + b"]}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body"), MANY_FAULTS.values(), ids=MANY_FAULTS)
def test_of_millions_of_faults_the_first_is_told(api: Api, method: str, path: str, body: bytes) -> None:
    answer = api.http.request(method, path, content=body, headers={"Content-Type": JSON})

    assert len(assert_problem(answer, 422, "invalid_body")["errors"]) <= 3


def test_a_dataset_has_a_bounded_number_of_tasks(api: Api) -> None:
    tasks = [{"name": f"t{number}", "label_window_seconds": 1} for number in range(50_000)]

    assert_problem(api.http.put("/v1/datasets/new", json={**SPEC, "tasks": tasks}), 422, "invalid_body")


@pytest.mark.parametrize("charset", ["latin-1", "utf-16", '"utf-16"', "nonsense", ""])
def test_json_in_another_charset_is_415(api: Api, charset: str) -> None:
    headers = {"Content-Type": f"application/json; charset={charset}"}
    for method, path in JSON_ROUTES.values():
        assert_problem(api.http.request(method, path, content=b"{}", headers=headers), 415, "media_type")


@pytest.mark.parametrize(
    "kind", ["application/json; charset=UTF-8", "Application/JSON;x=y", 'application/json;charset="utf-8"']
)
def test_json_in_utf_8_is_read_however_it_is_spelled(api: Api, kind: str) -> None:
    body = json.dumps(examples(0, 1, user_id="é"), ensure_ascii=False).encode()

    assert api.http.post(EXAMPLES, content=body, headers={"Content-Type": kind}).status_code == 202


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate, identity", "nonsense"])
def test_a_body_compressed_as_a_whole_is_415_on_every_route(api: Api, coding: str) -> None:
    headers = {"Content-Type": JSON, "Content-Encoding": coding}
    for method, path in JSON_ROUTES.values():
        assert_problem(api.http.request(method, path, content=b"{}", headers=headers), 415, "media_type")


NO_TIMES = [
    "1",
    1,
    1e300,
    "2026-03-01",
    "2026-03-01T12:00:00",
    "9999-12-31T23:59:59-23:59",
    "2026-03-01T12:00:00.1234567Z",
]


@pytest.mark.parametrize("text", NO_TIMES, ids=repr)
def test_a_time_of_a_lookup_is_rfc_3339_and_within_the_calendar(api: Api, text: Any) -> None:
    answer = api.http.post(LOOKUP, json={"fms": ["f"], "example_ids": ["a"], "event_times": [text]})

    assert_problem(answer, 422, "invalid_body")


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
def test_the_ends_of_time_are_looked_up_and_not_there(api: Api, unit: str) -> None:
    times = pa.array([-(2**63) + 1, 2**63 - 1, 0, None], pa.int64()).cast(pa.timestamp(unit, "UTC"))
    body = arrow_body(pa.table({"example_id": ["a", "b", "c", "d"], "event_time": times}))
    headers = {"Content-Type": ARROW_STREAM, "Accept": JSON}

    answer = api.http.post(LOOKUP, content=body, params={"fms": "f"}, headers=headers)

    assert {row["f__status"] for row in answer.json()["rows"]} <= {"missing", "pending"}


@pytest.mark.parametrize(
    "accept", ["*/*;q=0", "application/json;q=x", "text/*", "*", "a" * 5000, "é", "application/json;q=0"]
)
def test_an_accept_that_names_nothing_we_have_is_406(api: Api, accept: str) -> None:
    answer = api.http.post(EXAMPLES, json=examples(0, 1), headers={"Accept": accept.encode()})

    assert_problem(answer, 406, "not_acceptable")


def test_the_more_exact_range_of_an_accept_decides(api: Api) -> None:
    asked = {"fms": ["f"], "example_ids": ["a"]}
    for accept, kind in {
        "application/json;q=0, */*": ARROW_STREAM,
        "application/*;q=0.1, application/json;q=0": ARROW_STREAM,
        f"{ARROW_STREAM};q=0.5, application/json;q=0.6": JSON,
        " , ,": JSON,
    }.items():
        assert api.http.post(LOOKUP, json=asked, headers={"Accept": accept}).headers["Content-Type"] == kind


@pytest.mark.parametrize(
    "name", ["%E4", "ads%0A", "%F0%9F%92%A9", "ads%00", "%zz", "%2e%2e", "a" * 5000, "ads%20", "%C3%A9", "ADS"]
)
def test_a_name_that_none_can_have_is_unknown_or_can_not_be_declared(api: Api, name: str) -> None:
    for path in (f"/v1/datasets/{name}", f"/v1/datasets/ads/fms/{name}"):
        assert_problem(api.http.get(path), 404, "not_found")
        assert_problem(api.http.put(path, json={}), 422, "bad_name")


@pytest.mark.parametrize(
    "path", ["/v1/datasets/a%2Fb", "/v1/datasets/ads/", "/v1//datasets", "/v1/datasets/..%2f..%2fetc", "/%"]
)
def test_a_path_that_is_none_is_404(api: Api, path: str) -> None:
    assert_problem(api.http.get(path), 404, "not_found")
    assert_problem(api.http.put(path, json=SPEC), 404, "not_found")


@pytest.mark.parametrize(
    "uri", ["\0", "http://[", "~nobody/../..", "x" * 4096, "é", "file://host/x", "//x", "s3://", "."]
)
def test_a_snapshot_lies_where_it_may_or_nowhere(api: Api, uri: str) -> None:
    answer = api.http.post(f"{FM}/snapshots", json={"snapshot_id": "s1", "uri": uri, "sha256": "0" * 64})

    assert_problem(answer, 422, "bad_uri")


# ---- below HTTP


@pytest.fixture(scope="module")
def port(api: Api) -> Iterator[int]:
    """A socket of a service that waits 0.2 s for a head or the next piece of a body, and takes 10,000 bytes."""
    changes = {"body_timeout_seconds": 0.2, "max_body_bytes": 10_000}
    with serve_over_tcp(api.settings.model_copy(update=changes)) as port:
        yield port


def talk(port: int, sent: bytes) -> bytes:
    """Give all that comes back until the server hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(sent)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


def told(received: bytes) -> tuple[int, str]:
    """Give status and code of the one problem document that came back."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    problem = json.loads(body)
    assert int(head.split()[1]) == problem["status"]
    return problem["status"], problem["code"]


POST = f"POST {EXAMPLES} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()


@pytest.mark.parametrize(
    "sent", [b"", b"G", b"GET /health/live HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "letter", "half"]
)
def test_a_head_that_stops_coming_is_408_and_the_connection_ends(port: int, sent: bytes) -> None:
    assert told(talk(port, sent)) == (408, "head_timeout")


def test_a_second_head_that_stops_coming_ends_the_connection_too(port: int) -> None:
    first, _, second = talk(port, b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\nGET /h").partition(b"HTTP/1.1 408")

    assert first.startswith(b"HTTP/1.1 200 ")
    assert b'"code": "head_timeout"' in second


@pytest.mark.parametrize(
    "sent", [b"GET /" + b"a" * 65_600, b"GET / HTTP/1.1\r\nX: " + b"a" * 65_600], ids=["path", "header"]
)
def test_a_head_without_end_is_431(port: int, sent: bytes) -> None:
    assert told(talk(port, sent)) == (431, "head_too_large")


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    ],
    ids=["garbage", "negative length", "length and chunks", "no chunk"],
)
def test_what_is_no_http_is_400(port: int, sent: bytes) -> None:
    assert told(talk(port, sent)) == (400, "malformed")


H2C = b"Connection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n"


@pytest.mark.parametrize(
    "body",
    [b"Content-Length: 9000\r\n\r\n" + b" " * 9000, b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"],
    ids=["length", "chunks"],
)
def test_an_upgrade_is_refused_with_a_body_and_ignored_without(port: int, body: bytes) -> None:
    received = talk(port, POST + H2C + body)
    assert told(received) == (400, "malformed")
    assert b"HTTP_1_1" in received
    assert talk(port, b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + H2C + b"\r\n").startswith(b"HTTP/1.1 200 ")


def test_chunks_without_a_length_are_413_once_they_are_too_many(port: int) -> None:
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"

    assert told(talk(port, POST + b"Transfer-Encoding: chunked\r\n\r\n" + 4 * chunk)) == (413, "too_large")


def test_chunks_that_stop_coming_are_408(port: int) -> None:
    assert told(talk(port, POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n[")) == (408, "body_timeout")


def test_a_trailer_is_left_unread(port: int) -> None:
    body = b"[" + json.dumps(examples(0, 1)[0]).encode() + b"]"
    chunks = b"%x\r\n%b\r\n0\r\nContent-Type: text/csv\r\n\r\n" % (len(body), body)

    received = talk(port, POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks)

    assert received.startswith(b"HTTP/1.1 202 ")


@pytest.mark.parametrize(
    "endless",
    [b"0\r\n" + b"x: y\r\n" * 12_000, b"0\r\nx: " + b"y" * 70_000, b"1;" + b"y" * 70_000],
    ids=["lines", "line", "extension"],
)
def test_a_trailer_without_end_is_431(port: int, endless: bytes) -> None:
    go_on = b"HTTP/1.1 100 Continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert connection.recv(len(go_on)) == go_on
        connection.sendall(endless)
        received = b"".join(iter(lambda: connection.recv(65536), b""))

    assert told(received) == (431, "trailer_too_large")


def test_a_trailer_after_an_answer_ends_the_connection_too(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        with pytest.raises(ConnectionError):
            connection.sendall(b"x: y\r\n" * 10_000_000)


def test_a_caller_that_does_not_read_its_answer_is_cut_off_and_has_the_permit_until_then(api: Api) -> None:
    changes = {"body_timeout_seconds": 1.0, "max_concurrent_requests": 1}
    body = json.dumps({"fms": ["f"], "example_ids": [f"{i:0256}" for i in range(60_000)]}).encode()
    head = f"POST {LOOKUP} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
    with serve_over_tcp(api.settings.model_copy(update=changes)) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", port))
        connection.sendall(head.encode() + body)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"

        def ask() -> int:
            return httpx.post(f"http://127.0.0.1:{port}{LOOKUP}", json={"fms": ["f"], "example_ids": []}).status_code

        assert ask() == 429
        wait_until(lambda: ask() == 200)
        with contextlib.suppress(ConnectionError):
            num_bytes = 0
            while piece := connection.recv(1 << 20):
                num_bytes += len(piece)
                assert num_bytes < 60_000 * 256


def test_idle_connections_leave_others_their_turn(port: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(50)]
    try:
        assert httpx.post(f"http://127.0.0.1:{port}{EXAMPLES}", json=examples(0, 1)).status_code == 202
    finally:
        for connection in idle:
            connection.close()
