"""Rows that a model fails on, told apart from their neighbours by trying ever smaller ranges.

A model may raise, give no number, or end the process. Before each forward over a suspect entry the range is written
down; whoever takes the entry over after a death knows which range was being tried, tries its parts, and so comes down
to single rows, while every other row is scored. A device that fails on an empty question too is broken, and nothing is
held against the rows.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Range = tuple[int, int]
_PARTS = 8
ENDED_THE_PROCESS = "the model ended the process on this row"


@dataclass(slots=True)
class Attempt:
    """How far the trial of one entry is. todo: ranges still to be tried; trying: the one that a forward is running on.

    A process tries every row itself: ranges that another found good before it died come last.
    """

    todo: list[Range]
    trying: Range | None = None
    killers: list[int] = field(default_factory=list)
    accused: list[int] = field(default_factory=list)

    def to_json(self) -> str:
        """Give what the server keeps."""
        return json.dumps({"todo": self.todo, "trying": self.trying, "killers": self.killers, "accused": self.accused})


def resume_attempt(text: bytes | None, num_rows: int) -> Attempt:
    """Give the attempt to go on with: a new one, or what a process that died left behind."""
    if text is None:
        return Attempt(todo=[(0, num_rows)])
    record = json.loads(text)
    attempt = Attempt(
        todo=[(lo, hi) for lo, hi in record["todo"]], killers=list(record["killers"]), accused=list(record["accused"])
    )
    trying: list[Range] = [] if record["trying"] is None else [tuple(record["trying"])]
    good = _others([*attempt.todo, *trying], num_rows)
    for lo, hi in trying:
        if hi - lo == 1 and lo in attempt.accused:
            attempt.killers.append(lo)
        elif hi - lo == 1:  # it may have been another's SIGKILL: a row is held to blame for the second death
            attempt.accused.append(lo)
            attempt.todo.insert(0, (lo, hi))
        else:
            attempt.todo = split(lo, hi) + attempt.todo
    attempt.todo += good  # their outputs died with the process, and they may yet kill this one
    return attempt


def _others(ranges: Sequence[Range], num_rows: int) -> list[Range]:
    """Give the ranges of [0, num_rows) that lie between these."""
    edges = [(0, 0), *sorted(ranges), (num_rows, num_rows)]
    return [(hi, lo) for (_, hi), (lo, _) in pairwise(edges) if hi < lo]


def split(lo: int, hi: int) -> list[Range]:
    """Give up to eight parts of a range of two or more rows."""
    edges = np.unique(np.linspace(lo, hi, min(_PARTS, hi - lo) + 1).astype(int)).tolist()
    return list(pairwise(edges))


class RowsFailedError(Exception):
    """The model answered, and these rows (places in the rows asked about) have no usable answer, all for a reason."""

    def __init__(self, reason: str, rows: tuple[int, ...]) -> None:
        super().__init__(reason)
        self.reason = reason
        self.rows = rows


def try_rows(
    attempt: Attempt,
    wanted: NDArray[np.int64],
    *,
    note: Callable[[Attempt], None],
    forward: Callable[[NDArray[np.int64]], None],
) -> dict[int, str]:
    """Find the rows of an entry that the model fails on; give row -> reason. Every other wanted row was in a forward.

    wanted: rows to score, ascending. note stores the attempt before each forward; forward raises what the model raises,
    RowsFailedError where it is known which rows are at fault.
    """
    failed = dict.fromkeys(attempt.killers, ENDED_THE_PROCESS)
    while attempt.todo:
        lo, hi = attempt.todo.pop(0)
        rows = np.array([row for row in wanted[(wanted >= lo) & (wanted < hi)] if int(row) not in failed], np.int64)
        if len(rows) == 0:
            continue
        attempt.trying = (lo, hi)
        note(attempt)
        try:
            forward(rows)
        except RowsFailedError as error:
            failed.update({int(rows[place]): error.reason for place in error.rows})
            attempt.todo.insert(0, (lo, hi))
        except Exception as error:  # noqa: BLE001 - whatever a model raises is held against its rows
            if len(rows) == 1:
                failed[int(rows[0])] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
                    :500
                ]
            else:
                attempt.todo = split(int(rows[0]), int(rows[-1]) + 1) + attempt.todo
        attempt.trying = None
    note(attempt)  # a death from here on is no row's fault
    return failed
