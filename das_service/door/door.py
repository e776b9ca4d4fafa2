"""What every request passes: permits for data requests, bounded reading of bodies, media types."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from email.message import Message
from typing import TypeVar

import anyio.to_thread
import numpy as np
from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from das_service.door.arrow_body import Body
from das_service.door.http_protocol import RECEIVE_INTO
from das_service.door.json_body import parse_model
from das_service.errors import DasError, OverloadedError, TooLargeError
from schemas.wire import ARROW_STREAM, JSON

DECLARATION_BYTES = 4 * 1024 * 1024
_DRAIN_SECONDS = 2.0
_WHOLE_BODY_FACTOR = 4
_SLOWEST_BYTES_PER_SECOND = 4 * 1024 * 1024
_PLACED_BYTES = 64 * 1024
_MOST_DIGITS = 20  # int() refuses thousands


class Permits:
    """So many data requests at once, the rest is told to come back. Used from the event loop alone."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total

    @property
    def are_free(self) -> bool:
        """Whether nobody holds one."""
        return self._free == self._total

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold a permit, or refuse at once.

        Raises:
            OverloadedError: All are held.
        """
        if self._free == 0:
            raise OverloadedError(f"{self._total} data requests are being served; try again", code="busy")
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


async def read_body(request: Request, *, max_bytes: int, timeout_seconds: float) -> Body:
    """Give the whole body.

    Raises:
        TooLargeError: It is longer, or says so up front.
        DasError: 408, it comes too slowly; 415, it is compressed as a whole.
    """
    too_large = TooLargeError(f"the body is longer than the {max_bytes} bytes that a request may have")
    await _refuse_head(request, max_bytes, too_large)
    place = _place_of_body(request)
    pieces = _iter_pieces(request, max_bytes=max_bytes, timeout_seconds=timeout_seconds, too_large=too_large)
    body = b"".join([piece async for piece in pieces])
    return body if place is None else place


async def iter_body(
    request: Request, *, max_bytes: int, timeout_seconds: float, too_large: TooLargeError
) -> AsyncIterator[bytes]:
    """Give the body in pieces.

    Raises:
        TooLargeError: too_large: it is longer, or says so up front.
        DasError: 408, it comes too slowly; 415, it is compressed as a whole.
    """
    await _refuse_head(request, max_bytes, too_large)
    async for piece in _iter_pieces(request, max_bytes=max_bytes, timeout_seconds=timeout_seconds, too_large=too_large):
        yield piece


async def _refuse_head(request: Request, max_bytes: int, too_large: TooLargeError) -> None:
    """Raise for what the head says of the body."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise media_type_error("a Content-Encoding is not read here; Arrow can compress its own buffers")
    if _stated_bytes(request) > max_bytes:
        await _drain(request, max_bytes)
        raise too_large


def _stated_bytes(request: Request) -> int:
    stated = request.headers.get("content-length", "").strip()
    return int(stated.lstrip("0")[:_MOST_DIGITS] or 0) if stated.isdecimal() else 0


def _place_of_body(request: Request) -> memoryview | None:
    """Give where the body goes without a copy on its way, None if it comes in pieces."""
    receive_into = getattr(request.state, RECEIVE_INTO, None)
    num_bytes = _stated_bytes(request)
    if receive_into is None or num_bytes < _PLACED_BYTES:
        return None
    place = np.empty(num_bytes, np.uint8).data  # takes no memory before something comes
    return place if receive_into(place) else None


async def _iter_pieces(
    request: Request, *, max_bytes: int, timeout_seconds: float, too_large: TooLargeError
) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    whole_by = loop.time() + _WHOLE_BODY_FACTOR * max(timeout_seconds, max_bytes / _SLOWEST_BYTES_PER_SECOND)
    left, more = max_bytes, True
    while more:
        try:
            async with asyncio.timeout_at(min(loop.time() + timeout_seconds, whole_by)):
                message = await request.receive()
        except TimeoutError:
            detail = f"the body came too slowly: nothing for some {timeout_seconds:g} s, or not whole in time"
            raise DasError(detail, code="body_timeout", http_status=408) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece = message.get("body", b"")
        left -= len(piece)
        more = message.get("more_body", False)
        if left < 0:
            if more:
                await _drain(request, max_bytes)
            raise too_large
        yield piece


async def _drain(request: Request, max_bytes: int) -> None:
    """Read on for a while: a caller that is cut while it sends may never see the answer."""
    if request.headers.get("expect", "").lower() == "100-continue":
        return  # it has not begun to send
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            left = max_bytes
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b"")) or 1
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
    except TimeoutError:
        return


_M = TypeVar("_M", bound=BaseModel)


async def read_declaration(request: Request, model: type[_M], *, timeout_seconds: float) -> _M:
    """Give a small JSON body as the model says.

    Raises:
        InvalidRowsError: invalid_body, with the errors by field.
        DasError: It is not JSON (400), too large (413), or no JSON by its Content-Type (415).
    """
    if body_type(request) != JSON:
        raise media_type_error(f"the body must be {JSON}")
    body = await read_body(request, max_bytes=DECLARATION_BYTES, timeout_seconds=timeout_seconds)
    return await anyio.to_thread.run_sync(lambda: parse_model(body, model, max_bytes=DECLARATION_BYTES))


def body_type(request: Request) -> str:
    """Give the media type of the body, without its parameters.

    Raises:
        DasError: 415, it is JSON in another charset than UTF-8.
    """
    stated = request.headers.get("content-type", "")
    kind = stated.partition(";")[0].strip().lower()
    if kind == JSON and (charset := _charset(stated)) not in {"utf-8", "utf8", "us-ascii"}:
        raise media_type_error(f"the body must be {JSON} in UTF-8, not in {charset}")
    return kind


def _charset(content_type: str) -> str | None:
    message = Message()
    message["content-type"] = content_type
    return message.get_content_charset("utf-8")


def data_type(request: Request) -> str:
    """Give the media type of a data body, one of the two that are read.

    Raises:
        DasError: 415.
    """
    kind = body_type(request)
    if kind not in {ARROW_STREAM, JSON}:
        raise media_type_error(f"the body must be {ARROW_STREAM} or {JSON}, not {kind or 'of no stated type'}")
    return kind


def media_type_error(detail: str) -> DasError:
    """Give a 415."""
    return DasError(detail, code="media_type", http_status=415)


def answer_type(request: Request, *offers: str) -> str:
    """Give the offer that the caller's Accept prefers; the first one where it does not care.

    Raises:
        DasError: 406, it takes none of them.
    """
    ranges = [_parse_range(part) for part in request.headers.get("accept", "*/*").split(",") if part.strip()]
    best = max(offers, key=lambda offer: _quality(offer, ranges))
    if ranges and _quality(best, ranges) <= 0:
        raise DasError(f"the answer can be {' or '.join(offers)}", code="not_acceptable", http_status=406)
    return best


def _parse_range(text: str) -> tuple[str, float]:
    kind, *parameters = [part.strip().lower() for part in text.split(";")]
    quality = 1.0
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                quality = float(parameter[2:])
            except ValueError:
                quality = 0.0
    return kind, quality


def _quality(offer: str, ranges: list[tuple[str, float]]) -> float:
    """Give how much an offer is wanted; the most exact range decides."""
    for pattern in (offer, offer.partition("/")[0] + "/*", "*/*"):
        found = [quality for kind, quality in ranges if kind == pattern]
        if found:
            return max(found)
    return 1.0 if not ranges else 0.0
