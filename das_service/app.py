"""The API: takes examples in, hands supervision out, declares what both are about. Imports no torch."""

import gc
import ipaddress
import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI

from das_service.door.auth import load_tokens
from das_service.door.http_protocol import BoundedHttp
from das_service.door.openapi import install_openapi
from das_service.door.problems import RequestWatch, install_problems
from das_service.door.query import refuse_unknown_parameters
from das_service.freed_memory import keep_freed_memory
from das_service.metrics import Metrics, package_version
from das_service.routes import augment, batches, datasets, examples, fms, health, labels, status, supervision
from das_service.routes.fms import ActiveDeclaration, FmDeclaration, ShadowDeclaration, SnapshotDeclaration
from das_service.routes.status import ReplayDeclaration
from das_service.service import build_service
from das_service.settings import Settings, SettingsError
from das_service.supervision.augment_body import AugmentBody
from das_service.supervision.lookup_body import LookupBody
from schemas.dataset import DatasetSpec

log = logging.getLogger("das.api")
_LAST_PORT = 65_535

_BODIES = (
    DatasetSpec,
    FmDeclaration,
    SnapshotDeclaration,
    ActiveDeclaration,
    ShadowDeclaration,
    ReplayDeclaration,
    LookupBody,
    AugmentBody,
)
_DESCRIPTION = (
    "Runs a large teacher (FM) once per example, keeps what it said, and hands it to any trainer, joined to that "
    "trainer's rows, correctly in time. Arrow IPC streams and JSON on every data endpoint; errors are RFC 9457 "
    "problem documents."
)


def create_app(settings: Settings) -> FastAPI:
    """Give the API. Its threads and connections live as long as its lifespan.

    Raises:
        SettingsError: The tokens file can't be used.
    """
    metrics, tokens = Metrics("api"), load_tokens(settings)
    stopping = threading.Event()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        service = build_service(settings, metrics=metrics, tokens=tokens, stopping=stopping)
        try:
            await service.in_thread(service.monitor.start)
            yield {"service": service}
        finally:
            await service.in_thread(service.close)

    app = FastAPI(
        title="Data Augmentation Service",
        version=package_version(),
        summary="Run the teacher once per example, hand its supervision to every student.",
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.stopping = stopping
    install_problems(app)
    app.add_middleware(RequestWatch, metrics=metrics)
    for routes in (datasets, examples, labels, supervision, augment, batches, fms, status):
        app.include_router(routes.router, dependencies=[Depends(refuse_unknown_parameters)])
    app.include_router(health.router)
    install_openapi(app, _BODIES)
    return app


def main(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; give the exit code.

    Raises:
        SettingsError: Anybody on the network could reach it, and there are no tokens.
    """
    describe_access(settings)
    keep_freed_memory()
    server = _Server(server_config(settings))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn has its own, and raises the signal again when it is done
    server.run()
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """A server that lets endless answers end before it waits for the others."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve. What is there by now stays: the collector would go over it for every few batches."""
        await super().startup(sockets=sockets)
        gc.collect()
        gc.freeze()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End. What waits for news ends its answers; not said by the signal's handler, which may wait for no lock."""
        self.config.app.state.stopping.set()  # type: ignore[union-attr]
        await super().shutdown(sockets=sockets)


def server_config(settings: Settings) -> uvicorn.Config:
    """Give how the API is served.

    Raises:
        SettingsError: DAS_BIND has another shape than host:port.
    """
    host, port = parse_bind(settings.bind)
    return uvicorn.Config(
        create_app(settings),
        host=host,
        port=port,
        http=partial(BoundedHttp, wait_seconds=settings.body_timeout_seconds),  # type: ignore[arg-type]
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(settings.drain_seconds),
        backlog=512,
        timeout_keep_alive=75,
    )


def describe_access(settings: Settings) -> str:
    """Give in one line where the API listens and for whom.

    Raises:
        SettingsError: Anybody on the network could reach it, and there are no tokens.
    """
    host, _ = parse_bind(settings.bind)
    num_tokens = len(load_tokens(settings).records)
    if num_tokens:
        return f"http://{settings.bind}, for callers with one of {num_tokens} tokens"
    if is_loopback(host):
        return f"http://{settings.bind}, for this machine alone: there are no tokens (DAS_TOKENS_FILE names them)"
    raise SettingsError(
        f"DAS_BIND {settings.bind} is reachable from other machines and there are no tokens: set DAS_TOKENS_FILE, or "
        "bind to 127.0.0.1"
    )


def parse_bind(bind: str) -> tuple[str, int]:
    """Give host and port of `host:port`; an IPv6 host stands in brackets.

    Raises:
        SettingsError: It has another shape.
    """
    host, _, port = bind.rpartition(":")
    if not host or not port.isdigit() or int(port) > _LAST_PORT:
        raise SettingsError(f"DAS_BIND {bind!r} is not host:port")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Give whether only this machine reaches a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
