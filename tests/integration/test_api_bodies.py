"""Long bodies, which go from the socket to their place: whole however they come, and what follows them is not lost."""

import asyncio
import gc
import http.client
import itertools
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from das_service.door import door
from das_service.door.http_protocol import BoundedHttp
from das_service.routes import examples as routes
from das_service.settings import Settings
from schemas.wire import ARROW_STREAM
from tests.served import Api, arrow_body, examples_table, serve, serve_over_tcp
from tests.spools import wait_until

# One kind of server is enough: what is asked of it here, test_api_examples.py asks of both.
pytestmark = pytest.mark.parametrize("shared_server", ["valkey"], indirect=True)

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
    with serve_over_tcp(api.settings.model_copy(update={"body_timeout_seconds": 4.0})) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(head(body) + body[:200_000])
            assert answers(connection, 1) == [408]
            assert connection.recv(10) == b""
        assert users(api) == {}
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(head(body))
            for at in range(0, len(body), len(body) // 5):  # 6 to 7 s in all
                time.sleep(1.3)
                connection.sendall(body[at : at + len(body) // 5])
            assert answers(connection, 1) == [202]


def test_a_long_body_may_take_longer_than_the_wait_for_its_next_piece(api: Api) -> None:
    body = rows(0, 4_000)
    with (
        serve_over_tcp(api.settings.model_copy(update={"body_timeout_seconds": 0.9})) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        connection.sendall(head(body))
        for at in range(0, len(body), len(body) // 40):
            time.sleep(0.05)
            connection.sendall(body[at : at + len(body) // 40])
        assert answers(connection, 1) == [202]


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """What was given to bodies as their place."""
    made: list[weakref.ref[Any]] = []

    class Numpy:
        uint8 = np.uint8

        @staticmethod
        def empty(*given: Any) -> Any:
            place = np.empty(*given)
            made.append(weakref.ref(place))
            return place

    monkeypatch.setattr(door, "np", Numpy)
    return made


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def is_freed(places: list[weakref.ref[Any]]) -> bool:
    return all(place() is None for place in places)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("end", ["taken", "damaged", "unknown"])
def test_a_connection_does_not_keep_the_body_that_came_on_it(
    port: int, places: list[weakref.ref[Any]], end: str
) -> None:
    body = rows(0, 4_000)
    sent = head(body) + body
    if end == "damaged":
        sent = sent[:-100] + b"x" * 100
    elif end == "unknown":
        sent = sent.replace(b"/ads/", b"/one/", 1)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for at in range(0, len(sent), 100_000):
            connection.sendall(sent[at : at + 100_000])
            time.sleep(0.01)
        assert answers(connection, 1) == [{"taken": 202, "damaged": 400, "unknown": 404}[end]]
        assert len(places) == 1, "the body came in pieces"
        wait_until(lambda: is_freed(places))


@pytest.mark.usefixtures("no_collector")
def test_a_wait_for_scores_does_not_keep_a_long_body(
    port: int, places: list[weakref.ref[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait(*_: Any, **__: Any) -> bool:
        wait_until(lambda: is_freed(places))  # the thread that stored the rows is on its way out
        return True

    monkeypatch.setattr(routes, "wait_until_scored", wait)
    body = rows(0, 4_000)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head(body).replace(b"/examples ", b"/examples?wait=scored ") + body)
        assert answers(connection, 1) == [200]
    assert len(places) == 1


@pytest.mark.usefixtures("no_collector")
def test_a_request_that_is_answered_is_gone_without_the_collector(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cycles: list[weakref.ref[RequestResponseCycle]] = []
    real = BoundedHttp.on_headers_complete

    def note(http: BoundedHttp) -> None:
        real(http)
        cycles.append(weakref.ref(http.cycle))

    monkeypatch.setattr(BoundedHttp, "on_headers_complete", note)
    for _ in range(20):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("POST", EXAMPLES, rows(0, 1), {"Content-Type": ARROW_STREAM})
        assert connection.getresponse().status == 202
        connection.close()

    wait_until(lambda: sum(cycle() is not None for cycle in cycles) <= 1)
    assert len(cycles) == 20


def test_a_body_that_is_whole_before_it_is_asked_for_is_taken_and_the_connection_goes_on(
    api: Api, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    real = BoundedHttp.connection_made

    def note(http: BoundedHttp, transport: asyncio.Transport) -> None:
        loops.append(http.loop)
        real(http, transport)

    monkeypatch.setattr(BoundedHttp, "connection_made", note)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for first in (0, 500, 1_000):
            body = rows(first, 500)
            assert 65_536 < len(body) < 150_000  # one read of the server
            wait_until(lambda: bool(loops))
            loops[0].call_soon_threadsafe(time.sleep, 0.3)
            time.sleep(0.1)
            connection.sendall(head(body) + body)
            assert answers(connection, 1) == [202]

    assert len(users(api)) == 1_500


@pytest.mark.parametrize("after", [b"garbage\r\n\r\n", b"\r\n", b"GET /hea"])
@pytest.mark.parametrize("at_once", [False, True])
def test_what_follows_the_last_body_of_a_connection_is_left_unread(
    api: Api, port: int, after: bytes, *, at_once: bool
) -> None:
    body = rows(0, 4_000)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head(body, "Connection: close") + body + (after if at_once else b""))
        if not at_once:
            time.sleep(0.02)
            connection.sendall(after)
        assert answers(connection, 1) == [202]

    assert len(users(api)) == 4_000


def test_a_length_of_thousands_of_digits_is_read(api: Api, port: int) -> None:
    body = rows(0, 4_000)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head(body, length=f"Content-Length: {len(body):05000d}") + body)
        assert answers(connection, 1) == [202]
        connection.sendall(head(body, length=f"Content-Length: {10**18}"))
        assert answers(connection, 1) == [413]

    assert len(users(api)) == 4_000


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
