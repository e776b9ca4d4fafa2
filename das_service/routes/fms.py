"""Declaring FMs, registering their snapshots, and choosing which one scores."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from das_service.audit import AuditAction, read_audit
from das_service.declarations import declared_fm
from das_service.door.auth import Needs, caller_of
from das_service.door.door import read_declaration
from das_service.door.openapi import declaration_body, problems
from das_service.registry import Catalog, FmRecord, SnapshotRecord, SnapshotState
from das_service.routes.names import DatasetName, FmName, ServiceOf, SnapshotName
from das_service.service import Service
from das_service.snapshot_life import active_etag, shadow_etag
from schemas.gates import GateReport
from schemas.names import SNAPSHOT_ID_PATTERN

IfMatch = Annotated[str | None, Header(description="ETag of the state that the decision was made on.")]
Caller = Annotated[str, Depends(caller_of)]

router = APIRouter(prefix="/v1/datasets/{dataset}/fms", tags=["FMs and snapshots"])


class FmDeclaration(BaseModel):
    """The body of PUT fms/{fm}."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    required: bool = Field(default=True, description="Its unscored examples stay in the log and count as unfinished.")


class FmAnswer(BaseModel):
    """A declared FM. outputs are fixed by its first snapshot."""

    fm: str
    required: bool
    outputs: dict[str, Any] | None = Field(description="tasks, and embeddings as name: [size, codec].")
    active: str | None = Field(description="The snapshot that scores now.")
    was_active: list[str] = Field(description="Those that scored before, the latest last.")
    shadow: str | None = Field(description="The snapshot that scores a share of the examples beside the active one.")
    shadow_share: float
    trained_through: datetime | None = Field(description="Exclusive: labels from here on are not in the active one.")
    snapshots: list[str] = Field(description="Ids in the order of their registration.")


class SnapshotDeclaration(BaseModel):
    """The body of POST snapshots."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    snapshot_id: Annotated[str, Field(pattern=SNAPSHOT_ID_PATTERN)]
    uri: Annotated[str, Field(min_length=1, max_length=4096, description="A folder under DAS_SNAPSHOTS_URI.")]
    sha256: Annotated[str, Field(pattern=r"^(sha256:)?[0-9a-fA-F]{64}$", description="Of its snapshot.json.")]

    @field_validator("sha256")
    @classmethod
    def _plain_hex(cls, value: str) -> str:
        return value.removeprefix("sha256:").lower()


class SnapshotAnswer(BaseModel):
    """A registered snapshot."""

    snapshot_id: str
    uri: str
    sha256: str
    state: SnapshotState
    reasons: list[str] = Field(description="Why it was rejected.")
    trained_through: datetime | None
    registered_at: datetime
    gate: GateReport | None = Field(description="How it did on recent labelled examples beside the active one then.")


class ActiveDeclaration(BaseModel):
    """The body of PUT active."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    snapshot_id: Annotated[str, Field(pattern=SNAPSHOT_ID_PATTERN)]


class ActiveAnswer(BaseModel):
    """Which snapshot scores. generation grows when a snapshot is withdrawn."""

    snapshot_id: str | None
    generation: int


