"""What holds a table to augment within bounds: its size, the disk, how many there are, and callers that go away."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from das_service.door.spool import _write
from das_service.errors import DiskReserveError
from das_service.settings import Settings
from das_service.up.embedded import find_server, free_port
from schemas.wire import ARROW_STREAM, TruncatedStreamError, read_table
from tests.conftest import Server, make_settings
from tests.served import NOON, SPEC, arrow_body, serve, serve_over_tcp
from tests.spools import held_spools, wait_until

PATH = "/v1/datasets/ads/supervision/augment"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
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
    """Room for one table at a time."""
    return make_settings(server, tmp_path, spool_folder=spools, max_concurrent_augments=1, body_timeout_seconds=20.0)


def changed(settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update=changes)


@contextlib.contextmanager
def served(settings: Settings) -> Iterator[httpx.Client]:
    """The API behind a socket, with the dataset `ads` and an FM."""
    with serve_over_tcp(settings) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        assert http.put("/v1/datasets/ads", json=SPEC).is_success
        assert http.put("/v1/datasets/ads/fms/f", json={"required": True}).is_success
        yield http


@pytest.fixture
def http(settings: Settings) -> Iterator[httpx.Client]:
    with served(settings) as http:
        yield http


def table(num_rows: int, *, width: int = 8) -> pa.Table:
    """Give a table of about num_rows * (width + 20) bytes that does not compress."""
    noise = np.random.default_rng(0).bytes(num_rows * width)
    return pa.table(
        {
            "row": np.arange(num_rows),
            "example_id": [f"e{i}" for i in range(num_rows)],
            "event_time": pa.array([NOON] * num_rows, pa.timestamp("us", "UTC")),
            "noise": pa.Array.from_buffers(pa.binary(width), num_rows, [None, pa.py_buffer(noise)]),
        }
    )


def post(http: Any, body: Any) -> Any:
    return http.post(PATH, content=body, params={"fms": "f"}, headers={"Content-Type": ARROW_STREAM})


def assert_problem(answer: Any, status: int, code: str, *words: str) -> None:
    assert answer.headers["Content-Type"] == "application/problem+json", answer.text
    body = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), body
    assert [word for word in words if word not in body["detail"]] == [], body


def is_served(http: Any, spools: Path) -> None:
    """The next table is served whole, and nothing of an earlier one is held."""
    found = read_table(post(http, arrow_body(table(3))).content)
    assert (found["row"].to_pylist(), found["f__status"].to_pylist()) == ([0, 1, 2], ["missing"] * 3)
    wait_until(lambda: held_spools(spools) == [])


def connection_of(http: httpx.Client) -> socket.socket:
    """Give a plain connection with small buffers, so that neither side can send far ahead."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", http.base_url.port))
    return connection


