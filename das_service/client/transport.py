"""httpx over the standard library's HTTP/1.1: for the same answers a sixth of the CPU of httpcore.

An answer of a gigabyte costs httpcore 0.66 s of copies and events, `http.client` 0.10 s (measured over loopback), and a
trainer reads little else. TLS and proxies stay with httpx's own transport.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.request import getproxies, proxy_bypass

import httpx

_PIECE_BYTES = 256 * 1024
_MOST_IDLE = 64


def plain_transport(url: str) -> "PlainTransport | None":
    """Give the transport for a service at this address; None where httpx's own is needed."""
    parsed = httpx.URL(url)
    proxies = getproxies()
    is_proxied = ("http" in proxies or "all" in proxies) and not proxy_bypass(parsed.host)
    return None if parsed.scheme != "http" or is_proxied else PlainTransport()


class PlainTransport(httpx.BaseTransport):
    """Connections to services, kept while they are good. Threads share it, and so may processes that are forked."""

    def __init__(self) -> None:
        self._idle: deque[tuple[tuple[str, int], HTTPConnection]] = deque()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request whose body is in memory, and give the answer, its body yet to be read.

        A kept connection that the service has closed is replaced: every call of the service may be sent twice.

        Raises:
            httpx.TransportError: As httpx's own transport says it.
        """
        seconds = request.extensions.get("timeout", {})
        address = (request.url.host, request.url.port or 80)
        while (kept := self._take(address)) is not None:
            with contextlib.suppress(httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                return self._answer(kept, request, address, seconds)
        return self._answer(_connect(address, seconds.get("connect"), request), request, address, seconds)

    def _answer(
        self,
        connection: HTTPConnection,
        request: httpx.Request,
        address: tuple[str, int],
        seconds: dict[str, float | None],
    ) -> httpx.Response:
        try:
            answer = _exchange(connection, request, seconds)
            head = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.getheaders()]
            body = _Body(self, connection, answer, address, request)
            return httpx.Response(answer.status, headers=head, stream=body)
        except BaseException:
            connection.close()
            raise

    def _take(self, address: tuple[str, int]) -> HTTPConnection | None:
        if os.getpid() != self._pid:  # they are the parent's, who goes on using them, and so is the lock
            self._idle, self._lock, self._pid = deque(), threading.Lock(), os.getpid()
        with self._lock:
            for kept in reversed(self._idle):
                if kept[0] == address:
                    self._idle.remove(kept)
                    return kept[1]
        return None

    def keep(self, address: tuple[str, int], connection: HTTPConnection) -> None:
        """Take back a connection whose answer was read to its end."""
        with self._lock:
            self._idle.append((address, connection))
            surplus = [self._idle.popleft()[1] for _ in range(len(self._idle) - _MOST_IDLE)]
        for old in surplus:
            old.close()

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with self._lock:
            idle = [connection for _, connection in self._idle]
            self._idle.clear()
        for connection in idle:
            connection.close()


def _connect(address: tuple[str, int], seconds: float | None, request: httpx.Request) -> HTTPConnection:
    connection = HTTPConnection(*address, timeout=seconds)
    try:
        connection.connect()
    except TimeoutError as error:
        raise httpx.ConnectTimeout(str(error), request=request) from error
    except OSError as error:
        raise httpx.ConnectError(str(error), request=request) from error
    return connection


def _exchange(connection: HTTPConnection, request: httpx.Request, seconds: dict[str, float | None]) -> HTTPResponse:
    """Send the request and give the answer's head. A refusal may come before the whole body is sent.

    The body goes in pieces, since each may take as long as the caller waits for one.
    """
    body = memoryview(b"".join(request.stream))  # type: ignore[arg-type] # of one piece: that piece
    pieces = [body[at : at + _PIECE_BYTES] for at in range(0, len(body), _PIECE_BYTES)]
    unsent: OSError | None = None
    try:
        connection.sock.settimeout(seconds.get("write"))
        connection.putrequest(
            request.method, request.url.raw_path.decode("ascii"), skip_host=True, skip_accept_encoding=True
        )
        for name, value in request.headers.raw:
            connection.putheader(name, value)
        connection.endheaders(pieces)
    except ValueError as error:  # what no header can hold
        raise httpx.LocalProtocolError(str(error), request=request) from error
    except TimeoutError as error:
        raise httpx.WriteTimeout(str(error), request=request) from error
    except OSError as error:
        unsent = error
    with _told(request, unsent):
        connection.sock.settimeout(seconds.get("read"))
        return connection.getresponse()


class _Body(httpx.SyncByteStream):
    """The body of an answer; its connection is kept if it is read to its end, else closed."""

    def __init__(
        self,
        transport: PlainTransport,
        connection: HTTPConnection,
        answer: HTTPResponse,
        address: tuple[str, int],
        request: httpx.Request,
    ) -> None:
        self._transport = transport
        self._connection = connection
        self._answer = answer
        self._address = address
        self._request = request
        self._is_whole = False

    def __iter__(self) -> Iterator[bytes]:
        with _told(self._request):
            while piece := self._answer.read1(_PIECE_BYTES):
                yield piece
        if self._answer.length:
            raise httpx.RemoteProtocolError(
                f"the answer ended {self._answer.length} bytes too soon", request=self._request
            )
        self._is_whole = True

    def close(self) -> None:
        if self._is_whole and not self._answer.will_close:
            self._answer.close()
            self._transport.keep(self._address, self._connection)
        else:
            self._answer.close()
            self._connection.close()


@contextlib.contextmanager
def _told(request: httpx.Request, unsent: OSError | None = None) -> Iterator[None]:
    """Raise what httpx's own transport raises."""
    try:
        yield
    except TimeoutError as error:
        raise httpx.ReadTimeout(str(error), request=request) from error
    except HTTPException as error:
        raise httpx.RemoteProtocolError(str(error) or type(error).__name__, request=request) from error
    except OSError as error:
        if unsent is not None:
            raise httpx.WriteError(str(unsent), request=request) from unsent
        raise httpx.ReadError(str(error), request=request) from error
