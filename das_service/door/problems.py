"""Every error as RFC 9457 problem+json, mapped in this one place; and the time and code of every request."""

import json
import logging
import time
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import redis
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from das_service.errors import DasError
from das_service.metrics import Metrics
from das_service.redis_client import UNREACHABLE
from schemas.wire import PROBLEM_JSON

log = logging.getLogger("das.api")

_CODES = {404: "not_found", 405: "method_not_allowed", 406: "not_acceptable", 413: "too_large", 415: "media_type"}
_RETRYABLE = {408, 425, 429, 502, 503, 504, 507}
_STORE_WORDS = ("MISCONF", "READONLY", "NOAUTH", "WRONGPASS", "CLUSTERDOWN", "MASTERDOWN", "NOREPLICAS", "LOADING")


def problem(
    *,
    status: int,
    code: str,
    detail: str,
    instance: str,
    headers: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Response:
    """Give the problem document as a response."""
    body = {
        "type": f"urn:das:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": instance,
        "code": code,
        "retryable": status in _RETRYABLE,
        **(extra or {}),
    }
    content = json.dumps(body, default=str).encode()
    return Response(content, status_code=status, media_type=PROBLEM_JSON, headers=dict(headers or {}))


def install_problems(app: FastAPI) -> None:
    """Map exceptions to problems."""
    app.add_exception_handler(DasError, _das_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(redis.exceptions.RedisError, _store_error)


async def _das_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DasError)  # noqa: S101 - what it is registered for
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if error.http_status in {408, 413}:
        headers["Connection"] = "close"  # the rest of the body may still be on its way
    challenge = error.extra.pop("www_authenticate", None)
    if challenge is not None:
        headers["WWW-Authenticate"] = str(challenge)
    return problem(
        status=error.http_status, code=error.code, detail=error.detail, instance=request.url.path,
        headers=headers, extra=error.extra,
    )  # fmt: skip


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    code = _CODES.get(error.status_code, "malformed" if error.status_code == 400 else "refused")
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = _allowed_methods(request) or headers.get("Allow", "")
    return problem(
        status=error.status_code, code=code, detail=str(error.detail), instance=request.url.path, headers=headers
    )


def _allowed_methods(request: Request) -> str:
    """Give all methods of a path; the router's own Allow has those of one of its routes alone."""
    paths = request.app.openapi()["paths"].items()
    found = [operations for template, operations in paths if compile_path(template)[0].match(request.scope["path"])]
    return ", ".join(sorted({method.upper() for operations in found for method in operations}))


async def _invalid_request(request: Request, error: Exception) -> Response:
    """A name in the path that none can have is unknown (404) or can't be declared (422); a bad query is malformed."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - what it is registered for
    errors = [{"field": ".".join(map(str, item["loc"])), "message": item["msg"]} for item in error.errors()]
    detail = "; ".join(f"{item['field']}: {item['message']}" for item in errors[:5])
    status, code = 400, "malformed"
    if any(item["loc"][0] == "path" for item in error.errors()):
        status, code = (422, "bad_name") if request.method in {"PUT", "POST"} else (404, "not_found")
    return problem(status=status, code=code, detail=detail, instance=request.url.path, extra={"errors": errors})


async def _store_error(request: Request, error: Exception) -> Response:
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        detail, code, status = "the online store is at its maxmemory", "memory", 429
    elif isinstance(error, UNREACHABLE) or str(error).startswith(_STORE_WORDS):
        detail, code, status = f"the Redis or Valkey server can't be used: {_cause(error)}", "unavailable", 503
    else:
        return own_bug(request.scope, error)
    return problem(status=status, code=code, detail=detail, instance=request.url.path, headers={"Retry-After": "2"})


def _cause(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200] or type(error).__name__


def own_bug(scope: Scope, error: Exception) -> Response:
    """Give a 500 that says nothing but an id, under which the log has everything."""
    instance = f"urn:uuid:{uuid.uuid4()}"
    log.error("%s %s failed, instance %s", scope.get("method"), scope.get("path"), instance, exc_info=error)
    detail = "the service has a defect; its log has the details under this instance id"
    return problem(status=500, code="internal", detail=detail, instance=instance)


class RequestWatch:
    """ASGI middleware: measures every request by route and code, and answers for our own bugs."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_at = time.perf_counter()
        status = 0

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except ClientDisconnect:
            log.debug("the caller of %s went away", scope["path"])
        except Exception as error:  # noqa: BLE001 - the border: the caller gets a problem, the log gets the rest
            response = own_bug(scope, error)
            if status == 0:
                await response(scope, receive, noting_send)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            seconds = time.perf_counter() - started_at
            self._metrics.request_seconds.labels(route, str(status or 499)).observe(seconds)
