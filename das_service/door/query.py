"""The query part of a URL: a parameter that a route does not know is refused, as it may be a misspelt one."""

from fastapi import Request

from das_service.errors import BadRequestError


async def refuse_unknown_parameters(request: Request) -> None:
    """Let through what the OpenAPI document says of the route: a dependency of all routes that ask for something.

    Raises:
        BadRequestError: There is a parameter that it does not say.
    """
    if not request.query_params:
        return
    operation = request.app.openapi()["paths"][request.scope["route"].path_format][request.method.lower()]
    known = [one["name"] for one in operation.get("parameters", []) if one["in"] == "query"]
    unknown = sorted(set(request.query_params) - set(known))
    if unknown:
        names = ", ".join(known) or "no query parameters"
        raise BadRequestError(f"query.{unknown[0]}: not a parameter here; this route takes {names}")
