"""Reasons why a request can't be served; mapped to RFC 9457 problems in one place, problems.py."""

from collections.abc import Mapping


class DasError(Exception):
    """A refusal that the caller is told about, with its code and HTTP status."""

    def __init__(
        self,
        detail: str,
        *,
        code: str,
        http_status: int,
        retry_after_seconds: int | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.http_status = http_status
        self.retry_after_seconds = retry_after_seconds
        self.extra = dict(extra or {})


class BadRequestError(DasError):
    """400: the request can't be read."""

    def __init__(self, detail: str, *, code: str = "malformed") -> None:
        super().__init__(detail, code=code, http_status=400)


class UnknownNameError(DasError):
    """404: no dataset, FM or snapshot of that name."""

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        super().__init__(f"there is no {kind} {name!r}{hint}", code=f"unknown_{kind.lower()}", http_status=404)


class ConflictError(DasError):
    """409: it contradicts what is stored."""

    def __init__(self, detail: str, *, code: str, extra: Mapping[str, object] | None = None) -> None:
        super().__init__(detail, code=code, http_status=409, extra=extra)


class TooLargeError(DasError):
    """413: over a limit that the message names."""

    def __init__(self, detail: str, *, code: str = "too_large", extra: Mapping[str, object] | None = None) -> None:
        super().__init__(detail, code=code, http_status=413, extra=extra)


class InvalidRowsError(DasError):
    """422: nothing was stored because of what the rows hold, or of their schema."""

    def __init__(
        self, detail: str, *, code: str = "schema_mismatch", extra: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(detail, code=code, http_status=422, extra=extra)


class OverloadedError(DasError):
    """429: try again later; the message names what holds things up."""

    def __init__(self, detail: str, *, code: str = "backlog", retry_after_seconds: int = 1) -> None:
        super().__init__(detail, code=code, http_status=429, retry_after_seconds=retry_after_seconds)


class UnavailableError(DasError):
    """503: a dependency is down, or the log does not agree with the tables."""

    def __init__(self, detail: str, *, code: str = "unavailable", retry_after_seconds: int = 2) -> None:
        super().__init__(detail, code=code, http_status=503, retry_after_seconds=retry_after_seconds)


class DiskReserveError(DasError):
    """507: too little disk is left to promise that a row stays."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, code="disk_reserve", http_status=507, retry_after_seconds=30)
