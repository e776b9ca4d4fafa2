"""Who may do what: bearer tokens with scopes, from a file that holds their SHA-256 only. Without tokens all may all."""

import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from fastapi import Request
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from das_service.errors import DasError
from das_service.settings import Settings, SettingsError

Scope = Literal["ingest", "read", "admin"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
LOOPBACK = "loopback"


class _TokenRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: frozenset[Scope]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens that this service knows; empty: there is no authentication."""

    records: tuple[_TokenRecord, ...]

    def name_of(self, token: str) -> str:
        """Give the name of a token that is known, '' of another."""
        digest = hashlib.sha256(token.encode()).hexdigest()
        return next((record.name for record in self.records if hmac.compare_digest(record.sha256, digest)), "")

    def scopes_of(self, token: str) -> frozenset[Scope] | None:
        """Give what a token allows, None if it is not known. Every record is compared, in constant time."""
        digest = hashlib.sha256(token.encode()).hexdigest()
        found: frozenset[Scope] | None = None
        for record in self.records:
            if hmac.compare_digest(record.sha256, digest):
                found = record.scopes if found is None else found | record.scopes
        return found


def load_tokens(settings: Settings) -> Tokens:
    """Give the tokens of DAS_TOKENS_FILE, and DAS_TOKEN as one that allows everything.

    Raises:
        SettingsError: The file can't be read or does not have the shape that settings.py states.
    """
    records: list[_TokenRecord] = []
    if settings.tokens_file is not None:
        try:
            content = json.loads(settings.tokens_file.read_bytes())
            records += TypeAdapter(list[_TokenRecord]).validate_python(content)
        except (OSError, ValueError, ValidationError) as error:
            reason = str(error) if isinstance(error, OSError) else "it is not a list of {name, sha256, scopes}"
            raise SettingsError(f"DAS_TOKENS_FILE {settings.tokens_file}: {reason}") from None
        if not records:
            raise SettingsError(f"DAS_TOKENS_FILE {settings.tokens_file} has no token")
    if settings.token is not None:
        digest = hashlib.sha256(settings.token.get_secret_value().encode()).hexdigest()
        records.append(_TokenRecord(name="DAS_TOKEN", sha256=digest, scopes=SCOPES))
    return Tokens(tuple(records))


class Needs(HTTPBearer):
    """Dependency: the caller has this scope. `request.state.caller` then names it: its token, or LOOPBACK."""

    def __init__(self, scope: Scope) -> None:
        super().__init__(
            scheme_name=HTTPBearer.__name__,
            description="A token of DAS_TOKENS_FILE with the scope that a call needs.",
            auto_error=False,
        )
        self.scope = scope

    async def __call__(self, request: Request) -> None:  # type: ignore[override] # who it is stands in the state
        """Refuse the request if its token does not allow it.

        Raises:
            DasError: 401 without a known token, 403 without the scope.
        """
        tokens: Tokens = request.state.service.tokens
        request.state.caller = LOOPBACK
        if not tokens.records:
            return
        credentials = await super().__call__(request)
        scopes = None if credentials is None else tokens.scopes_of(credentials.credentials)
        if scopes is None:
            raise DasError(
                "this call needs a bearer token that the service knows", code="unauthenticated", http_status=401,
                extra={"www_authenticate": 'Bearer realm="das"'},
            )  # fmt: skip
        if self.scope not in scopes:
            raise DasError(
                f"the token does not have the scope {self.scope!r}", code="forbidden", http_status=403,
                extra={"www_authenticate": f'Bearer realm="das", error="insufficient_scope", scope="{self.scope}"'},
            )  # fmt: skip
        if credentials is not None:
            request.state.caller = tokens.name_of(credentials.credentials)


async def caller_of(request: Request) -> str:
    """Name who makes a request, once `Needs` has let it in: a dependency of routes that write it down."""
    caller: str = request.state.caller
    return caller
