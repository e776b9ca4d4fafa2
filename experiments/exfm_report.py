"""What the ExFM experiment says: the record of contract 10, a page in plain language, and the plots.

Every interval is of paired seeds (`vm_training.intervals`): how much other seeds would move the result on these rows.
A method helps where the 95 % interval of its NE, less that of the student without supervision, lies below 0.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from experiments.exfm_cells import Job
from experiments.exfm_plan import METHODS, MIDDLE, Knobs, Plan
from experiments.exfm_plots import plot_lags, plot_transfer
from vm_training.intervals import paired_interval, transfer_ratio

NAMES: Final = {
    "none": "labels alone",
    "single": "single head",
    "ah": "auxiliary head",
    "ah_scaled": "auxiliary head, three scalings",
    "ah_sa": "auxiliary head + adapter",
    "single_sa": "single head + adapter",
}
GUIDE: Final = Path(__file__).parents[1] / "docs" / "training.md"
_BEGIN, _END = "<!-- exfm: written by `python -m experiments.exfm_report` -->\n", "<!-- /exfm -->"
_CELL: Final = ("method", "lag_weeks", "teacher_size", "student", "seed", "control", "ne", "auc", "calibration")
_Key = tuple[str, Any, str | None, str | None, str]


def build_record(
    plan: Plan,
    found: Mapping[Job, Mapping[str, Any]],
    tuned: Mapping[tuple[str, str], Knobs],
    served: Mapping[str, Any],
    *,
    seconds: Mapping[str, float],
    machine: str,
) -> dict[str, Any]:
    """Give the record: cells in the order of the plan, and each way of training against labels alone."""
    cells = [_cell(job, found[job]) for job in sorted(found, key=_order)]
    return {
        "cells": cells,
        "comparisons": list(_comparisons(cells)),
        "transfer": list(_transfers(cells, served["teachers"])),
        "tuned": [
            {"student": student, "method": method, **asdict(knobs)} for (student, method), knobs in tuned.items()
        ],
        "teachers": served["teachers"],
        "one_teacher": {"posted": served["posted"], "forwards": served["forwards"], "slices": served["slices"]},
        "rows": served["rows"],
        "weeks": {"tuned": [plan.tune[0], plan.tune[-1]], "reported": [plan.report[0], plan.report[-1]]},
        "machine": machine,
        "seconds": dict(seconds),
    }


def _cell(job: Job, metrics: Mapping[str, Any]) -> dict[str, Any]:
    known = {**metrics, "lag_weeks": job.cell.lag}
    return {name: known[name] for name in _CELL}


def _order(job: Job) -> tuple[Any, ...]:
    cell = job.cell
    return (
        cell.student,
        METHODS.index(cell.method),
        str(cell.control),
        str(cell.teacher_size),
        str(cell.lag),
        cell.seed,
    )


def _comparisons(cells: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    without = {(cell["student"], cell["seed"]): cell["ne"] for cell in cells if cell["method"] == "none"}
    for (method, lag, size, control, student), by_seed in _by_way(cells).items():
        if method == "none":
            continue
        interval = paired_interval([ne - without[student, seed] for seed, ne in sorted(by_seed.items())])
        yield {
            "method": method,
            "against": "none",
            "lag_weeks": lag,
            "teacher_size": size,
            "student": student,
            "control": control,
            "ne_delta": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "seeds": len(by_seed),
        }


def _by_way(cells: Sequence[Mapping[str, Any]]) -> dict[_Key, dict[int, float]]:
    ways: dict[_Key, dict[int, float]] = {}
    for cell in cells:
        key = (cell["method"], cell["lag_weeks"], cell["teacher_size"], cell["control"], cell["student"])
        ways.setdefault(key, {})[cell["seed"]] = cell["ne"]
    return ways


def _transfers(cells: Sequence[Mapping[str, Any]], teachers: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Give the transfer ratios at lag 0: a student's gain by what the teacher has ahead of it, on the same rows."""
    without = {(cell["student"], cell["seed"]): cell["ne"] for cell in cells if cell["method"] == "none"}
    for (method, lag, size, control, student), by_seed in _by_way(cells).items():
        if method == "none" or lag != 0 or control is not None or size is None:
            continue
        seeds = sorted(by_seed)
        vm_gains = [without[student, seed] - by_seed[seed] for seed in seeds]
        fm_gains = [without[student, seed] - teachers[size]["ne"] for seed in seeds]
        ratio = transfer_ratio(vm_gains, fm_gains)
        found = ratio.by_fieller
        yield {
            "method": method,
            "teacher_size": size,
            "student": student,
            "ratio": None if found is None else found.estimate,
            "low": None if found is None else found.low,
            "high": None if found is None else found.high,
            "undefined": ratio.undefined,
        }


