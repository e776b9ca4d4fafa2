"""Long bodies, which go from the socket to their place: whole however they come, and what follows them is not lost."""

import http.client
import itertools
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from das_service.settings import Settings
from schemas.wire import ARROW_STREAM
from tests.served import Api, arrow_body, examples_table, serve, serve_over_tcp
from tests.spools import wait_until

EXAMPLES = "/v1/datasets/ads/examples"
WORD = "w" * 100


def rows(first: int, count: int) -> bytes:
    """Rows of some 150 bytes, each of its own content."""
    return arrow_body(examples_table(first, count, user_id=[f"{n}{WORD}" for n in range(first, first + count)]))


def head(body: bytes, *more: str, length: str | None = None) -> bytes:
    lines = [f"POST {EXAMPLES} HTTP/1.1", "Host: x", f"Content-Type: {ARROW_STREAM}", *more]
    return "\r\n".join([*lines, length or f"Content-Length: {len(body)}", "", ""]).encode()


@pytest.fixture
def api(settings: Settings) -> Iterator[Api]:
    with serve(settings) as api:
        api.declare()
        yield api


@pytest.fixture
def port(api: Api) -> Iterator[int]:
    with serve_over_tcp(api.settings) as port:
        yield port


def answers(connection: socket.socket, count: int) -> list[int]:
    """The statuses of so many answers."""
    file = connection.makefile("rb")
    statuses = []
    for _ in range(count):
        statuses.append(int(file.readline().split()[1]))
        length = 0
        while line := file.readline().strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        file.read(length)
    return statuses


def users(api: Api) -> dict[str, str]:
    return {row["example_id"]: row["user_id"] for row in api.logged_rows()}


@pytest.mark.parametrize("piece", [30_000, 65_536, 250_000, 1_000_000, 1 << 30])
def test_bodies_are_whole_however_they_come_and_so_is_what_follows_them(api: Api, port: int, piece: int) -> None:
    sizes = [1, 300, 5_000, 20_000, 2, 9_000]  # 1 kB to 2.6 MB
    firsts = [0, *itertools.accumulate(sizes)][:-1]
    bodies = [rows(first, size) for first, size in zip(firsts, sizes, strict=True)]
    sent = b"".join(head(body) + body for body in bodies)

    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        for at in range(0, len(sent), piece):
            connection.sendall(sent[at : at + piece])
            time.sleep(0.002 if piece > 100_000 else 0)
        assert answers(connection, len(sizes)) == [202] * len(sizes)

    assert users(api) == {f"e{n}": f"{n}{WORD}" for n in range(sum(sizes))}


def test_a_long_body_is_asked_for(api: Api, port: int) -> None:
    body = rows(0, 2_000)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head(body, "Expect: 100-continue"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert answers(connection, 1) == [202]

    assert len(users(api)) == 2_000


def test_a_long_body_may_come_in_chunks(api: Api, port: int) -> None:
    body = rows(0, 2_000)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    pieces = (body[at : at + 100_000] for at in range(0, len(body), 100_000))
    connection.request("POST", EXAMPLES, pieces, {"Content-Type": ARROW_STREAM}, encode_chunked=True)
    assert connection.getresponse().status == 202
    connection.close()

    assert len(users(api)) == 2_000


def test_a_long_body_that_stops_coming_is_408_and_what_comes_now_and_then_is_waited_for(api: Api) -> None:
    body = rows(0, 4_000)
    with serve_over_tcp(api.settings.model_copy(update={"body_timeout_seconds": 2.0})) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head(body) + body[:200_000])
            assert answers(connection, 1) == [408]
            assert connection.recv(10) == b""
        assert users(api) == {}
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head(body))
            for at in range(0, len(body), len(body) // 4):  # 4 s in all
                time.sleep(1)
                connection.sendall(body[at : at + len(body) // 4])
            assert answers(connection, 1) == [202]


def test_a_caller_that_hangs_up_in_a_long_body_leaves_nothing_behind(api: Api) -> None:
    body = rows(0, 4_000)
    with serve_over_tcp(api.settings.model_copy(update={"max_concurrent_requests": 1})) as port:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(head(body) + body[:300_000])

        def is_taken() -> bool:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(head(body) + body)
                return answers(connection, 1) == [202]  # 429 as long as the permit is held

        wait_until(is_taken)

    assert len(users(api)) == 4_000


def test_a_length_that_is_said_reserves_no_memory(api: Api, port: int) -> None:
    most = api.settings.max_body_bytes
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        before = resident_bytes()
        connection.sendall(head(b"", length=f"Content-Length: {most}") + b"x" * 1000)
        time.sleep(0.5)
        assert resident_bytes() - before < most / 2


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