def head(num_bytes: int) -> bytes:
    lines = [
        f"POST {PATH}?fms=f HTTP/1.1",
        "Host: das",
        f"Content-Type: {ARROW_STREAM}",
        f"Content-Length: {num_bytes}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def begin_upload(http: httpx.Client, spools: Path, body: bytes) -> socket.socket:
    """Send half of a body, and wait until the service has begun to keep it."""
    connection = connection_of(http)
    connection.sendall(head(len(body)) + body[: len(body) // 2])
    wait_until(lambda: held_spools(spools) != [])
    return connection


def test_a_table_over_the_limit_is_413_and_names_the_other_way(settings: Settings, spools: Path) -> None:
    with served(changed(settings, max_augment_bytes=MIB)) as http:
        body = arrow_body(table(60_000))

        stated = post(http, body)
        streamed = post(http, iter([body[:MIB], body[MIB:]]))

        assert_problem(stated, 413, "too_large", "1048576", "das augment", "augment_files")
        assert_problem(streamed, 413, "too_large", "das augment")
        is_served(http, spools)


def test_a_table_that_grows_over_the_limit_is_413(settings: Settings, spools: Path) -> None:
    with served(changed(settings, max_augment_bytes=MIB)) as http:
        zeros = pa.Array.from_buffers(pa.binary(1000), 2000, [None, pa.py_buffer(bytes(2_000_000))])
        answer = post(http, arrow_body(table(2000).append_column("zeros", zeros), compression="zstd"))

        assert_problem(answer, 413, "too_large", "1048576", "das augment", "augment_files")
        is_served(http, spools)


def test_a_disk_without_room_is_507(settings: Settings, spools: Path) -> None:
    with served(changed(settings, disk_reserve_bytes=1 << 60)) as http:
        answer = post(http, arrow_body(table(3)))

        assert_problem(answer, 507, "disk_reserve", str(spools))
        assert answer.headers["Retry-After"] == "30"
        assert http.get("/v1/datasets").status_code == 200
        wait_until(lambda: held_spools(spools) == [])


def test_a_write_that_finds_the_disk_full_is_507(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(DiskReserveError, match="is full"):
        _write(full, [b"a", b"b"], tmp_path, 0)


def test_a_table_beyond_the_permits_is_told_to_come_back_and_the_first_one_is_served(
    http: httpx.Client, spools: Path
) -> None:
    body = arrow_body(table(1000))
    with begin_upload(http, spools, body) as connection:
        answer = post(http, body)
        connection.sendall(body[len(body) // 2 :])
        first = connection.recv(15)

    assert_problem(answer, 429, "busy")
    assert answer.headers["Retry-After"] == "1"
    assert first == b"HTTP/1.1 200 OK"
    is_served_soon(http, spools)


def is_served_soon(http: httpx.Client, spools: Path) -> None:
    """The permit of a caller that went away is free as soon as the service has noticed."""
    wait_until(lambda: post(http, arrow_body(table(1))).status_code == 200)
    is_served(http, spools)


def test_a_caller_that_hangs_up_while_sending_leaves_nothing(http: httpx.Client, spools: Path) -> None:
    for _ in range(3):
        begin_upload(http, spools, arrow_body(table(300_000))).close()
        wait_until(lambda: held_spools(spools) == [])
        is_served_soon(http, spools)


def test_a_caller_that_stops_sending_is_408_and_leaves_nothing(settings: Settings, spools: Path) -> None:
    with served(changed(settings, body_timeout_seconds=0.2)) as http:
        body = arrow_body(table(1000))
        with connection_of(http) as connection:
            connection.sendall(head(len(body)) + body[: len(body) // 2])
            assert connection.recv(12) == b"HTTP/1.1 408"

        is_served_soon(http, spools)


def test_a_caller_that_hangs_up_while_receiving_leaves_nothing(http: httpx.Client, spools: Path) -> None:
    body = arrow_body(table(300_000, width=64))
    for _ in range(3):
        with connection_of(http) as connection:
            connection.sendall(head(len(body)) + body)
            assert connection.recv(12) == b"HTTP/1.1 200"
            assert held_spools(spools) != []
        wait_until(lambda: held_spools(spools) == [])
        is_served_soon(http, spools)


def test_a_caller_that_stops_reading_leaves_nothing(settings: Settings, spools: Path) -> None:
    with served(changed(settings, body_timeout_seconds=2.0)) as http:
        body = arrow_body(table(100_000))
        with connection_of(http) as connection:
            connection.sendall(head(len(body)) + body)
            assert connection.recv(12) == b"HTTP/1.1 200"
            wait_until(lambda: held_spools(spools) == [])
            is_served_soon(http, spools)


def test_an_answer_that_was_cut_is_told_from_a_whole_one(http: httpx.Client) -> None:
    content = post(http, arrow_body(table(200_000))).content

    assert read_table(content).num_rows == 200_000
    for cut in (8, 1000, len(content) // 2):
        with pytest.raises(TruncatedStreamError):
            read_table(content[:-cut])


def test_what_was_answered_leaves_nothing(settings: Settings, spools: Path) -> None:
    with serve(settings) as api:
        api.declare()
        api.declare_fm()
        for _ in range(3):
            assert post(api.http, arrow_body(table(1000))).status_code == 200
            assert held_spools(spools) == []


def test_a_spool_folder_that_is_not_there_is_made(settings: Settings, tmp_path: Path) -> None:
    with served(changed(settings, spool_folder=tmp_path / "not" / "there")) as http:
        is_served(http, tmp_path / "not" / "there")
