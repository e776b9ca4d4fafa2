"""What comes before there is a request: uvicorn's protocol, with bounds on a request's head and our own refusals.

uvicorn itself waits for a head for ever and keeps whatever it is sent of one; a body has its bounds in door.py.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from das_service.door.problems import problem

MAX_HEAD_BYTES = 64 * 1024


class BoundedHttp(HttpToolsProtocol):
    """One connection. A head must be whole within head_seconds of its first byte (of the connection, the first one)."""

    def __init__(self, *args: Any, head_seconds: float, **kwargs: Any) -> None:  # noqa: ANN401 - uvicorn's own
        super().__init__(*args, **kwargs)
        self._head_seconds = head_seconds
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Begin to wait for the head whose first byte has come."""
        super().on_message_begin()
        if self._head_timer is None:
            self._begin_head()

    def on_headers_complete(self) -> None:
        """Hand the request over."""
        self._end_head()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Take what has come; a head that is still not whole may not be long."""
        super().data_received(data)
        if self._head_timer is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, "head_too_large", f"a request's head may have {MAX_HEAD_BYTES} bytes")

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(400, "malformed", msg)

    def _begin_head(self) -> None:
        detail = f"the request's head was not whole within {self._head_seconds:g} s"
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self._head_seconds, self._refuse, 408, "head_timeout", detail)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int, code: str, detail: str) -> None:
        """Answer, unless an answer is on its way already, and hang up."""
        self._end_head()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            answer = problem(status=status, code=code, detail=detail, instance="/", headers={"Connection": "close"})
            lines = [name + b": " + value + b"\r\n" for name, value in answer.raw_headers]
            self.transport.write(b"".join([STATUS_LINE[status], *lines, b"\r\n", bytes(answer.body)]))
        self.transport.close()