def write_report(folder: Path, record: Mapping[str, Any]) -> None:
    """Write exfm.json, exfm.md, exfm-lag.png and exfm-transfer.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "exfm.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "exfm.md").write_text(to_page(record))
    plot_lags(folder / "exfm-lag.png", record)
    plot_transfer(folder / "exfm-transfer.png", record)


def rendered(guide: str, record: Mapping[str, Any]) -> str:
    """Give the guide with its choice of methods made anew from the record."""
    before, rest = guide.split(_BEGIN)
    return before + _BEGIN + to_choice(record) + _END + rest.split(_END, 1)[1]


def to_choice(record: Mapping[str, Any]) -> str:
    """Give which method was best at which lag, for the guide; every number in it is one of the record."""
    plain = [c for c in record["comparisons"] if c["control"] is None and c["teacher_size"] == MIDDLE]
    students = sorted({c["student"] for c in plain}, reverse=True)
    rows = []
    for lag in _unique(c["lag_weeks"] for c in plain):
        row = [_lag_name(lag)]
        for student in students:
            here = [c for c in plain if (c["student"], c["lag_weeks"]) == (student, lag)]
            best = min(here, key=lambda c: float(c["ne_delta"]))
            beaten = [NAMES[c["method"]] for c in here if c["high"] < 0]
            row += [f"{NAMES[best['method']]}: {_shown(best)}", f"{len(beaten)} of {len(here)}"]
        rows.append(row)
    head = [f"best for the {student} student" for student in students]
    return _table(
        ["teacher's lag", *[cell for each in head for cell in (each, "methods that clearly help")]], rows
    )  # fmt: skip


def to_page(record: Mapping[str, Any]) -> str:
    """Give the page; every number in it is one of the record."""
    weeks, rows = record["weeks"], record["rows"]
    students = sorted({cell["student"] for cell in record["cells"]}, reverse=True)
    seeds = len({cell["seed"] for cell in record["cells"]})
    parts = [
        "# ExFM on public data: what helps, and when\n",
        f"Written by `python -m experiments.exfm` ({record['machine']}; "
        f"{record['seconds']['total'] / 60:.0f} minutes). Students of the products on display: {rows['report']:,} rows "
        f"of weeks {weeks['reported'][0]}-{weeks['reported'][1]}, read once in ready order, predicted before they are "
        f"trained on; {seeds} paired seeds. Chosen on weeks {weeks['tuned'][0]}-{weeks['tuned'][1]} alone: the "
        "learning rates, by the student on labels alone, and at these rates each method's settings, of as many as "
        "there were rates. A number is the change of NE against the same student on labels alone, in thousandths "
        "(below 0 is better), and its 95 % interval over seeds: how much other seeds would move it on these rows, not "
        "on other rows.\n",
        *[section for student in students for section in (f"## The {student} student\n", *_student(record, student))],
        "## Controls\n",
        _controls(record),
        "## Transfer ratio\n",
        "What share of the distance from the student on labels alone to the teacher, both in NE on the same rows, a "
        "method closes at lag 0.\n",
        _transfer_table(record),
        "## One teacher, many students\n",
        _slices(record),
        "## Settings\n",
        _settings(record),
        "![NE against lag](exfm-lag.png)\n",
        "![transfer ratio against teacher size](exfm-transfer.png)\n",
    ]
    return "\n".join(parts)


def _student(record: Mapping[str, Any], student: str) -> Iterator[str]:
    plain = [c for c in record["comparisons"] if c["student"] == student and c["control"] is None]
    own = [cell["ne"] for cell in record["cells"] if cell["student"] == student and cell["method"] == "none"]
    yield f"On labels alone: NE {sum(own) / len(own):.4f}.\n"
    lags = _unique(c["lag_weeks"] for c in plain if c["teacher_size"] == MIDDLE)
    yield _table(
        ["method", *[_lag_name(lag) for lag in lags]],
        [
            [NAMES[method], *[_shown(_find(plain, method, lag, MIDDLE)) for lag in lags]]
            for method in METHODS
            if method != "none"
        ],
    )
    sizes = [size for size in ("small", "middle", "large") if any(c["teacher_size"] == size for c in plain)]
    if len(sizes) > 1:
        yield _table(
            ["method, by teacher at lag 0", *[f"{s} (NE {record['teachers'][s]['ne']:.4f})" for s in sizes]],
            [
                [NAMES[method], *[_shown(_find(plain, method, 0, size)) for size in sizes]]
                for method in METHODS
                if method != "none"
            ],
        )
    yield from _verdicts(plain)


def _verdicts(plain: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say in words what is clear and what is not."""
    fresh = [c for c in plain if c["lag_weeks"] == 0 and c["teacher_size"] == MIDDLE]
    best = min(fresh, key=lambda c: float(c["ne_delta"]))
    yield f"Best with a fresh teacher: {NAMES[best['method']]} ({_shown(best)}).\n"
    for words in ("helps", "hurts", "cannot be told from nothing"):
        which = [
            f"{NAMES[c['method']]} ({_lag_name(c['lag_weeks'])})"
            for c in plain
            if c["teacher_size"] == MIDDLE and _verdict(c) == words
        ]
        if which:
            yield f"- {words}: {'; '.join(which)}."
    yield ""


