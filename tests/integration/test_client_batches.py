"""The client's reader of batches over a real socket: what breaks on the way costs no row and repeats none."""

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pyarrow as pa
import pytest

from das_service.client import BatchReader, Client, DasClientError
from tests.served import serve_over_tcp
from tests.training import Trained, expected_order

# One kind of server is enough: the rows come from tables.
pytestmark = pytest.mark.parametrize("shared_server", ["valkey"], indirect=True)


def ids_of(reader: BatchReader) -> list[str]:
    return [name for batch in reader for name in batch.rows.column("example_id").to_pylist()]


@contextmanager
def cutting_proxy(port: int, chance: random.Random) -> Iterator[int]:
    """A port that hands bytes on to another and drops each connection after a random number of them."""
    listener = socket.create_server(("127.0.0.1", 0))
    is_over = threading.Event()
    connections: list[threading.Thread] = []

    def hand_on(source: socket.socket, target: socket.socket, most: int) -> None:
        with suppress(OSError):
            while most > 0 and (data := source.recv(min(most, 4096))):
                target.sendall(data)
                most -= len(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def connect(near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            back = threading.Thread(target=hand_on, args=(near, far, 1 << 30))
            back.start()
            hand_on(far, near, chance.randrange(200, 40_000))
            back.join()

    def serve() -> None:
        with suppress(OSError):
            while not is_over.is_set():
                connection = threading.Thread(target=connect, args=(listener.accept()[0],))
                connection.start()
                connections.append(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        is_over.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for each in (thread, *connections):
            each.join(5)


@pytest.mark.parametrize("seed", range(3))
def test_a_reader_whose_connections_break_gets_every_row_once(trained: Trained, seed: int) -> None:
    trained.close(0, 400)
    with (
        serve_over_tcp(trained.api.settings) as port,
        cutting_proxy(port, random.Random(seed)) as cut,
        Client(f"http://127.0.0.1:{cut}") as client,
    ):
        assert ids_of(client.batches("stream", fms="f", batch_rows=10)) == expected_order(trained)


def test_a_reader_goes_on_after_a_restart_of_the_service(trained: Trained) -> None:
    trained.close(0, 300)
    first = expected_order(trained)
    settings = trained.api.settings
    with serve_over_tcp(settings) as port, Client(f"http://127.0.0.1:{port}") as client:
        reader = client.batches("stream", fms="f", batch_rows=16)
        ids = [name for _ in range(3) for name in next(reader).rows.column("example_id").to_pylist()]
        cursor = reader.cursor
        reader.close()
    trained.close(300, 100)
    with serve_over_tcp(settings) as port, Client(f"http://127.0.0.1:{port}") as client:
        rest = ids_of(client.batches("stream", cursor=cursor))
        assert ids + rest == first
        more = ids_of(client.batches("stream", cursor=cursor, extend=True))
    assert sorted(ids + more) == sorted(expected_order(trained))


def test_a_follower_gets_what_closes_later(trained: Trained) -> None:
    trained.close(0, 200)
    with serve_over_tcp(trained.api.settings) as port, Client(f"http://127.0.0.1:{port}") as client:
        reader = client.batches("stream", fms="f", follow=True)
        ids = next(reader).rows.column("example_id").to_pylist()
        trained.close(200, 200)
        wanted = expected_order(trained)
        while len(ids) < len(wanted):
            ids += next(reader).rows.column("example_id").to_pylist()
        reader.close()
    assert sorted(ids) == sorted(wanted)


def test_readers_that_share_a_start_are_disjoint_and_complete(trained: Trained) -> None:
    trained.close(0, 500)
    with serve_over_tcp(trained.api.settings) as port, Client(f"http://127.0.0.1:{port}") as client:
        start = client.batches("stream", fms="f").start()
        trained.close(500, 100)
        parts = [ids_of(client.batches("stream", cursor=start, split=f"{number}/3")) for number in range(3)]
        whole = ids_of(client.batches("stream", cursor=start))
        assert client.batches("stream", cursor=start, split="0/3").start() != start
    assert sorted(parts[0] + parts[1] + parts[2]) == sorted(whole)
    assert min(map(len, parts)) > 0


def test_max_rows_ends_with_the_batch_that_reaches_it(trained: Trained) -> None:
    trained.close(0, 200)
    with serve_over_tcp(trained.api.settings) as port, Client(f"http://127.0.0.1:{port}") as client:
        reader = client.batches("stream", batch_rows=16, max_rows=20)
        assert [batch.rows.num_rows for batch in reader] == [16, 16]
        assert pa.types.is_string(
            next(iter(client.batches("stream", columns="user_id"))).rows.schema.field("user_id").type
        )


def test_a_refusal_is_told_at_once(trained: Trained) -> None:
    with serve_over_tcp(trained.api.settings) as port, Client(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(DasClientError, match="cursor can't be read") as caught:
            next(client.batches("stream", cursor="AQAA"))
        assert (caught.value.status, caught.value.code) == (400, "cursor_invalid")
