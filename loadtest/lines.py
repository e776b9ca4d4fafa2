"""A line of the record: what a stage did and what its floor did, round by round in the same run; medians and spread."""

import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Round:
    """One round: the rows, and how long the stage and its floor took for them, one right after the other."""

    num_rows: int
    seconds: float
    floor_seconds: float


def peak_mb(pid: int | str = "self") -> int:
    """Give the peak of a process's resident memory (Linux).

    Not what getrusage says, whose peak begins with that of the process that started this one.
    """
    (peak_kb,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return round(int(peak_kb) * 1024 / 1e6)


def to_line(rounds: Sequence[Round], **more: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
    """Give the line: median rates, their ratio, and from which to which quartile the rounds spread.

    `ratio` is that of the two medians; its quartiles are of each round's own ratio. The medians may come from different
    rounds, so that the ratio may lie outside its quartiles.
    """
    rates = [r.num_rows / r.seconds for r in rounds]
    floors = [r.num_rows / r.floor_seconds for r in rounds]
    ratios = [r.floor_seconds / r.seconds for r in rounds]
    rate, floor = statistics.median(rates), statistics.median(floors)
    return {
        "rows_per_s": round(rate),
        "floor_rows_per_s": round(floor),
        "ratio": round(rate / floor, 3),
        "quartiles": {
            "rows_per_s": [round(q) for q in _quartiles(rates)],
            "floor_rows_per_s": [round(q) for q in _quartiles(floors)],
            "ratio": [round(q, 3) for q in _quartiles(ratios)],
        },
        "rounds": len(rounds),
        **more,
    }


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def say(text: str) -> None:
    """Tell a person how far it is; stdout is for the record."""
    print(text, file=sys.stderr, flush=True)


def line_text(line: dict[str, Any]) -> str:
    """Give a line as a person reads it."""
    return f"{line['rows_per_s']:,} rows/s, floor {line['floor_rows_per_s']:,}, ratio {line['ratio']:.2f}"
