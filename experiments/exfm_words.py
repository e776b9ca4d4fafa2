"""What the ExFM experiment found, in words that come from the record alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from experiments.exfm_plan import METHODS, MIDDLE, Lag
from vm_training.intervals import Interval, paired_interval

NAMES: Final = {
    "none": "labels alone",
    "single": "single head",
    "ah": "auxiliary head",
    "ah_scaled": "auxiliary head, three scalings",
    "ah_sa": "auxiliary head + adapter",
    "single_sa": "single head + adapter",
}
_PARTS: Final = (
    ("The adapter in front of the single head", "single_sa", "single"),
    ("The adapter beside the auxiliary head", "ah_sa", "ah"),
    ("The scalings of the auxiliary head", "ah_scaled", "ah"),
)
_BySeed = Mapping[int, float]


def findings(record: Mapping[str, Any], student: str) -> Iterator[str]:
    """Give sentences for one student: which method is best by lag, what its parts add, and who predicts too little."""
    lags = lags_of(record, student)
    for lag in lags:
        yield _best(record, student, lag)
    for what, method, without in _PARTS:
        told = []
        for lag in (lags[0], lags[-1]):
            found = difference(record, student, lag, method, without)
            told.append(f"{shown(found, 1000, 2)}, it {verdict(found)}, with {_teacher(lag)}")
        yield f"{what}: {'; '.join(told)}."


def _best(record: Mapping[str, Any], student: str, lag: Lag | None) -> str:
    means = {method: _mean(values(record, student, lag, method, "ne")) for method in METHODS}
    best = min(means, key=lambda method: means[method])
    tied = [
        NAMES[method]
        for method in METHODS
        if method != best and difference(record, student, lag, method, best).low <= 0
    ]
    if best == "none":
        return f"With {_teacher(lag)} nothing helps: labels alone are best."
    gain = shown(difference(record, student, lag, best, "none"), 1000, 2)
    others = f"not clearly better than {' and '.join(tied)}" if tied else "clearly ahead of all others"
    return f"With {_teacher(lag)}: {NAMES[best]} is best, {gain}; {others}."


def verdict(interval: Interval) -> str:
    """Say whether an interval of NE is clear of zero."""
    if interval.low <= 0 <= interval.high:
        return "can't be told from nothing"
    return "helps" if interval.high < 0 else "hurts"


def difference(record: Mapping[str, Any], student: str, lag: Lag | None, method: str, without: str) -> Interval:
    """Give the paired interval of a method's NE less that of another with the same teacher, or of labels alone."""
    one, other = (values(record, student, lag, name, "ne") for name in (method, without))
    return paired_interval([one[seed] - other[seed] for seed in sorted(one)])


def values(
    record: Mapping[str, Any],
    student: str,
    lag: Lag | None,
    method: str,
    metric: str,
    *,
    control: str | None = None,
) -> _BySeed:
    """Give a metric by seed with the middle teacher; labels alone have no teacher."""
    wanted = (student, method, control, *((None, None) if method == "none" else (lag, MIDDLE)))
    names = ("student", "method", "control", "lag_weeks", "teacher_size")
    return {
        cell["seed"]: cell[metric] for cell in record["cells"] if tuple(cell[name] for name in names) == wanted
    }  # fmt: skip


def lags_of(record: Mapping[str, Any], student: str) -> list[Any]:
    """Give the lags of the middle teacher, in the order of the record."""
    cells: Sequence[Mapping[str, Any]] = record["cells"]
    return list(
        dict.fromkeys(
            cell["lag_weeks"] for cell in cells
            if (cell["student"], cell["teacher_size"], cell["control"]) == (student, MIDDLE, None)
        )
    )  # fmt: skip


def _teacher(lag: Lag | None) -> str:
    return "a frozen teacher" if lag == "frozen" else f"a teacher {lag} weeks behind" if lag else "a fresh teacher"


def lag_name(lag: Lag | None) -> str:
    """Give a lag in words."""
    return "frozen" if lag == "frozen" else f"{lag} weeks"


def shown(interval: Interval, factor: float, digits: int, *, sign: str = "+") -> str:
    """Give an interval as text."""
    value, low, high = (factor * number for number in (interval.estimate, interval.low, interval.high))
    return f"{value:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def _mean(by_seed: _BySeed) -> float:
    return sum(by_seed.values()) / len(by_seed)
