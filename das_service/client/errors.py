"""What a client raises: one family, told apart by what the caller can do about it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class RowError:
    """One row that the service refused. row: its place in what was handed in, from 0."""

    row: int
    example_id: str | None
    column: str | None
    code: str
    message: str


class DasClientError(Exception):
    """A call that failed. status: HTTP status, None where no answer came; code: the service's name of the reason.

    retryable: the same call may succeed later. problem: the body of the answer (RFC 9457), empty where none came.
    """

    def __init__(
        self,
        detail: str,
        *,
        code: str,
        status: int | None = None,
        retryable: bool = False,
        problem: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.status = status
        self.retryable = retryable
        self.problem = dict(problem or {})

    @property
    def errors(self) -> tuple[RowError, ...]:
        """The refused rows that the answer names, the first 1,000."""
        return parse_row_errors(self.problem)


class UnreachableError(DasClientError):
    """No answer came before the deadline: the service is down, or the address is wrong."""


class UnavailableError(DasClientError):
    """The service answered, until the deadline, that it can't serve now (429, 502, 503, 504)."""


class RowsRefusedError(DasClientError):
    """422: none of the rows was taken; `errors` says why, row by row, where the values are the reason."""


class NotFoundError(DasClientError):
    """404: no dataset, FM or snapshot of that name."""


class ConflictError(DasClientError):
    """409: it contradicts what is stored; `problem` may hold the `differences`."""


class LostRaceError(DasClientError):
    """412: somebody else changed it first; read it again and decide again."""


class SnapshotRejectedError(DasClientError):
    """A worker looked at the snapshot and refused it; the message has the reasons."""


_BY_STATUS: dict[int, type[DasClientError]] = {
    404: NotFoundError,
    409: ConflictError,
    412: LostRaceError,
    422: RowsRefusedError,
    429: UnavailableError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
}


def problem_error(status: int, problem: Mapping[str, Any]) -> DasClientError:
    """Give the exception for an error answer; `problem` is its JSON body, empty where there was none."""
    kind = _BY_STATUS.get(status, DasClientError)
    title = problem.get("title") or f"the service answered {status}"
    return kind(
        str(problem.get("detail") or title),
        code=str(problem.get("code") or f"http_{status}"),
        status=status,
        retryable=bool(problem.get("retryable", kind is UnavailableError)),
        problem=problem,
    )


def count_from(error: DasClientError, first_row: int) -> DasClientError:
    """Give the refusal of a piece of a table with its rows counted from the table's first; itself where none is named.

    first_row: of the piece, in the table.
    """
    found = parse_row_errors(error.problem) if error.code == "invalid_rows" else ()
    if first_row == 0 or not found:
        return error
    moved = [replace(each, row=each.row + first_row) for each in found]
    told = "; ".join(f"{each.column}: {each.message}, the first is row {each.row}" for each in moved)
    problem = {**error.problem, "detail": told, "errors": [asdict(each) for each in moved]}
    return problem_error(error.status or 0, problem)


def parse_row_errors(body: Mapping[str, Any]) -> tuple[RowError, ...]:
    """Give the row errors of an answer, empty where it names none."""
    return tuple(
        RowError(
            row=int(error.get("row", -1)),
            example_id=error.get("example_id"),
            column=error.get("column"),
            code=str(error.get("code", "")),
            message=str(error.get("message", "")),
        )
        for error in body.get("errors") or ()
        if isinstance(error, Mapping)
    )