def _verdict(comparison: Mapping[str, Any]) -> str:
    if comparison["low"] <= 0 <= comparison["high"]:
        return "cannot be told from nothing"
    return "helps" if comparison["high"] < 0 else "hurts"


def _controls(record: Mapping[str, Any]) -> str:
    what = {
        "shuffled": "the teacher's word shuffled over the rows of a batch",
        "constant": "the adapter's input held constant",
        "peek": "a teacher that saw these weeks and says so: the service calls it leaky",
        "peek_unguarded": "the same teacher, lying about what it saw",
    }
    rows = [
        [what[c["control"]], NAMES[c["method"]], c["student"], _shown(c)] for c in record["comparisons"] if c["control"]
    ]
    peek = record["teachers"]["peek"]
    return (
        _table(["control", "method", "student", "change of NE"], rows)
        + f"\nOf the peeking teacher's rows the service handed out {peek['coverage']:.0%}.\n"
    )


def _transfer_table(record: Mapping[str, Any]) -> str:
    rows = [
        [NAMES[t["method"]], t["teacher_size"], t["student"], t["undefined"] or _interval(t, "ratio", 1, 3)]
        for t in record["transfer"]
    ]
    return _table(["method", "teacher", "student", "ratio"], rows)


def _slices(record: Mapping[str, Any]) -> str:
    one = record["one_teacher"]
    rows = [
        [name, f"{s['rows']:,}", f"{s['seconds_without']:.1f}", f"{s['seconds_with']:.1f}"]
        for name, s in one["slices"].items()
    ]
    return (
        f"{one['posted']:,} distinct impressions were posted; the middle teacher went over {one['forwards'][MIDDLE]:,} "
        "rows, whoever read them afterwards.\n\n"
        + _table(["slice", "rows", "seconds on labels alone", "seconds with an auxiliary head"], rows)
        + "\nSeconds are to read a slice through the service and train the small student on it once.\n"
    )


def _settings(record: Mapping[str, Any]) -> str:
    names = ("table_rate", "layer_rate", "weight", "alpha", "beta", "adapter_weight")
    rows = [
        [known["student"], NAMES[known["method"]], *[f"{known[name]:g}" for name in names]]
        for known in record["tuned"]
    ]  # fmt: skip
    return _table(["student", "method", *names], rows)


def _find(comparisons: Sequence[Mapping[str, Any]], method: str, lag: Any, size: str) -> Mapping[str, Any]:  # noqa: ANN401
    return next(
        c for c in comparisons if (c["method"], c["lag_weeks"], c["teacher_size"]) == (method, lag, size)
    )  # fmt: skip


def _shown(comparison: Mapping[str, Any]) -> str:
    return _interval(comparison, "ne_delta", 1000, 2)


def _interval(found: Mapping[str, Any], name: str, factor: float, digits: int) -> str:
    value, low, high = (factor * float(found[key]) for key in (name, "low", "high"))
    sign = "+" if factor == 1000 else ""
    return f"{value:{sign}.{digits}f} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def _lag_name(lag: Any) -> str:  # noqa: ANN401
    return "frozen" if lag == "frozen" else f"{lag} weeks"


def _unique(values: Iterator[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def render_guide() -> None:
    """Bring the guide's choice of methods up to date with the kept record."""
    record = json.loads((Path(__file__).parent / "results" / "exfm.json").read_text())
    GUIDE.write_text(rendered(GUIDE.read_text(), record))


if __name__ == "__main__":
    render_guide()
