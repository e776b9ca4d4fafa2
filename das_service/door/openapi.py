"""What OpenAPI can't read from the routes: bodies that the routes read themselves, and the problem document."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from schemas.wire import ARROW_STREAM, JSON, PROBLEM_JSON

_REF = "#/components/schemas/{model}"


class Problem(BaseModel):
    """RFC 9457 problem document. Members beyond these depend on `code`."""

    type: str = Field(examples=["urn:das:problem:unknown_dataset"])
    title: str
    status: int
    detail: str = Field(description="What, which, and what to do.")
    instance: str = Field(description="The path; for a defect of the service an id that its log knows.")
    code: str = Field(description="The reason, stable, for programs.")
    retryable: bool = Field(description="The same call may succeed later.")


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Give the `responses` entry of a route for the problems that it answers with."""
    words = {
        400: "The request can't be read.",
        401: "No token that the service knows.",
        403: "The token lacks the scope.",
        404: "No such dataset, FM or snapshot.",
        406: "None of the media types that the caller takes can be given.",
        408: "The body came too slowly.",
        409: "It contradicts what is stored.",
        410: "What a cursor is about is gone.",
        412: "Somebody else changed it first.",
        413: "Over a limit that `detail` names.",
        415: "The body has a media type that is not read.",
        422: "The rows or the declaration are refused; nothing was stored.",
        429: "Overload or backlog; `detail` names what holds things up. Retry-After says when to come back.",
        503: "A dependency is down, or the log does not agree with the tables (`log_lost`, `log_rewound`).",
        507: "Too little disk is left (`disk_reserve`).",
    }
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": words[status], "content": {PROBLEM_JSON: {"schema": schema}}}
        for status in sorted({*statuses, 400, 401, 403, 503})
    }


def declaration_body(model: type[BaseModel], example: Mapping[str, Any]) -> dict[str, Any]:
    """Give the `openapi_extra` of a route that reads a JSON body itself."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    content = {JSON: {"schema": schema, "example": dict(example)}}
    return {"requestBody": {"required": True, "content": content}}


def data_body(json_schema: Mapping[str, Any], example: Any, arrow: str) -> dict[str, Any]:  # noqa: ANN401 - any JSON
    """Give the `openapi_extra` of a route that takes Arrow or JSON; `arrow` describes the Arrow columns."""
    content = {
        ARROW_STREAM: {"schema": {"type": "string", "format": "binary", "description": arrow}},
        JSON: {"schema": dict(json_schema), "example": example},
    }
    return {"requestBody": {"required": True, "content": content}}


def install_openapi(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Give the app an OpenAPI 3.1 document that also holds the models of bodies that routes read themselves."""

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, summary=app.summary, description=app.description,
                routes=app.routes, tags=app.openapi_tags,
            )  # fmt: skip
            models: list[type[BaseModel]] = [*bodies, Problem]
            _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name, schema in definitions["$defs"].items():
                schemas.setdefault(name, schema)
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            _drop_default_422(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def _drop_default_422(document: dict[str, Any]) -> None:
    """FastAPI adds its own 422 to every route with parameters; ours are problems and stand where they apply."""
    for path in document["paths"].values():
        for operation in path.values():
            content = operation["responses"].get("422", {}).get("content", {})
            if JSON in content and PROBLEM_JSON not in content:
                del operation["responses"]["422"]
