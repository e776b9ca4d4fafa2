"""The plots of the ExFM experiment."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.exfm_plan import METHODS, MIDDLE, TEACHERS
from experiments.exfm_words import NAMES
from experiments.plots import STYLE

_COLORS: Final = {
    "single": "#1f5fa8", "ah": "#b3541e", "ah_scaled": "#3a7d44", "ah_sa": "#7a4ea3", "single_sa": "#b8912b",
}  # fmt: skip


def plot_lags(path: Path, record: Mapping[str, Any]) -> None:
    """Write a PNG: each method's change of NE against the teacher's lag, a panel per student."""
    found = [
        c for c in record["comparisons"] if (c["control"], c["teacher_size"], c["against"]) == (None, MIDDLE, "none")
    ]
    lags = list(dict.fromkeys(c["lag_weeks"] for c in found))
    _panels(
        path,
        sorted({c["student"] for c in found}, reverse=True),
        "What supervision changes, by how far the teacher lags behind",
        lambda axes, student: _draw(
            axes,
            [c for c in found if c["student"] == student],
            places={lag: i for i, lag in enumerate(lags)},
            of="lag_weeks",
            value="ne_delta",
        ),
        ticks=[str(lag) if lag == "frozen" else f"{lag} weeks" for lag in lags],
        labels=("lag of the teacher", "change of NE\n(below 0 is better)"),
    )


def plot_transfer(path: Path, record: Mapping[str, Any]) -> None:
    """Write a PNG: each method's transfer ratio against the teacher's size, a panel per student."""
    found = [t for t in record["transfer"] if t["ratio"] is not None]
    sizes = [size for size in TEACHERS if any(t["teacher_size"] == size for t in found)]
    _panels(
        path,
        sorted({t["student"] for t in found}, reverse=True),
        "What share of the teacher's lead each method hands over",
        lambda axes, student: _draw(
            axes,
            [t for t in found if t["student"] == student],
            places={size: i for i, size in enumerate(sizes)},
            of="teacher_size",
            value="ratio",
        ),
        ticks=[f"{size}\nNE {record['teachers'][size]['ne']:.3f}" for size in sizes],
        labels=("teacher, at lag 0", "transfer ratio"),
    )


def _panels(
    path: Path,
    students: list[str],
    title: str,
    draw: Callable[[Axes, str], None],
    *,
    ticks: list[str],
    labels: tuple[str, str],
) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * max(1, len(students)) + 1.5, 4.2), dpi=150, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        panels = figure.subplots(1, max(1, len(students)), sharey=True, squeeze=False)[0]
        for axes, student in zip(panels, students, strict=False):
            draw(axes, student)
            axes.axhline(0, color="#6b6b6b", linewidth=0.8)
            axes.set_title(f"the {student} student", loc="left", fontsize=10)
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_xlabel(labels[0])
        panels[0].set_ylabel(labels[1])
        panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path)


def _draw(axes: Axes, found: list[Mapping[str, Any]], *, places: Mapping[Any, int], of: str, value: str) -> None:
    """Draw each method with its interval, side by side at each place."""
    for number, method in enumerate(METHODS[1:]):
        points = [c for c in found if c["method"] == method]
        x = np.array([places[c[of]] for c in points]) + 0.08 * (number - 2)
        y = np.array([c[value] for c in points])
        bars = np.abs(np.array([[c["low"] for c in points], [c["high"] for c in points]]) - y)
        axes.errorbar(
            x, y, yerr=bars, fmt="o-", color=_COLORS[method], markersize=4, linewidth=1.2, label=NAMES[method]
        )
