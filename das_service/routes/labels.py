"""Taking labels in."""

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse

from das_service.door.arrow_body import Body
from das_service.door.auth import Needs
from das_service.door.door import answer_type, data_type
from das_service.door.labels import validate_labels_arrow, validate_labels_json
from das_service.door.openapi import data_body, problems
from das_service.door.stages import Stages
from das_service.door.trace import read_traceparent
from das_service.door.validation import ValidRows
from das_service.errors import InvalidRowsError
from das_service.ingest import answer_body, append_rows, are_refused, encode_chunks, refuse_bad_rows
from das_service.logs.records import LABELS
from das_service.logs.streams import Chunk
from das_service.registry import Catalog
from das_service.routes.names import DatasetName, ServiceOf
from das_service.service import Service
from das_service.watch.monitor import refuse_ingest
from schemas.wire import ARROW_STREAM, JSON

router = APIRouter(tags=["labels"])

_ROW = {"example_id": "a", "label_time": "2026-01-31T12:20:00Z", "click": 1}
_JSON_SCHEMA = {
    "type": "object",
    "required": ["labels"],
    "properties": {"labels": {"type": "array", "items": {"type": "object"}}},
}
_ARROW = "Arrow IPC stream: example_id, label_time, and the dataset's tasks by name; null where nothing is said."
_ANSWER = {
    "description": "At least one label is on disk.",
    "content": {
        JSON: {
            "example": {
                "accepted": 99, "rejected": 1, "errors_truncated": False, "positions": {"0": 12},
                "errors": [
                    {"row": 4, "example_id": "a", "column": "click", "code": "out_of_range", "message": "..."},
                ],
            }
        }
    },
}  # fmt: skip


@router.post(
    "/v1/datasets/{dataset}/labels",
    status_code=202,
    response_class=JSONResponse,
    dependencies=[Depends(Needs("ingest"))],
    responses={202: _ANSWER, **problems(400, 404, 406, 408, 413, 415, 422, 429, 507)},
    openapi_extra=data_body(_JSON_SCHEMA, {"labels": [_ROW]}, _ARROW),
    summary="Take labels in",
)
async def post_labels(
    dataset: DatasetName,
    request: Request,
    service: ServiceOf,
    on_error: Annotated[
        Literal["skip", "abort"], Query(description="Bad rows: leave them out, or take none at all.")
    ] = "skip",
) -> JSONResponse:
    """Take outcomes of examples in; a 2xx means that they are on disk.

    A label may come before its example. Of several for one task the one with the latest label_time in the task's window
    counts, of those the last that came. Send the same request again after any error: repeats change nothing.
    """
    stages = Stages(service.metrics)
    answer_type(request, JSON)
    kind, traceparent = data_type(request), read_traceparent(request)
    with service.permits.hold():
        refuse_ingest(service.monitor.findings, service.settings, dataset)
        body = await service.read_body(request)
        stages.end("read")
        answer = await service.in_thread(_store, service, dataset, body, kind, on_error == "abort", traceparent, stages)
    return JSONResponse(answer, status_code=202, headers=stages.headers())


def _store(
    service: Service,
    dataset: str,
    body: Body,
    kind: str,
    abort: bool,  # noqa: FBT001 - handed through a thread
    traceparent: str | None,
    stages: Stages,
) -> dict[str, Any]:
    """Validate, append, count; give the answer."""

    def encode(catalog: Catalog) -> tuple[ValidRows, list[Chunk]]:
        spec = catalog.spec(dataset)
        if not spec.tasks:
            raise InvalidRowsError(f"dataset {dataset!r} has no tasks, so it takes no labels", code="no_tasks")
        validate = validate_labels_arrow if kind == ARROW_STREAM else validate_labels_json
        rows = validate(body, spec, limits=service.limits, now_us=time.time_ns() // 1000)
        stages.end("validate")
        chunks = []
        if not are_refused(rows, abort=abort):
            chunks = encode_chunks(dataset, spec, rows.batch, kind=LABELS, traceparent=traceparent)
        stages.end("encode")
        return rows, chunks

    catalog, (rows, chunks) = service.catalog.use(encode)
    stages.end("registry")
    for code, number in rows.refused_by_code.items():
        service.metrics.label_rows.labels(dataset, "rejected", code).inc(number)
    refuse_bad_rows(rows, abort=abort)
    spec = catalog.spec(dataset)
    floor = service.guard.floor(dataset)
    if LABELS not in floor.logs:
        spec = service.catalog.current().spec(dataset)  # what is written back must not be older than what is there
        service.declarations.put_dataset(dataset, spec)  # it was declared by a version without labels
        floor = service.guard.look().floors[dataset]
    max_bytes = max(1, service.settings.max_backlog_bytes // spec.partitions)
    receipt = append_rows(service.door, spec, chunks, floor=floor, max_bytes=max_bytes)
    stages.end("append")
    service.metrics.label_rows.labels(dataset, "accepted", "").inc(receipt.accepted - receipt.repeated)
    if receipt.repeated:
        service.metrics.label_rows.labels(dataset, "repeated", "").inc(receipt.repeated)
    return answer_body(rows, receipt, rejected=rows.num_refused)
