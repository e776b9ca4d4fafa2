"""What the ExFM experiment says: the record of contract 10, a page in plain language, and the plots.

Every interval is of paired seeds (`vm_training.intervals`): how much other seeds would move the result on these rows.
A method helps where the 95 % interval of its NE, less that of the student without supervision, lies below 0.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from experiments.exfm_cells import Job, Tried, choose
from experiments.exfm_plan import FROZEN, METHODS, MIDDLE, Plan
from experiments.exfm_plots import plot_lags, plot_transfer
from experiments.exfm_words import NAMES, findings, lag_name, lags_of, shown, values, verdict
from vm_training.intervals import Interval, paired_interval, transfer_ratio

RESULTS: Final = Path(__file__).parent / "results"
GUIDE: Final = Path(__file__).parents[1] / "docs" / "training.md"
_BEGIN, _END = "<!-- exfm: written by `python -m experiments.exfm_report` -->\n", "<!-- /exfm -->"
_CELL: Final = ("method", "lag_weeks", "teacher_size", "student", "seed", "control", "ne", "auc", "calibration")
_Key = tuple[str, Any, str | None, str | None, str]


def build_record(
    plan: Plan,
    found: Mapping[Job, Mapping[str, Any]],
    tried: Tried,
    served: Mapping[str, Any],
    *,
    seconds: Mapping[str, float],
    machine: str,
) -> dict[str, Any]:
    """Give the record: cells in the order of the plan, and each way of training against labels alone."""
    chosen = choose(tried)
    cells = [_cell(job, found[job]) for job in sorted(found, key=_order)]
    return {
        "cells": cells,
        "comparisons": [
            comparison for against in ("none", "single", "ah") for comparison in _comparisons(cells, against)
        ],
        "transfer": list(_transfers(cells, served["teachers"])),
        "tried": [
            {
                "student": student,
                "method": method,
                **asdict(knobs),
                "ne": ne,
                "is_chosen": knobs == chosen[student, method],
            }
            for (student, method), by_knobs in tried.items()
            for knobs, ne in by_knobs.items()
        ],
        "teachers": served["teachers"],
        "one_teacher": {"posted": served["posted"], "forwards": served["forwards"], "slices": served["slices"]},
        "rows": served["rows"],
        "weeks": {
            "tuned": [plan.tune[0], plan.tune[-1]],
            "counted_from": plan.first_counted_of_tune(),
            "reported": [plan.report[0], plan.report[-1]],
            "renewed_every": plan.rotate_weeks,
        },
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
        math.inf if cell.lag == FROZEN else cell.lag or 0,
        cell.seed,
    )


def _comparisons(cells: Sequence[Mapping[str, Any]], against: str) -> Iterator[dict[str, Any]]:
    """Give each method against labels alone, or against another method with the same teacher."""
    ways = _by_way(cells)
    for (method, lag, size, control, student), by_seed in ways.items():
        if method in {"none", against} or (control is not None and against != "none"):
            continue
        without = (
            ways["none", None, None, None, student] if against == "none" else ways[against, lag, size, None, student]
        )
        interval = paired_interval([ne - without[seed] for seed, ne in sorted(by_seed.items())])
        yield {
            "method": method,
            "against": against,
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
            "bootstrap_low": None if ratio.by_bootstrap is None else ratio.by_bootstrap.low,
            "bootstrap_high": None if ratio.by_bootstrap is None else ratio.by_bootstrap.high,
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
    """Give what each method changes at each lag, for the guide; every number and claim in it is the record's."""
    students = sorted({cell["student"] for cell in record["cells"]}, reverse=True)
    return "\n".join(
        f"The {student} student:\n\n{_by_lag(_plain(record, student))}\n{_bullets(findings(record, student))}"
        for student in students
    )


