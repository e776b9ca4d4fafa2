"""What comes before there is a request: uvicorn's protocol, with bounds on a request's head and our own refusals.

uvicorn itself waits for a head for ever and keeps whatever it is sent of one, and of the trailer after the last chunk
of a body; a body has its bounds in door.py. And it keeps an answer for as long as its caller does not read. It copies
what it reads of a body four times; a long one goes straight from the socket to its place here.
"""

import asyncio
import weakref
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from das_service.door.problems import problem

MAX_HEAD_BYTES = 64 * 1024
SLOWEST_BYTES_PER_SECOND = 1024 * 1024
READ_AHEAD_BYTES = 1024 * 1024
WAKE_BYTES, WAKE_SECONDS = READ_AHEAD_BYTES // 2, 1.0
RECEIVE_INTO = "receive_into"  # in a request's state
_HAS_BODY = {b"content-length", b"transfer-encoding"}
_NO_UPGRADE = "a request with a body may ask for no upgrade: send plain HTTP/1.1 (Java: HttpClient.Version.HTTP_1_1)"


class BoundedHttp(HttpToolsProtocol):
    """One connection. A head must be whole within wait_seconds of its first byte (of the connection, the first one).

    A trailer is left unread, and so is the extension of a chunk; neither may be longer than a head. A caller that takes
    less of an answer in wait_seconds than SLOWEST_BYTES_PER_SECOND is cut off.
    """

    def __init__(self, *args: Any, wait_seconds: float, **kwargs: Any) -> None:  # noqa: ANN401 - uvicorn's own
        super().__init__(*args, **kwargs)
        self._wait_seconds = wait_seconds
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._body_bytes = 0
        self._wake_seconds = min(WAKE_SECONDS, wait_seconds / 4)
        self._woken_at = 0.0
        self._is_over = False
        self._untaken_bytes = 0
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._end_head()
        self._end_write()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Begin to wait for the head whose first byte has come."""
        super().on_message_begin()
        if self._head_timer is None:
            self._begin_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a line of the head; one of a trailer is left out."""
        if self._head_timer is not None:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request over."""
        self._end_head()
        self._unread_bytes = self._body_bytes = 0
        if self.parser.should_upgrade() and _HAS_BODY & {name for name, _ in self.headers}:
            self._refuse(400, "malformed", _NO_UPGRADE)  # the parser would take the body for the other protocol's
            return
        super().on_headers_complete()
        self.scope["state"][RECEIVE_INTO] = partial(_receive_into, weakref.ref(self), weakref.ref(self.cycle))

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._unread_bytes = 0
        if self.cycle.response_complete:
            return
        self._pieces.append(body)
        self._num_bytes += len(body)
        self._body_bytes += len(body)
        if self._num_bytes + len(self.cycle.body) > READ_AHEAD_BYTES:  # uvicorn stops the socket at each 64 KiB
            self.flow.pause_reading()
        if self._num_bytes >= WAKE_BYTES or self._is_time_to_wake():  # its end wakes the reader anyway
            self._woken_at = self.loop.time()
            self._hand_over()
            self.cycle.message_event.set()

    def _is_time_to_wake(self) -> bool:
        return self.loop.time() - self._woken_at >= self._wake_seconds

    def wake(self) -> None:
        """Let the reader of a body know, now and then, that something comes."""
        if self._is_time_to_wake():
            self._woken_at = self.loop.time()
            self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        """Hand over the rest of the body."""
        if self.cycle is not None:  # none if the first head was refused
            self._hand_over()
            super().on_message_complete()

    def receive_into(self, cycle: RequestResponseCycle, place: memoryview) -> bool:
        """Let a request's body go to its place, whose length is the stated one; its reader then gets empty pieces.

        False, and nothing is done, where that can't be or is not worth it: the body is whole already, say.
        """
        come = [bytes(cycle.body), *self._pieces]
        at = sum(map(len, come))
        if cycle is not self.cycle or not cycle.more_body or at != self._body_bytes or self.transport.is_closing():
            return False
        place[:at] = b"".join(come)
        cycle.body = bytearray()
        self._pieces, self._num_bytes = [], 0
        self.transport.set_protocol(_BodyReceiver(self, place[at:]))
        return True

    def end_body(self) -> None:
        """Go on after a body that the parser has not seen: with one that expects a head, if another may come."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._is_over = not self.cycle.keep_alive
        self.transport.set_protocol(self)
        self.on_message_complete()

    def _hand_over(self) -> None:
        """Give the reader the pieces as one `bytes`, which uvicorn hands on without a copy."""
        if self.cycle.body:
            self._pieces.insert(0, bytes(self.cycle.body))
        self.cycle.body = b"".join(self._pieces)  # type: ignore[assignment] # of a single piece: that piece
        self._pieces, self._num_bytes = [], 0

    def data_received(self, data: bytes) -> None:
        """Take what has come; a head that is still not whole may not be long, nor what is neither head nor body."""
        self._unread_bytes += len(data)
        if not self._is_over:
            super().data_received(data)
        if self._pieces and self.cycle.message_event.is_set():  # the reader that was woken takes what came with that
            self._hand_over()
        if self.transport.is_closing():
            return
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, "head_too_large", f"a request's head may have {MAX_HEAD_BYTES} bytes")
        elif self._unread_bytes > MAX_HEAD_BYTES:
            self._refuse(431, "trailer_too_large", f"what is no body may have {MAX_HEAD_BYTES} bytes")

    def pause_writing(self) -> None:
        """Begin to wait for a caller that has not taken what was written."""
        super().pause_writing()
        self._begin_write()

    def resume_writing(self) -> None:
        """Go on: it has taken it."""
        self._end_write()
        super().resume_writing()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a request without a body is answered as if it had not asked (RFC 9110, 7.8)."""

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(400, "malformed", msg)

    def _begin_head(self) -> None:
        detail = f"the request's head was not whole within {self._wait_seconds:g} s"
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self._wait_seconds, self._refuse, 408, "head_timeout", detail)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _begin_write(self) -> None:
        self._untaken_bytes = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self._wait_seconds, self._cut_slow_reader)

    def _end_write(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _cut_slow_reader(self) -> None:
        taken = self._untaken_bytes - self.transport.get_write_buffer_size()
        if taken < self._wait_seconds * SLOWEST_BYTES_PER_SECOND:
            self.transport.abort()  # close() would keep what is not taken
        else:
            self._begin_write()

    def _refuse(self, status: int, code: str, detail: str) -> None:
        """Answer, unless an answer is on its way already, and hang up."""
        self._end_head()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            answer = problem(status=status, code=code, detail=detail, instance="/", headers={"Connection": "close"})
            lines = [name + b": " + value + b"\r\n" for name, value in answer.raw_headers]
            self.transport.write(b"".join([STATUS_LINE[status], *lines, b"\r\n", bytes(answer.body)]))
        self.transport.close()


def _receive_into(http: weakref.ref[BoundedHttp], cycle: weakref.ref[RequestResponseCycle], place: memoryview) -> bool:
    """Do so if both are still there. A request that held them would be held by itself, until the collector comes."""
    connection, request = http(), cycle()
    return connection is not None and request is not None and connection.receive_into(request, place)


class _BodyReceiver(asyncio.BufferedProtocol):
    """A connection while the rest of a body comes; all else is passed on to its protocol of before."""

    def __init__(self, http: BoundedHttp, place: memoryview) -> None:
        self._http = http
        self._place = place

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - as much as there is
        """Give where the next bytes go: no more than the body has left, so that what follows it is not taken."""
        return self._place

    def buffer_updated(self, nbytes: int) -> None:
        """Take notice of what has come."""
        self._place = self._place[nbytes:]
        if self._place:
            self._http.wake()
        else:
            self._place = memoryview(b"")  # uvloop keeps us until the connection ends, and we would keep the whole body
            self._http.end_body()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass it on."""
        self._http.connection_lost(exc)

    def eof_received(self) -> None:
        """Pass it on."""
        self._http.eof_received()

    def pause_writing(self) -> None:
        """Pass it on."""
        self._http.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on."""
        self._http.resume_writing()
