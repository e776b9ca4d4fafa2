"""Joining a trainer's own table with supervision from the offline tables."""

from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

import pyarrow as pa
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from das_service.door.auth import Needs
from das_service.door.columns import augment_differences, refuse_differences
from das_service.door.door import answer_type, data_type
from das_service.door.openapi import data_body, problems
from das_service.door.spool import Spool, spooled
from das_service.errors import InvalidRowsError
from das_service.routes.names import DatasetName, ServiceOf
from das_service.routes.supervision import Fms, Gap, OutputNames, plain_rows
from das_service.service import Service
from das_service.supervision.answer import EmbeddingFormat, LookupQuery
from das_service.supervision.answer_size import THINNER, bytes_per_row, refuse_large_answer, refuse_large_echo
from das_service.supervision.augment import Upload, answer_schema, iter_augmented, open_upload
from das_service.supervision.augment_body import AugmentBody, Echo, parse_augment_json
from das_service.supervision.join import OfflineJoin, window_rows
from das_service.supervision.lookup_body import names_of
from schemas.wire import ARROW_STREAM, JSON, iter_stream_parts

router = APIRouter(tags=["supervision"])

_EXAMPLE = {"fms": ["teacher"], "rows": [{"example_id": "a", "event_time": "2024-05-01T12:00:00Z", "label": 1}]}
_ARROW = "Arrow IPC stream: example_id, event_time, and any columns of the trainer's own; the rest as query parameters."
Columns = Annotated[Echo, Query(description="supervision leaves the caller's own columns out of the answer.")]


@router.post(
    "/v1/datasets/{dataset}/supervision/augment",
    response_class=Response,
    dependencies=[Depends(Needs("read"))],
    responses={
        200: {
            "description": "The rows that were sent, in their order, with each FM's columns appended.",
            "content": {
                ARROW_STREAM: {"schema": {"type": "string", "format": "binary"}},
                JSON: {"example": {"rows": [{"example_id": "a", "label": 1, "teacher__status": "present"}]}},
            },
        },
        **problems(400, 404, 406, 408, 413, 415, 422, 429, 507),
    },
    openapi_extra=data_body({"$ref": f"#/components/schemas/{AugmentBody.__name__}"}, _EXAMPLE, _ARROW),
    summary="Augment a trainer's table",
)
async def post_augment(
    dataset: DatasetName,
    request: Request,
    service: ServiceOf,
    fms: Fms = [],  # noqa: B006 - FastAPI copies it
    outputs: OutputNames = None,
    embedding_format: EmbeddingFormat = "float16",
    max_freshness_gap_seconds: Gap = None,
    columns: Columns = "all",
) -> Response:
    """Give a trainer's rows back with what FMs said of them, from the offline tables.

    Rows, order and repeats are the caller's. The table is on disk and checked before the answer starts; larger ones
    than may be sent are joined where the tables are (`das augment`). The answer is Arrow where the body is, unless
    Accept says otherwise, and is whole only if it ends with the end-of-stream marker and `das_rows` counts its rows.
    """
    kind = data_type(request)
    wanted = answer_type(request, kind, JSON if kind == ARROW_STREAM else ARROW_STREAM)
    query = LookupQuery(
        fms=names_of(fms),
        outputs=None if outputs is None else names_of(outputs),
        embedding_format=embedding_format,
        max_freshness_gap_seconds=max_freshness_gap_seconds,
    )
    settings = service.settings
    async with AsyncExitStack() as held:
        held.callback(service.free_buffers)  # after all else
        held.enter_context(service.augments.hold())
        spool = await held.enter_async_context(
            spooled(
                request,
                folder=settings.spool_folder,
                max_bytes=settings.max_augment_bytes,
                reserve_bytes=settings.disk_reserve_bytes,
                timeout_seconds=settings.body_timeout_seconds,
            )
        )
        parts = await service.in_thread(_answer, service, dataset, spool, (kind, wanted), query, columns)
        held.callback(parts.close)  # with what it is made from: frames of an error may keep the generator itself
        return _Answer(service, parts, media_type=wanted, held=held.pop_all())


class _Answer(StreamingResponse):
    """An answer whose parts are made as they are sent; gives back what the request held however it ends."""

    def __init__(self, service: Service, parts: Iterator[bytes], *, media_type: str, held: AsyncExitStack) -> None:
        super().__init__(_in_threads(service, parts, held), media_type=media_type)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


async def _in_threads(service: Service, parts: Iterator[bytes], held: AsyncExitStack) -> AsyncIterator[bytes]:
    while (part := await service.in_thread(next, parts, None)) is not None:
        yield part
    await held.aclose()  # before the caller sees the end: whoever has a whole answer may ask for the next at once


def _answer(
    service: Service, dataset: str, spool: Spool, kinds: tuple[str, str], query: LookupQuery, columns: Echo
) -> Generator[bytes, None, None]:
    """Check the table and begin the join; give the answer's parts. kinds: media types of body and answer."""
    upload: Upload | None = None
    if kinds[0] == JSON:
        upload, query, columns = parse_augment_json(spool, service.limits)
    elif not query.fms:
        raise InvalidRowsError("say which FMs are asked: ?fms=...", code="invalid_body")
    catalog = service.catalog.current()
    join = OfflineJoin(
        service.duck, service.tables, catalog, dataset, query, client=service.client, pool=service.buffers
    )
    echo = columns == "all"
    added = join.schema.names if echo else ()
    if upload is None:
        upload = open_upload(spool, added=added, max_bytes=service.settings.max_augment_bytes)
    else:
        refuse_differences(augment_differences(upload.schema, added))
    records = [catalog.fm(dataset, fm) for fm in query.fms]
    if kinds[1] == JSON:
        max_bytes = service.settings.max_answer_bytes
        num_rows = sum(batch.num_rows for batch in upload.batches())
        refuse_large_answer(num_rows, records, query, as_json=True, max_bytes=max_bytes)
        if echo:
            refuse_large_echo(upload.batches(), max_bytes=max_bytes)
    per_row = sum(bytes_per_row(record.outputs, query, as_json=False) for record in records)
    batches = _iter_batches(service, dataset, upload, join, window_rows=window_rows(per_row), echo=echo)
    schema = answer_schema(upload.schema, join, echo=echo)
    if kinds[1] == JSON:
        rows = [row for batch in batches for row in _own_rows(batch)]
        return _chained(bytes(JSONResponse({"rows": rows}).body), iter(()))
    parts = iter_stream_parts(schema, batches)
    return _chained(next(parts), parts)  # what can go wrong at the start is still an error, and no broken stream


def _own_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Give rows as JSON has them.

    Raises:
        InvalidRowsError: not_json: the caller's columns hold what Python can't say, such as a time in the year 292277.
    """
    try:
        return plain_rows(batch)
    except (ValueError, OverflowError, KeyError, NotImplementedError) as error:
        line = str(error).split("\n", 1)[0][:300]
        raise InvalidRowsError(
            f"your own columns can't be given back as JSON: {line}; {THINNER}", code="not_json"
        ) from None


def _chained(first: bytes, rest: Iterator[bytes]) -> Generator[bytes, None, None]:
    yield first
    yield from rest


def _iter_batches(
    service: Service, dataset: str, upload: Upload, join: OfflineJoin, *, window_rows: int, echo: bool
) -> Iterator[pa.RecordBatch]:
    for batches, joined in iter_augmented(upload, join, window_rows=window_rows, echo=echo):
        for fm, counts in joined.counts.items():
            service.coverage.count(dataset, fm, counts)
        yield from batches
