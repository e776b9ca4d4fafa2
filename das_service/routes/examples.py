"""Taking examples in."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from das_service.door.arrow_body import Body
from das_service.door.auth import Needs
from das_service.door.door import answer_type, data_type
from das_service.door.openapi import data_body, problems
from das_service.door.stages import Stages
from das_service.door.trace import read_traceparent
from das_service.door.validation import ValidRows, validate_arrow, validate_json
from das_service.errors import InvalidRowsError, OverloadedError
from das_service.ingest import (
    answer_body,
    append_rows,
    are_refused,
    count_refused,
    count_rows,
    encode_chunks,
    refuse_bad_rows,
)
from das_service.logs.streams import Chunk
from das_service.registry import Catalog
from das_service.routes.names import DatasetName, ServiceOf
from das_service.scored_wait import Awaited, awaited_rows, still_awaited, wait_until_scored
from das_service.service import Service
from das_service.watch.monitor import refuse_ingest
from schemas.wire import ARROW_STREAM, JSON

router = APIRouter(tags=["examples"])

_ROW = {"example_id": "a", "event_time": "2026-01-31T12:00:00Z", "price": 1.5, "user_id": "u1", "item": 7}
_JSON_SCHEMA = {
    "type": "object",
    "required": ["examples"],
    "properties": {"examples": {"type": "array", "items": {"type": "object"}}},
}
_ARROW = "Arrow IPC stream: example_id, event_time, and the dataset's features by name, in any order."
_ANSWER = {
    "description": "At least one row is on disk.",
    "content": {
        JSON: {
            "example": {
                "accepted": 4998, "rejected": 2, "errors_truncated": False, "positions": {"0": 812, "1": 799},
                "errors": [
                    {"row": 17, "example_id": "a", "column": "price", "code": "not_finite", "message": "..."},
                ],
            }
        }
    },
}  # fmt: skip


@router.post(
    "/v1/datasets/{dataset}/examples",
    status_code=202,
    response_class=JSONResponse,
    dependencies=[Depends(Needs("ingest"))],
    responses={
        200: {"description": "wait=scored: the rows are on disk and have supervision of every required FM."},
        202: _ANSWER,
        **problems(400, 404, 406, 408, 413, 415, 422, 429, 507),
    },
    openapi_extra=data_body(_JSON_SCHEMA, {"examples": [_ROW]}, _ARROW),
    summary="Take examples in",
)
async def post_examples(
    dataset: DatasetName,
    request: Request,
    service: ServiceOf,
    on_error: Annotated[
        Literal["skip", "abort"], Query(description="Bad rows: leave them out, or take none at all.")
    ] = "skip",
    wait: Annotated[
        Literal["none", "scored"], Query(description="scored: answer once required FMs have scored the rows.")
    ] = "none",
    timeout_seconds: Annotated[float, Query(ge=0, le=60, description="Longest wait for the scores.")] = 10.0,
) -> JSONResponse:
    """Take examples in for scoring; a 2xx means that they are on disk.

    Rows whose values can't be stored are left out and listed; a wrong, missing or unknown column refuses the request.
    Send the same request again after any error: what was taken already is recognised and changes nothing.
    """
    stages = Stages(service.metrics)
    answer_type(request, JSON)
    how = _How(
        kind=data_type(request), abort=on_error == "abort", wait=wait == "scored", traceparent=read_traceparent(request)
    )
    with service.permits.hold():
        refuse_ingest(service.monitor.findings, service.settings, dataset)
        answer, awaited = await _take(request, service, dataset, how, stages)
    status = 202
    if how.wait:
        answer["scored"] = await _wait(request, service, dataset, awaited, timeout_seconds)
        status = 200 if answer["scored"] else 202
        stages.end("wait")
    return JSONResponse(answer, status_code=status, headers=stages.headers())


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """What the caller wants done with the rows, and how they are spelled."""

    kind: str
    abort: bool
    wait: bool
    traceparent: str | None


async def _take(
    request: Request, service: Service, dataset: str, how: _How, stages: Stages
) -> tuple[dict[str, Any], list[Awaited]]:
    """Give the answer and what has yet to be scored. The body and the rows end here: a wait must not hold them."""
    body = await service.read_body(request)
    stages.end("read")
    return await service.in_thread(_store, service, dataset, body, how, stages)


def _store(
    service: Service, dataset: str, body: Body, how: _How, stages: Stages
) -> tuple[dict[str, Any], list[Awaited]]:
    """Validate, append, count."""
    catalog, (rows, chunks) = service.catalog.use(lambda known: _encode(service, known, dataset, body, how, stages))
    stages.end("registry")
    try:
        refuse_bad_rows(rows, abort=how.abort)
    except InvalidRowsError:
        count_refused(service.metrics, dataset, rows)
        raise
    spec, floor = catalog.spec(dataset), service.guard.floor(dataset)
    max_bytes = max(1, service.settings.max_backlog_bytes // spec.partitions)
    try:
        receipt = append_rows(service.door, spec, chunks, floor=floor, max_bytes=max_bytes)
    except OverloadedError as error:
        raise _with_holder(service, dataset, error) from None
    stages.end("append")
    count_rows(service.metrics, dataset, rows, receipt)
    fms = [name for name, record in catalog.fms.get(dataset, {}).items() if record.required]
    awaited = awaited_rows(rows.batch, spec, fms) if how.wait else []
    return answer_body(rows, receipt, rejected=rows.num_refused), awaited


def _encode(
    service: Service, catalog: Catalog, dataset: str, body: Body, how: _How, stages: Stages
) -> tuple[ValidRows, list[Chunk]]:
    """Give the rows that may be stored, and the chunks that they make."""
    spec = catalog.spec(dataset)
    validate = validate_arrow if how.kind == ARROW_STREAM else validate_json
    with service.turn() if how.kind == ARROW_STREAM else nullcontext():
        stages.end("turn")
        rows = validate(body, spec, limits=service.limits, now_us=time.time_ns() // 1000)
        stages.end("validate")
        chunks = []
        if not are_refused(rows, abort=how.abort):
            chunks = encode_chunks(dataset, spec, rows.batch, traceparent=how.traceparent)
        stages.end("encode")
    return rows, chunks


def _with_holder(service: Service, dataset: str, error: OverloadedError) -> OverloadedError:
    """Give the refusal with the name of what holds things up."""
    backlog = service.monitor.findings.backlogs.get(dataset)
    detail = error.detail if backlog is None else f"{error.detail}; {backlog.holder()}"
    return OverloadedError(detail, code=error.code, retry_after_seconds=error.retry_after_seconds or 1)


async def _wait(
    request: Request, service: Service, dataset: str, awaited: list[Awaited], timeout_seconds: float
) -> bool:
    """Give whether the rows got supervision of every required FM in time; not, if too many wait already.

    Raises:
        ClientDisconnect: The caller has gone, and leaves its place to others.
    """

    async def look(items: list[Awaited]) -> tuple[list[Awaited], int]:
        if await request.is_disconnected():
            raise ClientDisconnect
        return await service.in_wait_thread(still_awaited, service.client, dataset, items)

    try:
        with service.waits.hold():
            return await wait_until_scored(look, awaited, timeout_seconds=timeout_seconds)
    except OverloadedError:
        return False