def to_page(record: Mapping[str, Any]) -> str:
    """Give the page; every number in it is one of the record."""
    students = sorted({cell["student"] for cell in record["cells"]}, reverse=True)
    parts = [
        "# ExFM on public data: what helps, and when\n",
        _intro(record),
        *[section for student in students for section in (f"## The {student} student\n", *_student(record, student))],
        "## Controls\n",
        _controls(record),
        "## Transfer ratio\n",
        "What share of the distance from the student on labels alone to the teacher, both in NE on the same rows, a "
        "method closes at lag 0. Fieller's interval and that of a paired bootstrap, both over the students' seeds: "
        "each teacher was trained once, so that its own spread is in neither.\n",
        _transfer_table(record),
        "## One teacher, many students\n",
        _slices(record),
        "## What this data cannot tell\n",
        "How much another product would differ: it is one data set, and its negatives are sampled. How much a much "
        "better teacher would give: the tables above say by how little the large one is ahead. How good a method is at "
        "settings that were not tried, or with other rates than those that suit labels alone.\n",
        "## How it came about\n",
        "Weeks 27-53 had been seen before these settings were tried. In a first run labels alone and the "
        "auxiliary head had tuned learning rates, all others the plain ones; then the best rate was the highest of the "
        "grid. The rule for the rates was changed for these two reasons, and all cells were trained "
        "anew. In the first run everything but the auxiliary head looked worse by some thousandths. The teachers' own "
        "rates had been the demo's, set with a look at weeks 27-53; they were then chosen anew, by weeks 15-26 alone "
        "(`python -m experiments.tune_teacher`). In both runs the adapter in front of the single head took away most "
        "of the gain: its random weights were what a student that is trained already first learnt from, as weeks 15-26 "
        "showed. It now begins as the identity. A layer rate of 0.001 was worse for both students in the second run, "
        "and gave its place to 0.03. Then everything was run again; the stream had not waited until a new snapshot "
        "was at work, so that 3 % of the rows of the teacher 12 weeks behind were scored by its snapshot before. It "
        "waits now, and everything was run once more, which is what this page tells.\n",
        "## Settings tried\n",
        f"NE on weeks {record['weeks']['counted_from']}-{record['weeks']['tuned'][1]}, behind a warm-up, of one seed; "
        "the lowest was chosen.\n",
        _settings(record),
        "![NE against lag](exfm-lag.png)\n",
        "![transfer ratio against teacher size](exfm-transfer.png)\n",
    ]
    return "\n".join(parts)


def _intro(record: Mapping[str, Any]) -> str:
    weeks, rows = record["weeks"], record["rows"]
    first, last = weeks["reported"]
    seeds = len({cell["seed"] for cell in record["cells"]})
    return (
        f"Written by `python -m experiments.exfm` ({record['machine']}; {record['seconds']['total'] / 60:.0f} "
        f"minutes).\n\nStudents of the products on display: {rows['report']:,} rows of weeks {first}-{last}, read once "
        f"in ready order, predicted before they are trained on; {seeds} paired seeds. A number is the change of NE "
        "against the same student on labels alone, in thousandths (below 0 is better), and its 95 % interval over "
        "seeds: how much other seeds would move it on these rows, not on other rows.\n\n"
        "Lag: a row is scored by the snapshot that was the newest so many weeks before; snapshots are renewed every "
        f"{weeks['renewed_every']} weeks, so that they are up to so much older. Up to the reported weeks every teacher "
        "was fresh: all methods are warm when they begin (save those of the teachers that peek, who had said nothing "
        "until then). Each teacher was trained once, on the first weeks from files and then on what the service had "
        "closed; its rates were those that suit the middle one.\n\n"
        f"Chosen on weeks {weeks['tuned'][0]}-{weeks['tuned'][1]} alone: the learning rates, by the student on labels "
        "alone, and at these rates the settings of each method, of as many as there were rates.\n"
    )


def _student(record: Mapping[str, Any], student: str) -> Iterator[str]:
    plain = _plain(record, student)
    own = paired_interval([c["ne"] for c in record["cells"] if (c["student"], c["method"]) == (student, "none")])
    yield f"On labels alone: NE {shown(own, 1, 4, sign='')}.\n"
    yield _bullets(findings(record, student))
    yield _by_lag(plain)
    yield "Against the single head with the same teacher:\n"
    yield _by_lag(_plain(record, student, against="single"))
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
    yield _unclear(plain)
    yield "AUC, change in thousandths (above 0 is better):\n"
    yield _metric_by_lag(record, student, "auc")
    alone = paired_interval(list(values(record, student, None, "none", "calibration").values()))
    yield f"Calibration, predictions by labels (1 is right); labels alone {shown(alone, 1, 3, sign='')}:\n"
    yield _metric_by_lag(record, student, "calibration")


def _plain(record: Mapping[str, Any], student: str, *, against: str = "none") -> list[Mapping[str, Any]]:
    return [
        c for c in record["comparisons"]
        if (c["student"], c["control"], c["against"]) == (student, None, against)
    ]  # fmt: skip


def _by_lag(plain: Sequence[Mapping[str, Any]]) -> str:
    lags = _unique(c["lag_weeks"] for c in plain if c["teacher_size"] == MIDDLE)
    methods = _unique(c["method"] for c in plain)
    return _table(
        ["method", *[lag_name(lag) for lag in lags]],
        [[NAMES[method], *[_shown(_find(plain, method, lag, MIDDLE)) for lag in lags]] for method in methods],
    )


def _metric_by_lag(record: Mapping[str, Any], student: str, metric: str) -> str:
    """Give the change of AUC in thousandths, or the calibration itself, by method and lag."""
    lags = lags_of(record, student)
    alone = values(record, student, None, "none", metric)
    rows = []
    for method in METHODS[1:]:
        line = [NAMES[method]]
        for lag in lags:
            found = values(record, student, lag, method, metric)
            if metric == "auc":
                change = paired_interval([found[seed] - alone[seed] for seed in sorted(found)])
                line.append(shown(change, 1000, 2))
            else:
                line.append(shown(paired_interval([found[seed] for seed in sorted(found)]), 1, 3, sign=""))
        rows.append(line)
    return _table([metric, *[lag_name(lag) for lag in lags]], rows)