class ShadowDeclaration(BaseModel):
    """The body of PUT shadow."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    snapshot_id: Annotated[str, Field(pattern=SNAPSHOT_ID_PATTERN)]
    share: float = Field(default=0.1, gt=0, le=1, description="Share of the examples that it scores, chosen by id.")


class ShadowAnswer(BaseModel):
    """Which snapshot scores a share of the examples beside the active one, null where none does."""

    snapshot_id: str | None
    share: float


class AuditEntry(BaseModel):
    """A change of an FM or of one of its snapshots. before and after hold what differs."""

    at: datetime
    who: str = Field(description="Name of the token, `loopback` where there are none, or the worker that judged.")
    what: AuditAction
    snapshot_id: str | None
    before: dict[str, Any]
    after: dict[str, Any]


async def _catalog(service: Service) -> Catalog:
    return await service.in_thread(service.current_catalog)


@router.put(
    "/{fm}",
    dependencies=[Depends(Needs("admin"))],
    responses={201: {"model": FmAnswer, "description": "Created."}, **problems(400, 404, 413, 415, 422)},
    openapi_extra=declaration_body(FmDeclaration, {"required": True}),
    summary="Declare an FM",
)
async def put_fm(
    dataset: DatasetName, fm: FmName, request: Request, response: Response, service: ServiceOf, caller: Caller
) -> FmAnswer:
    """Declare an FM of a dataset. Examples from now on are pending for it."""
    wanted = await read_declaration(request, FmDeclaration, timeout_seconds=service.settings.body_timeout_seconds)
    record, is_new = await service.in_thread(
        service.declarations.put_fm, dataset, fm, required=wanted.required, who=caller
    )
    response.status_code = 201 if is_new else 200
    return _fm_answer(await _catalog(service), dataset, record)


@router.get("/{fm}", dependencies=[Depends(Needs("read"))], responses=problems(404), summary="Read an FM")
async def get_fm(dataset: DatasetName, fm: FmName, service: ServiceOf) -> FmAnswer:
    """Give an FM: its outputs, its active snapshot."""
    catalog = await _catalog(service)
    return _fm_answer(catalog, dataset, catalog.fm(dataset, fm))


@router.get("", dependencies=[Depends(Needs("read"))], responses=problems(404), summary="List FMs")
async def list_fms(dataset: DatasetName, service: ServiceOf) -> dict[str, list[FmAnswer]]:
    """Give the FMs of a dataset."""
    catalog = await _catalog(service)
    catalog.spec(dataset)
    records = catalog.fms.get(dataset, {})
    return {"fms": [_fm_answer(catalog, dataset, records[name]) for name in sorted(records)]}


def _fm_answer(catalog: Catalog, dataset: str, record: FmRecord) -> FmAnswer:
    return FmAnswer.model_validate(declared_fm(catalog, dataset, record))


@router.post(
    "/{fm}/snapshots",
    status_code=202,
    dependencies=[Depends(Needs("admin"))],
    responses=problems(400, 404, 409, 413, 415, 422),
    openapi_extra=declaration_body(
        SnapshotDeclaration, {"snapshot_id": "s1", "uri": "/var/das/snapshots/ads/teacher/s1", "sha256": "0" * 64}
    ),
    summary="Register a snapshot",
)
async def post_snapshot(
    dataset: DatasetName, fm: FmName, request: Request, service: ServiceOf, caller: Caller
) -> SnapshotAnswer:
    """Register a snapshot that lies under DAS_SNAPSHOTS_URI; a worker validates it and sets its state."""
    wanted = await read_declaration(request, SnapshotDeclaration, timeout_seconds=service.settings.body_timeout_seconds)
    record = await service.in_thread(
        service.declarations.register_snapshot, dataset, fm,
        snapshot_id=wanted.snapshot_id, uri=wanted.uri, sha256=wanted.sha256, who=caller,
    )  # fmt: skip
    catalog = await _catalog(service)
    return _snapshot_answer(catalog.snapshot(dataset, fm, record.snapshot_id))


@router.get("/{fm}/snapshots", dependencies=[Depends(Needs("read"))], responses=problems(404), summary="List snapshots")
async def list_snapshots(dataset: DatasetName, fm: FmName, service: ServiceOf) -> dict[str, list[SnapshotAnswer]]:
    """Give an FM's snapshots in the order of their registration."""
    catalog = await _catalog(service)
    known = catalog.snapshots.get(dataset, {}).get(fm, {})
    names = [name for name in catalog.fm(dataset, fm).snapshots if name in known]
    return {"snapshots": [_snapshot_answer(catalog.snapshot(dataset, fm, name)) for name in names]}


@router.get(
    "/{fm}/snapshots/{snapshot_id}",
    dependencies=[Depends(Needs("read"))],
    responses=problems(404),
    summary="Read a snapshot",
)
async def get_snapshot(
    dataset: DatasetName, fm: FmName, snapshot_id: SnapshotName, service: ServiceOf
) -> SnapshotAnswer:
    """Give a snapshot: its state, and why it was rejected."""
    return _snapshot_answer((await _catalog(service)).snapshot(dataset, fm, snapshot_id))


@router.post(
    "/{fm}/snapshots/{snapshot_id}/retire",
    dependencies=[Depends(Needs("admin"))],
    responses=problems(404, 409, 422),
    summary="Retire a snapshot",
)
async def post_retire(
    dataset: DatasetName, fm: FmName, snapshot_id: SnapshotName, service: ServiceOf, caller: Caller
) -> SnapshotAnswer:
    """Let a snapshot never score again. What it said stays readable; 409 for the active one and for the shadow."""
    return _snapshot_answer(
        await service.in_thread(service.declarations.retire, dataset, fm, snapshot_id, who=caller)
    )  # fmt: skip


def _snapshot_answer(record: SnapshotRecord) -> SnapshotAnswer:
    return SnapshotAnswer(
        snapshot_id=record.snapshot_id, uri=record.uri, sha256=record.sha256, state=record.state,
        reasons=list(record.reasons), trained_through=record.trained_through, registered_at=record.registered_at,
        gate=record.gate,
    )  # fmt: skip


@router.get(
    "/{fm}/active", dependencies=[Depends(Needs("read"))], responses=problems(404), summary="Read which snapshot scores"
)
async def get_active(dataset: DatasetName, fm: FmName, response: Response, service: ServiceOf) -> ActiveAnswer:
    """Give which snapshot scores; its ETag goes into If-Match of a change."""
    return _active_answer((await _catalog(service)).fm(dataset, fm), response)


