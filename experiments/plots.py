"""The plots of the experiments, drawn without a display."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Floats = npt.NDArray[np.floating]

_NE_COLOR: Final = "#1f5fa8"
_AUC_COLOR: Final = "#b3541e"
_GREY: Final = "#6b6b6b"
_RUN_COLORS: Final = {"without": _GREY, "with": _NE_COLOR, "shuffled": _AUC_COLOR}
STYLE: Final = {
    "font.size": 10, "axes.edgecolor": _GREY, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#e4e4e4", "axes.axisbelow": True,
}  # fmt: skip


def plot_teacher(
    path: Path,
    *,
    weeks: npt.NDArray[np.integer],
    normalized_entropy: Floats,
    auc: Floats,
    base_rate: Floats,
) -> None:
    """Write a PNG of a teacher's NE and AUC in each streamed week, beside what the base rate alone would give.

    All arrays are (weeks,); base_rate is the share of positives in the week.

    Raises:
        ValueError: There are no weeks, or the arrays differ in length.
    """
    if len(weeks) == 0 or any(len(values) != len(weeks) for values in (normalized_entropy, auc, base_rate)):
        raise ValueError("one value per week is needed of each metric, and at least one week")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 6.0), dpi=150, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        span = f"week {weeks[0]}" if len(weeks) == 1 else f"weeks {weeks.min()}-{weeks.max()}"
        figure.suptitle(
            f"The teacher, which trains on what has closed, predicts the purchases of {span}:\n"
            f"normalised entropy {normalized_entropy.mean():.2f} and AUC {auc.mean():.2f}, "
            "where the base rate alone gives 1 and 0.5",
            x=0.01,
            ha="left",
            fontsize=11,
            fontweight="bold",
        )
        _draw(upper, weeks, normalized_entropy, color=_NE_COLOR, reference=1.0, note="base rate alone: NE 1")
        upper.set_ylabel("normalised entropy\n(lower is better)")
        _draw(lower, weeks, auc, color=_AUC_COLOR, reference=0.5, note="base rate alone: AUC 0.5")
        lower.set_ylabel("AUC\n(higher is better)")
        lower.set_xlabel(f"week of the stream ({base_rate.mean():.1%} of the impressions are bought, the base rate)")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.savefig(path, format="png")


def _draw(
    axes: Axes, weeks: npt.NDArray[np.integer], values: Floats, *, color: str, reference: float, note: str
) -> None:
    axes.axhline(reference, color=_GREY, linestyle="--", linewidth=1)
    axes.fill_between(weeks, values, reference, color=color, alpha=0.08, linewidth=0)
    axes.plot(weeks, values, color=color, marker="o", markersize=4, linewidth=1.8)
    low, high = min(reference, float(values.min())), max(reference, float(values.max()))
    axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    mean = float(values.mean())
    axes.annotate(
        f"mean {mean:.3f}", xy=(1.0, mean), xycoords=("axes fraction", "data"), xytext=(6, 0),
        textcoords="offset points", color=color, va="center", fontweight="bold",
    )  # fmt: skip
    axes.annotate(
        note, xy=(0.01, reference), xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points",
        color=_GREY, va="bottom",
    )  # fmt: skip


def plot_students(path: Path, students: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
    """Write a PNG of each student's NE per week: above the three runs, below the change that supervision makes.

    students: per student and week the NE of the runs `without`, `with` and `shuffled`.

    Raises:
        ValueError: There are no students, or one has no weeks.
    """
    if not students or not all(students.values()):
        raise ValueError("at least one student and one week of each are needed")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 6.4), dpi=150, layout="constrained")
        axes = figure.subplots(2, len(students), sharex="col", sharey="row", squeeze=False, height_ratios=(2, 1))
        figure.suptitle(
            "The same student, trained in one pass without supervision, with the teacher's,\n"
            "and with the teacher's shuffled over the rows, each batch predicted first",
            x=0.01, ha="left", fontsize=11, fontweight="bold",
        )  # fmt: skip
        for (name, weekly), upper, lower in zip(students.items(), *axes, strict=True):
            _draw_student(upper, lower, weekly)
            upper.set_title(name)
        axes[0, 0].set_ylabel("normalised entropy\n(lower is better)")
        axes[1, 0].set_ylabel("with against without\n(% of NE)")
        axes[0, 0].legend(frameon=False, loc="best", ncols=3)
        figure.savefig(path, format="png")


def _draw_student(upper: Axes, lower: Axes, weekly: Mapping[int, Mapping[str, float]]) -> None:
    weeks = list(weekly)
    entropy = {run: np.array([values[run] for values in weekly.values()]) for run in _RUN_COLORS}
    for run, color in _RUN_COLORS.items():
        upper.plot(weeks, entropy[run], color=color, marker="o", markersize=3, linewidth=1.6, label=run)
    change = 100 * (entropy["with"] / entropy["without"] - 1)
    lower.axhline(0, color=_GREY, linewidth=1)
    lower.bar(weeks, change, color=_NE_COLOR)
    lower.set_xlabel(f"week of the stream (mean change {change.mean():+.2f} %)")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
