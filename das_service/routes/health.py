"""Probes and metrics: open to all, and without data."""

import time

import anyio
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from das_service.routes.names import ServiceOf
from das_service.watch.readiness import readiness_problems, service_notices, write_probe

router = APIRouter(tags=["health"])
_PROBE_SECONDS = 2.0

_NOT_READY = {
    "description": "Not ready; `problems` says why, in plain words.",
    "content": {"application/json": {"example": {"ready": False, "problems": ["no sink is alive: ..."]}}},
}


@router.get("/health/live", summary="Is the process alive")
async def get_live() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "alive"}


@router.get("/health/ready", responses={503: _NOT_READY}, response_class=JSONResponse, summary="Can work be done now")
async def get_ready(service: ServiceOf) -> JSONResponse:
    """Say whether rows can be taken, scored and committed now, after a write to the server."""
    problems = readiness_problems(service.monitor.findings, service.settings, now=time.monotonic())
    failure: str | None = f"a write to the Redis or Valkey server did not begin within {_PROBE_SECONDS:g} s"
    with anyio.move_on_after(_PROBE_SECONDS):  # what has begun ends by the connection's own time-out
        failure = await service.in_probe_thread(write_probe, service.ready)
    if failure is not None:
        problems = [failure, *problems]
    body = {
        "ready": not problems,
        "problems": problems,
        "notices": service_notices(service.monitor.findings),
        "durability": service.settings.durability,
    }
    return JSONResponse(body, status_code=503 if problems else 200)


@router.get("/metrics", response_class=Response, summary="Metrics for Prometheus")
async def get_metrics(service: ServiceOf) -> Response:
    """Give the metrics of this process."""
    # what the monitor has found, without a write to the server: a scrape must not hang with a dependency
    problems = readiness_problems(service.monitor.findings, service.settings, now=time.monotonic())
    service.metrics.ready.set(not problems)
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
