"""What is going on, and what went wrong: status and dead letters."""

import time
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from das_service.dead_letters import list_dead_letters, replay_dead_letters
from das_service.door.auth import Needs
from das_service.door.door import read_declaration
from das_service.door.openapi import declaration_body, problems
from das_service.routes.names import DatasetName, ServiceOf
from das_service.service import Service
from das_service.tables.duck import Duck
from das_service.watch.status import dataset_status, service_status
from schemas.dataset import Name
from schemas.names import NAME_PATTERN

router = APIRouter(tags=["status"])

FmQuery = Annotated[str, Query(pattern=NAME_PATTERN, description="Name of the FM.")]


class FmStatus(BaseModel):
    """How far an FM is.

    scored and failed: rows in its tables; pending: rows in its logs before that, and those it has still to be fed.
    """

    fm: str
    required: bool
    active: str | None
    trained_through: datetime | None
    scored: int
    failed: int
    pending: int
    diverted: int = Field(description="Outcomes that its tables would not take; they lie in dead_chunks.")
    coverage: float | None = Field(description="scored / (scored + failed + pending + diverted).")
    backlog_entries: int
    backlog_bytes: int
    oldest_age_seconds: float


class DatasetStatus(BaseModel):
    """Where a dataset's rows are: accepted = distinct + duplicates + conflicting + diverted + in_log."""

    dataset: str
    accepted: int
    distinct: int
    duplicates: int
    conflicting: int
    diverted: int = Field(description="Accepted and not taken by the table; they lie in dead_chunks.")
    in_log: int = Field(description="Accepted and not committed to the table yet.")
    closed: int = Field(description="Examples whose label windows are over, with their labels.")
    late_labels: int = Field(description="Labels that came after that, or after their window.")
    watermark: datetime | None = Field(
        description="Event time that all partitions were closed up to, less the windows."
    )
    backlog_bytes: int
    fms: dict[str, FmStatus]


class RoleStatus(BaseModel):
    """A process of the service."""

    role: str
    instance: str
    pid: int | None
    restarts: int
    alive: bool
    probe_url: str


class Status(BaseModel):
    """The whole service."""

    version: str
    durability: str
    ready: bool
    problems: list[str]
    notices: list[str] = Field(description="What is wrong and holds no row up: the troubles of shadows.")
    roles: list[RoleStatus]
    datasets: dict[str, DatasetStatus]


class DeadLetter(BaseModel):
    """An example that an FM failed on."""

    example_id: str
    event_time: datetime
    snapshot_id: str | None
    failed_at: datetime | None
    reason: str


class ReplayDeclaration(BaseModel):
    """The body of POST dead-letters/replay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fm: Name
    example_ids: Annotated[tuple[str, ...], Field(fail_fast=True)] | None = Field(
        None, max_length=10_000, description="Default: all."
    )


@router.get("/v1/status", dependencies=[Depends(Needs("read"))], responses=problems(), summary="Status of the service")
async def get_service_status(service: ServiceOf) -> Status:
    """Give what is wrong, which processes run, and how far every dataset is."""
    stated = service_status(service.monitor.findings, service.settings, now=time.monotonic())
    return Status.model_validate({**stated, "datasets": await service.in_thread(_datasets, service)})


def _datasets(service: Service) -> dict[str, dict[str, Any]]:
    catalog, now_us = service.current_catalog(), time.time_ns() // 1000
    return {
        name: dataset_status(service.client, service.tables, catalog, name, now_us=now_us)
        for name in sorted(catalog.datasets)
    }


@router.get(
    "/v1/datasets/{dataset}/status",
    dependencies=[Depends(Needs("read"))],
    responses=problems(404),
    summary="Status of a dataset",
)
async def get_dataset_status(dataset: DatasetName, service: ServiceOf) -> DatasetStatus:
    """Give how far a dataset's rows are."""

    def look() -> dict[str, Any]:
        catalog = service.current_catalog()
        return dataset_status(service.client, service.tables, catalog, dataset, now_us=time.time_ns() // 1000)

    return DatasetStatus.model_validate(await service.in_thread(look))


@router.get(
    "/v1/datasets/{dataset}/dead-letters",
    dependencies=[Depends(Needs("read"))],
    responses=problems(400, 404),
    summary="List dead letters",
)
async def get_dead_letters(
    dataset: DatasetName,
    service: ServiceOf,
    fm: FmQuery,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Most letters.")] = 100,
) -> dict[str, list[DeadLetter]]:
    """Give examples that an FM failed on, with the reasons."""

    def look() -> list[dict[str, Any]]:
        catalog = service.current_catalog()
        catalog.fm(dataset, fm)
        partitions = catalog.spec(dataset).partitions
        return list_dead_letters(service.client, service.tables, dataset, fm, partitions=partitions, limit=limit)

    letters = await service.in_thread(look)
    return {"dead_letters": [DeadLetter.model_validate(letter) for letter in letters]}


@router.post(
    "/v1/datasets/{dataset}/dead-letters/replay",
    dependencies=[Depends(Needs("admin"))],
    responses=problems(400, 404, 413, 415, 422, 429),
    openapi_extra=declaration_body(ReplayDeclaration, {"fm": "teacher"}),
    summary="Try dead letters again",
)
async def post_replay(dataset: DatasetName, request: Request, service: ServiceOf) -> dict[str, int]:
    """Let an FM score its dead letters again, with the snapshot that is active now; gives how many are tried."""
    wanted = await read_declaration(request, ReplayDeclaration, timeout_seconds=service.settings.body_timeout_seconds)
    with service.replays.hold():
        return {"replayed": await service.in_thread(_replay, service, dataset, wanted)}


def _replay(service: Service, dataset: str, wanted: ReplayDeclaration) -> int:
    catalog = service.current_catalog()
    catalog.fm(dataset, wanted.fm)
    duck = Duck(memory_bytes=service.settings.duckdb_memory_bytes)
    try:
        return replay_dead_letters(
            service.door,
            service.tables,
            dataset,
            wanted.fm,
            spec=catalog.spec(dataset),
            epoch=service.guard.floor(dataset).epoch,
            duck=duck,
            example_ids=wanted.example_ids,
        )
    finally:
        duck.close()
