"""Handing supervision out of the online store."""

import base64
import math
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from das_service.door.arrow_body import Body
from das_service.door.auth import Needs
from das_service.door.door import answer_type, data_type, read_body
from das_service.door.openapi import data_body, problems
from das_service.door.stages import Stages
from das_service.errors import InvalidRowsError
from das_service.routes.names import DatasetName, ServiceOf
from das_service.service import Service
from das_service.supervision.answer import EmbeddingFormat, LookupQuery
from das_service.supervision.answer_size import refuse_large_answer
from das_service.supervision.lookup import Found, Rows, UnknownSnapshotNumberError, lookup_rows
from das_service.supervision.lookup_body import LookupBody, names_of, parse_lookup_arrow, parse_lookup_json
from schemas.wire import ARROW_STREAM, JSON, write_stream

router = APIRouter(tags=["supervision"])
_PIECE_BYTES = 1024 * 1024

_EXAMPLE = {"fms": ["teacher"], "example_ids": ["a", "b"], "outputs": ["click"], "embedding_format": "float16"}
_ARROW = "Arrow IPC stream: example_id, and event_time if known; the rest as query parameters."
Fms = Annotated[list[str], Query(description="FMs, repeated or separated by commas (Arrow bodies).")]
OutputNames = Annotated[list[str] | None, Query(description="Tasks and embeddings wanted; default all.")]
Gap = Annotated[
    float | None, Query(ge=0, le=1e12, allow_inf_nan=False, description="A larger freshness gap is `stale`.")
]


@router.post(
    "/v1/datasets/{dataset}/supervision/lookup",
    response_class=Response,
    dependencies=[Depends(Needs("read"))],
    responses={
        200: {
            "description": "One row per id, in their order; each FM's status says why values are null.",
            "content": {
                ARROW_STREAM: {"schema": {"type": "string", "format": "binary"}},
                JSON: {"example": {"rows": [{"example_id": "a", "teacher__status": "present"}]}},
            },
        },
        **problems(400, 404, 406, 408, 413, 415, 422, 429),
    },
    openapi_extra=data_body({"$ref": f"#/components/schemas/{LookupBody.__name__}"}, _EXAMPLE, _ARROW),
    summary="Look supervision up",
)
async def post_lookup(
    dataset: DatasetName,
    request: Request,
    service: ServiceOf,
    fms: Fms = [],  # noqa: B006 - FastAPI copies it
    outputs: OutputNames = None,
    embedding_format: EmbeddingFormat = "float16",
    max_freshness_gap_seconds: Gap = None,
) -> Response:
    """Give what FMs said of examples, from the online store.

    Statuses: present, pending, missing, failed, leaky, stale. The answer is Arrow where the body is, unless Accept says
    otherwise; an Arrow answer ends with the end-of-stream marker and says its number of rows in `das_rows`.
    """
    stages = Stages(service.metrics)
    kind = data_type(request)
    wanted = answer_type(request, kind, JSON if kind == ARROW_STREAM else ARROW_STREAM)
    query = LookupQuery(
        fms=names_of(fms),
        outputs=None if outputs is None else names_of(outputs),
        embedding_format=embedding_format,
        max_freshness_gap_seconds=max_freshness_gap_seconds,
    )
    with ExitStack() as held:
        held.enter_context(service.permits.hold())
        body = await read_body(
            request, max_bytes=service.settings.max_body_bytes, timeout_seconds=service.settings.body_timeout_seconds
        )
        stages.end("read")
        content = await service.in_thread(_answer, service, dataset, body, (kind, wanted), query, stages)
        return _Answer(content, media_type=wanted, headers=stages.headers(), held=held.pop_all())


class _Answer(Response):
    """An answer that is sent as fast as it is read, and keeps the request's permit until then: it takes memory."""

    def __init__(self, content: bytes, *, media_type: str, headers: Mapping[str, str], held: ExitStack) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self._held = held

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        with self._held:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            rest = memoryview(self.body)
            while len(rest) > _PIECE_BYTES:
                await send({"type": "http.response.body", "body": rest[:_PIECE_BYTES], "more_body": True})
                rest = rest[_PIECE_BYTES:]
            await send({"type": "http.response.body", "body": rest, "more_body": False})


def _answer(
    service: Service, dataset: str, body: Body, kinds: tuple[str, str], query: LookupQuery, stages: Stages
) -> bytes:
    """Parse the body, look up, and write the answer; kinds: media types of body and answer."""
    if kinds[0] == ARROW_STREAM:
        rows = parse_lookup_arrow(body, service.limits)
        if not query.fms:
            raise InvalidRowsError("say which FMs are asked: ?fms=...", code="invalid_body")
    else:
        rows, query = parse_lookup_json(body, service.limits)
    stages.end("parse")
    found = _find(service, dataset, rows, query, as_json=kinds[1] == JSON)
    for fm, counts in found.counts.items():
        service.coverage.count(dataset, fm, counts)
    stages.end("fetch")
    if kinds[1] == ARROW_STREAM:
        content = write_stream(found.batch.schema, [found.batch])
    else:
        content = bytes(JSONResponse({"rows": plain_rows(found.batch)}).body)
    stages.end("write")
    return content


def _find(service: Service, dataset: str, rows: Rows, query: LookupQuery, *, as_json: bool) -> Found:
    def look() -> Found:
        catalog = service.catalog.current()
        records = [catalog.fm(dataset, fm) for fm in query.fms]
        max_bytes = service.settings.max_answer_bytes
        refuse_large_answer(len(rows.example_id), records, query, as_json=as_json, max_bytes=max_bytes)
        return lookup_rows(service.client, catalog, dataset, rows, query)

    try:
        return look()
    except UnknownSnapshotNumberError:  # a snapshot was registered and scored since the catalog was read
        return look()


def plain_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Give rows as JSON has them: times as RFC 3339, encoded embeddings as base64."""
    columns = {name: [_plain(value) for value in column.to_pylist()] for name, column in _columns(batch)}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _columns(batch: pa.RecordBatch) -> list[tuple[str, pa.Array]]:
    return [(field.name, column) for field, column in zip(batch.schema, batch.columns, strict=True)]


def _plain(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Give a value as JSON has it: a float that is no number as null, what JSON has no type for as text."""
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value if value is None or isinstance(value, str | int) else str(value)