def _unclear(plain: Sequence[Mapping[str, Any]]) -> str:
    """Say which ways of training do not help."""
    known = [(c, verdict(Interval(estimate=c["ne_delta"], low=c["low"], high=c["high"]))) for c in plain]
    others = [
        f"{NAMES[c['method']]} ({c['teacher_size']} teacher, {lag_name(c['lag_weeks'])}) {words}"
        for c, words in known
        if words != "helps"
    ]
    helping = sum(words == "helps" for _, words in known)
    return f"{helping} of {len(known)} ways of training are clearly better than labels alone" + (
        f"; {'; '.join(others)}.\n" if others else ".\n"
    )


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
    leaks = [
        f"the {student} student has AUC {_mean_of(record, student, 'peek_unguarded'):.4f}, with an honest teacher "
        f"{_mean_of(record, student, None):.4f}"
        for student in sorted({cell["student"] for cell in record["cells"]}, reverse=True)
    ]
    return (
        _table(["control", "method", "student", "change of NE"], rows)
        + f"\nOf the peeking teacher's rows the service handed out {peek['coverage']:.0%}; looked up, "
        + ", ".join(f"{count:,} were `{status}`" for status, count in peek["statuses"].items())
        + f". With its lie and a single head {'; '.join(leaks)}.\n"
    )


def _mean_of(record: Mapping[str, Any], student: str, control: str | None) -> float:
    by_seed = values(record, student, 0, "single", "auc", control=control)
    return sum(by_seed.values()) / len(by_seed)


def _transfer_table(record: Mapping[str, Any]) -> str:
    rows = [
        [NAMES[t["method"]], t["teacher_size"], t["student"],
         *([t["undefined"], ""] if t["undefined"] else
           [_interval(t, "ratio", 1, 3), f"{t['bootstrap_low']:.3f} to {t['bootstrap_high']:.3f}"])]
        for t in record["transfer"]
    ]  # fmt: skip
    return _table(["method", "teacher", "student", "ratio (Fieller)", "bootstrap"], rows)


def _slices(record: Mapping[str, Any]) -> str:
    one = record["one_teacher"]
    rows = [
        [name, f"{s['rows']:,}", *(_range(s[run][part]) for part in ("read", "train") for run in ("without", "with"))]
        for name, s in one["slices"].items()
    ]
    return (
        f"{one['posted']:,} distinct impressions were posted; the middle teacher went over {one['forwards'][MIDDLE]:,} "
        "rows, whoever read them afterwards.\n\n"
        + _table(
            ["slice", "rows", "reads labels alone", "and supervision", "trains on labels alone", "with a head"], rows
        )
        + "\nSeconds of two runs each: a slice is read through the service, then the small student is trained on it, "
        "with an auxiliary head or without.\n"
    )


def _range(seconds: Sequence[float]) -> str:
    return f"{min(seconds):.1f} to {max(seconds):.1f}"


def _settings(record: Mapping[str, Any]) -> str:
    names = ("table_rate", "layer_rate", "weight", "alpha", "beta", "adapter_weight")
    rows = [
        [one["student"], NAMES[one["method"]], *[f"{one[name]:g}" for name in names],
         f"**{one['ne']:.4f}**" if one["is_chosen"] else f"{one['ne']:.4f}"]
        for one in record["tried"]
    ]  # fmt: skip
    return _table(["student", "method", *names, "NE"], rows)


def _find(comparisons: Sequence[Mapping[str, Any]], method: str, lag: Any, size: str) -> Mapping[str, Any]:  # noqa: ANN401
    return next(
        c for c in comparisons if (c["method"], c["lag_weeks"], c["teacher_size"]) == (method, lag, size)
    )  # fmt: skip


def _shown(comparison: Mapping[str, Any]) -> str:
    return _interval(comparison, "ne_delta", 1000, 2)


def _interval(found: Mapping[str, Any], name: str, factor: float, digits: int) -> str:
    interval = Interval(estimate=float(found[name]), low=float(found["low"]), high=float(found["high"]))
    return shown(interval, factor, digits, sign="+" if factor == 1000 else "")


def _bullets(sentences: Iterator[str]) -> str:
    return "".join(f"- {sentence}\n" for sentence in sentences)


def _unique(values: Iterator[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def render_guide() -> None:
    """Bring the guide's choice of methods up to date with the kept record."""
    record = json.loads((RESULTS / "exfm.json").read_text())
    GUIDE.write_text(rendered(GUIDE.read_text(), record))


if __name__ == "__main__":
    write_report(RESULTS, json.loads((RESULTS / "exfm.json").read_text()))
    render_guide()
