"""Reading training batches."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, aclosing
from datetime import UTC, datetime
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from das_service.batches.as_of import refuse_open_as_of
from das_service.batches.cursor import encode_cursor
from das_service.batches.query import BatchQuery
from das_service.batches.request import BatchParameters, open_stream, refuse_endless
from das_service.batches.stream import BatchStream, Reading
from das_service.door.auth import Needs
from das_service.door.door import answer_type
from das_service.door.openapi import problems
from das_service.registry import Catalog
from das_service.routes.names import DatasetName, ServiceOf
from das_service.routes.supervision import plain_rows
from das_service.service import Service
from schemas.wire import ARROW_STREAM, JSON

router = APIRouter(tags=["batches"])
_POLL_SECONDS = 0.5
_JSON_ROWS, _MOST_JSON_ROWS = 1_000, 65_536


@router.get(
    "/v1/datasets/{dataset}/batches",
    response_class=Response,
    dependencies=[Depends(Needs("read"))],
    responses={
        200: {
            "description": "Closed rows in ready order: an Arrow stream whose batches carry `das_cursor`.",
            "content": {
                ARROW_STREAM: {"schema": {"type": "string", "format": "binary"}},
                JSON: {"example": {"rows": [{"example_id": "a", "click": 1.0}], "cursor": "AQ..."}},
            },
        },
        **problems(400, 404, 406, 409, 410, 422, 429, 507),
    },
    summary="Read training batches",
)
async def get_batches(
    dataset: DatasetName, request: Request, service: ServiceOf, asked: Annotated[BatchParameters, Query()]
) -> Response:
    """Give closed rows (features, labels, supervision) in ready order, each once, from a cursor on.

    A cursor fixes what is read up to its bounds: the same cursor gives the same bytes, whatever has come since. Without
    one the bounds are what is closed now. `follow` and `extend` go on behind the bounds. Of `shard=i/n` the n parts are
    disjoint and complete. The schema's metadata carries the cursor before the first row.
    """
    wanted = answer_type(request, ARROW_STREAM, JSON)
    refuse_endless(asked, as_json=wanted == JSON)
    async with AsyncExitStack() as held:
        held.enter_context(service.readers.hold())
        stream = await service.in_page_thread(_open, service, dataset, asked)
        if wanted == JSON:
            return await service.in_page_thread(_as_json, stream, asked.max_rows)
        parts = stream.iter_parts(max_rows=asked.max_rows)
        held.callback(parts.close)
        first = await service.in_page_thread(next, parts, None)  # what fails here is still an error, not a cut stream
        return _Answer(service, (first, parts), held=held.pop_all())


class _Answer(StreamingResponse):
    """A stream whose parts are made as they are sent; gives back the reader's permit however it ends."""

    def __init__(
        self, service: Service, parts: tuple[bytes | None, Iterator[bytes | None]], *, held: AsyncExitStack
    ) -> None:
        self._parts = _in_threads(service, *parts)
        super().__init__(self._parts, media_type=ARROW_STREAM)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held, aclosing(self._parts):
            await super().__call__(scope, receive, send)


_END = b""


async def _in_threads(
    service: Service, first: bytes | None, parts: Iterator[bytes | None]
) -> AsyncGenerator[bytes, None]:
    """Give the parts; the next one is made while one is being sent."""
    part = first
    while part != _END:
        coming = asyncio.ensure_future(service.in_page_thread(next, parts, _END))
        try:
            if part is not None:
                yield part
            elif service.stopping.is_set():
                return  # without the end of the stream: the reader goes on with whoever serves next
            else:
                await anyio.sleep(_POLL_SECONDS)
        finally:
            with anyio.CancelScope(shield=True):  # nobody may close the parts while a thread makes one
                await asyncio.wait([coming])
                failed = coming.exception()
        if failed is not None:
            raise failed
        part = coming.result()


def _open(service: Service, dataset: str, asked: BatchParameters) -> BatchStream:
    reading = Reading(
        duck=service.duck,
        pool=service.page_pool,
        folder=service.tables,
        catalog=service.catalog.current,
        budget=service.page_budget,
        count=service.coverage.count_all,
    )

    def settle(catalog: Catalog, query: BatchQuery) -> None:
        refuse_open_as_of(service.client, service.tables, catalog, dataset, query, now=datetime.now(UTC))

    return open_stream(reading, dataset, asked, settle=settle)


def _as_json(stream: BatchStream, max_rows: int | None) -> Response:
    rows, cursor = [], stream.cursor
    for item in stream.iter_marked(max_rows=_JSON_ROWS if max_rows is None else min(max_rows, _MOST_JSON_ROWS)):
        if item is not None:
            rows += plain_rows(item[0])
            cursor = item[1]
    return JSONResponse({"rows": rows, "cursor": encode_cursor(cursor)})