@router.put(
    "/{fm}/active",
    dependencies=[Depends(Needs("admin"))],
    responses=problems(400, 404, 409, 412, 413, 415, 422),
    openapi_extra=declaration_body(ActiveDeclaration, {"snapshot_id": "s1"}),
    summary="Choose which snapshot scores",
)
async def put_active(
    dataset: DatasetName,
    fm: FmName,
    request: Request,
    response: Response,
    service: ServiceOf,
    caller: Caller,
    if_match: IfMatch = None,
) -> ActiveAnswer:
    """Let a validated snapshot score from now on.

    Naming one that was active before rolls back: the one that is withdrawn can't publish any more. With If-Match, the
    loser of a race gets 412; without it, whoever loses to another activation of the same moment.
    """
    wanted = await read_declaration(request, ActiveDeclaration, timeout_seconds=service.settings.body_timeout_seconds)
    record = await service.in_thread(
        service.declarations.activate, dataset, fm, wanted.snapshot_id, if_match=if_match, who=caller
    )
    return _active_answer(record, response)


@router.post(
    "/{fm}/rollback",
    dependencies=[Depends(Needs("admin"))],
    responses=problems(404, 409, 412, 422),
    summary="Roll back to the snapshot before",
)
async def post_rollback(
    dataset: DatasetName,
    fm: FmName,
    response: Response,
    service: ServiceOf,
    caller: Caller,
    if_match: IfMatch = None,
) -> ActiveAnswer:
    """Let the snapshot score that was active before the present one, which can't publish any more.

    409 where none was, or where those before it are retired.
    """
    record = await service.in_thread(service.declarations.roll_back, dataset, fm, if_match=if_match, who=caller)
    return _active_answer(record, response)


@router.get(
    "/{fm}/shadow", dependencies=[Depends(Needs("read"))], responses=problems(404), summary="Read which is the shadow"
)
async def get_shadow(dataset: DatasetName, fm: FmName, response: Response, service: ServiceOf) -> ShadowAnswer:
    """Give which snapshot scores beside the active one; its ETag goes into If-Match of a change."""
    return _shadow_answer((await _catalog(service)).fm(dataset, fm), response)


@router.put(
    "/{fm}/shadow",
    dependencies=[Depends(Needs("admin"))],
    responses=problems(400, 404, 409, 412, 413, 415, 422),
    openapi_extra=declaration_body(ShadowDeclaration, {"snapshot_id": "s2", "share": 0.1}),
    summary="Let a snapshot score beside the active one",
)
async def put_shadow(
    dataset: DatasetName,
    fm: FmName,
    request: Request,
    response: Response,
    service: ServiceOf,
    caller: Caller,
    if_match: IfMatch = None,
) -> ShadowAnswer:
    """Let a validated snapshot score a share of the examples beside the active one.

    Its supervision is stored and not served, unless a caller asks for that snapshot by name. Another shadow ends.
    """
    wanted = await read_declaration(request, ShadowDeclaration, timeout_seconds=service.settings.body_timeout_seconds)
    record = await service.in_thread(
        service.declarations.shadow, dataset, fm, wanted.snapshot_id, wanted.share, if_match=if_match, who=caller
    )
    return _shadow_answer(record, response)


@router.delete(
    "/{fm}/shadow",
    dependencies=[Depends(Needs("admin"))],
    responses=problems(404, 412),
    summary="End the shadow",
)
async def delete_shadow(
    dataset: DatasetName,
    fm: FmName,
    response: Response,
    service: ServiceOf,
    caller: Caller,
    if_match: IfMatch = None,
) -> ShadowAnswer:
    """Let no snapshot score beside the active one any more. What the shadow said stays stored."""
    record = await service.in_thread(service.declarations.end_shadow, dataset, fm, if_match=if_match, who=caller)
    return _shadow_answer(record, response)


@router.get("/{fm}/audit", dependencies=[Depends(Needs("read"))], responses=problems(404), summary="Read who did what")
async def get_audit(dataset: DatasetName, fm: FmName, service: ServiceOf) -> dict[str, list[AuditEntry]]:
    """Give the last 256 changes of an FM and its snapshots, the oldest first."""
    (await _catalog(service)).fm(dataset, fm)
    entries = await service.in_thread(read_audit, service.client, dataset, fm)
    return {"entries": [AuditEntry.model_validate(entry) for entry in entries]}


def _active_answer(record: FmRecord, response: Response) -> ActiveAnswer:
    response.headers["ETag"] = active_etag(record)
    return ActiveAnswer(snapshot_id=record.active, generation=record.generation)


def _shadow_answer(record: FmRecord, response: Response) -> ShadowAnswer:
    response.headers["ETag"] = shadow_etag(record)
    return ShadowAnswer(snapshot_id=record.shadow, share=record.shadow_share)
