"""Why single rows are refused: at most one reason a row, the first that was found, kept as arrays until it is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_LISTED = 1000
_MAX_ID_CHARACTERS = 256

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Reason:
    column: str
    code: str
    message: str


class RowErrors:
    """The refused rows of one request."""

    def __init__(self, num_rows: int) -> None:
        self._reason_of = np.zeros(num_rows, np.int32)
        self._reasons: list[_Reason] = []

    def refuse(self, rows: Mask, *, column: str, code: str, message: str) -> None:
        """Refuse the rows where the mask is set, unless they were refused before."""
        if not rows.any():
            return
        refused = rows & (self._reason_of == 0)
        if refused.any():
            self._reasons.append(_Reason(column, code, message))
            self._reason_of[refused] = len(self._reasons)

    def refuse_rows(self, rows: Sequence[int], *, column: str, code: str, message: str) -> None:
        """Refuse rows by number."""
        if rows:
            mask = np.zeros(len(self._reason_of), np.bool_)
            mask[list(rows)] = True
            self.refuse(mask, column=column, code=code, message=message)

    @property
    def num_refused(self) -> int:
        """Number of refused rows."""
        return int(np.count_nonzero(self._reason_of)) if self._reasons else 0

    def good(self) -> Mask:
        """Give True for the rows that are not refused."""
        good: Mask = self._reason_of == 0
        return good

    def by_code(self) -> dict[str, int]:
        """Give how many rows are refused for each code."""
        counts = np.bincount(self._reason_of, minlength=len(self._reasons) + 1)[1:].tolist()
        by_code: dict[str, int] = {}
        for reason, count in zip(self._reasons, counts, strict=True):
            by_code[reason.code] = by_code.get(reason.code, 0) + count
        return by_code

    def listed(self, example_ids: Sequence[object]) -> list[dict[str, Any]]:
        """Give the first 1,000 refused rows as contract 3 shows them; example_ids has all rows of the request."""
        if not self._reasons:
            return []
        rows = np.flatnonzero(self._reason_of)[:MAX_LISTED].tolist()
        return [
            {
                "row": row,
                "example_id": _readable(example_ids[row]),
                "column": (reason := self._reasons[self._reason_of[row] - 1]).column,
                "code": reason.code,
                "message": reason.message,
            }
            for row in rows
        ]


def _readable(example_id: Any) -> str | None:  # noqa: ANN401 - a str or a pyarrow scalar
    text = example_id.as_py() if hasattr(example_id, "as_py") else example_id
    return text[:_MAX_ID_CHARACTERS] if isinstance(text, str) else None
