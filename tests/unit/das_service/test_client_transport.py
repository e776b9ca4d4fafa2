"""The client's transport against sockets that answer as they please; httpx's own transport is the judge of errors."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import httpx
import pytest

from das_service.client.transport import PlainTransport, plain_transport

Script = Callable[[socket.socket], None]
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Two: a\r\nX-Two: b\r\n\r\nhello"


@contextmanager
def server(*scripts: Script) -> Iterator[str]:
    """Serve each connection by its script, in the order in which they come; give the address."""

    def serve(script: Script, connection: socket.socket) -> None:
        with connection:
            script(connection)

    with closing(socket.create_server(("127.0.0.1", 0))) as listening, ThreadPoolExecutor(8) as threads:

        def accept() -> None:
            for done in [threads.submit(serve, script, listening.accept()[0]) for script in scripts]:
                done.result()

        accepting = threads.submit(accept)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        accepting.result(10)


def read_request(connection: socket.socket) -> bytes:
    """Read a request whole: the head, and as much of a body as it says."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0
    )
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def answers(*said: bytes, asked: list[bytes] | None = None) -> Script:
    """Answer one request after the other."""

    def run(connection: socket.socket) -> None:
        for one in said:
            request = read_request(connection)
            if asked is not None:
                asked.append(request)
            connection.sendall(one)

    return run


@pytest.fixture(params=["plain", "httpx"])
def transport(request: pytest.FixtureRequest) -> httpx.BaseTransport:
    return PlainTransport() if request.param == "plain" else httpx.HTTPTransport()


def client_of(transport: httpx.BaseTransport, *, seconds: float = 10.0) -> httpx.Client:
    return httpx.Client(transport=transport, timeout=seconds)


def test_answers_are_read_over_one_connection_that_is_kept(transport: httpx.BaseTransport) -> None:
    asked: list[bytes] = []
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    empty = b"HTTP/1.1 204 No Content\r\n\r\n"
    with server(answers(WHOLE, chunked, empty, WHOLE, asked=asked)) as url, client_of(transport) as client:
        first = client.post(f"{url}/a%2Fb", params={"q": "ü"}, content=b"x" * 300_000, headers={"X-Own": "1"})
        assert (first.status_code, first.text, first.headers.get_list("x-two")) == (200, "hello", ["a", "b"])
        assert client.get(url).content == b"abcde"
        assert client.get(url).content == b""
        with client.stream("GET", url) as answer:
            assert b"".join(answer.iter_raw()) == b"hello"
    head, _, body = asked[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /a%2Fb?q=%C3%BC HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"X-Own: 1" in head
    assert head.lower().count(b"content-length") == head.lower().count(b"host:") == 1
    assert body == b"x" * 300_000


@pytest.mark.parametrize("behind", [b"", b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"])
def test_a_kept_connection_that_was_closed_meanwhile_is_replaced(behind: bytes) -> None:
    def once(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(WHOLE)

    with server(once, once) as url, client_of(PlainTransport()) as client:
        assert client.get(url).text == "hello"
        assert client.post(url, content=b"again").text == "hello"


def test_a_refusal_before_the_whole_body_is_sent_is_the_answer(transport: httpx.BaseTransport) -> None:
    def refuse(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass

    with server(refuse) as url, client_of(transport) as client:
        answer = client.post(url, content=b"x" * 30_000_000)
    assert (answer.status_code, answer.text) == (413, "big")


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"nonsense\r\n\r\n",
        b"",
    ],
)
def test_an_answer_that_is_cut_or_none_is_a_protocol_error(transport: httpx.BaseTransport, said: bytes) -> None:
    with (
        server(answers(said)) as url,
        client_of(transport) as client,
        pytest.raises(httpx.RemoteProtocolError) as caught,
    ):
        client.get(url)
    assert str(caught.value)


def test_a_slow_caller_may_send_for_longer_than_one_wait(transport: httpx.BaseTransport) -> None:
    def slowly(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        left = 12_000_000
        while left > 0:
            left -= len(connection.recv(600_000, socket.MSG_WAITALL))
            time.sleep(0.05)
        connection.sendall(WHOLE)

    with server(slowly) as url, client_of(transport, seconds=0.6) as client:
        assert client.post(url, content=b"x" * 12_000_000).text == "hello"


def test_a_header_in_latin_1_is_no_error(transport: httpx.BaseTransport) -> None:
    said = WHOLE.replace(b"X-Two: a", b"X-Two: caf\xe9")
    with server(answers(said)) as url, client_of(transport) as client:
        assert client.get(url).headers.get_list("x-two") == ["café", "b"]


def test_silence_is_a_timeout_of_its_kind(transport: httpx.BaseTransport) -> None:
    done = threading.Event()

    def silent(connection: socket.socket) -> None:
        read_request(connection)
        done.wait(10)

    def half(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(WHOLE[:-2])
        done.wait(10)

    def deaf(connection: socket.socket) -> None:
        done.wait(10)

    with server(silent, half, deaf) as url, client_of(transport, seconds=0.3) as client:
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout):
                client.get(url)
            done.set()
            done.clear()
        with pytest.raises(httpx.WriteTimeout):
            client.post(url, content=b"x" * 100_000_000)
        done.set()


def test_nobody_there_and_no_such_host_are_connect_errors(transport: httpx.BaseTransport) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
    with client_of(transport) as client:
        with pytest.raises(httpx.ConnectError):
            client.get(f"http://127.0.0.1:{port}")
        with pytest.raises(httpx.ConnectError):
            client.get("http://no-such-host.invalid")


def test_what_no_header_can_hold_is_told_before_it_is_sent(transport: httpx.BaseTransport) -> None:
    seen: list[bytes] = []
    with (
        server(lambda connection: seen.append(read_request(connection))) as url,
        client_of(transport) as client,
        pytest.raises(httpx.LocalProtocolError),
    ):
        client.get(url, headers={"X-Own": "a\r\nX-Other: b"})
    assert seen == [b""]


def test_an_answer_that_is_left_unread_is_not_kept(transport: httpx.BaseTransport) -> None:
    with server(answers(WHOLE), answers(WHOLE)) as url, client_of(transport) as client:
        with client.stream("GET", url) as answer:
            assert answer.status_code == 200
        assert client.get(url).text == "hello"


def test_threads_share_it() -> None:
    with server(*[answers(WHOLE, WHOLE)] * 4) as url, client_of(PlainTransport()) as client:
        barrier = threading.Barrier(4)
        found: list[str] = []

        def ask() -> None:
            for _ in range(2):
                barrier.wait(10)
                with client.stream("GET", url) as answer:
                    barrier.wait(10)
                    found.append(answer.read().decode())

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert found == ["hello"] * 8


def test_tls_and_proxies_are_left_to_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(plain_transport("http://das:8000"), PlainTransport)
    assert plain_transport("https://das") is None
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    assert plain_transport("http://das:8000") is None
    monkeypatch.setenv("no_proxy", "das,localhost")
    assert isinstance(plain_transport("http://das:8000"), PlainTransport)
