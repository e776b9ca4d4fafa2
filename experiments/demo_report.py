"""What the demo found: a recount of the kept folder with plain pyarrow, the numbers of contract 10, a table to read."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from deltalake import DeltaTable
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.students import RUNS, StudentRuns
from vm_training.metrics import auc, normalized_entropy

_STUDENTS_NOTE = """\
  One student of the products on display, one of those in the mailer; lower NE
  is better. Same first weights, rows and learning rates; each batch is trained
  on after it was predicted. Shuffled: the same supervision on other rows, which
  must not help, or the gain would not be what the teacher says of the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recount:
    """Counts from the tables' files and the ledger of posted ids, independent of the service."""

    posted: int
    examples_rows: int
    supervision_rows: int
    duplicates: int
    missing: int
    leaky: int


def recount(tables: Path, ledger: Path, *, dataset: str, fm: str) -> Recount:
    """Count what the folder holds. missing: posted ids without supervision; duplicates: rows beyond one an id."""
    posted = pq.read_table(ledger, columns=["example_id"])["example_id"]
    examples = _rows(tables / dataset / "examples", ["example_id"])
    supervision = _rows(tables / dataset / "supervision" / fm, ["example_id", "event_time", "trained_through"])
    scored_ids = supervision["example_id"]
    found = pc.is_in(posted, value_set=scored_ids.combine_chunks())
    extra = [column.length() - pc.count_distinct(column).as_py() for column in (examples["example_id"], scored_ids)]
    leaky = pc.sum(pc.greater(supervision["trained_through"], supervision["event_time"])).as_py() or 0
    return Recount(
        posted=pc.count_distinct(posted).as_py(),
        examples_rows=examples.num_rows,
        supervision_rows=supervision.num_rows,
        duplicates=sum(extra),
        missing=len(posted) - (pc.sum(found).as_py() or 0),
        leaky=leaky,
    )


def _rows(table: Path, columns: list[str]) -> pa.Table:
    return ds.dataset(DeltaTable(table).file_uris(), format="parquet").to_table(columns=columns)


def peak_memory_bytes(pids: Iterable[int]) -> int:
    """Give the sum of the processes' peaks of resident memory (an upper bound of the peak of the sum; Linux)."""
    total = 0
    for pid in pids:
        status = Path(f"/proc/{pid}/status")
        if status.exists():
            match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
            total += int(match[1]) * 1024 if match else 0
    return total


def print_table(console: Console, record: Mapping[str, Any]) -> None:
    """Print what happened so that a newcomer understands it."""
    table = Table(title="What happened", box=box.SIMPLE_HEAVY, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right", style="cyan")
    table.add_column(style="dim")
    rows = [
        ("impressions posted over HTTP", f"{record['examples_posted']:,}", "each answered after an fsync"),
        ("forwards of the teacher", f"{record['fm_forwards']:,}", "one per impression, however many students follow"),
        (
            "rows of supervision in the tables",
            f"{record['supervision_rows_offline']:,}",
            "counted again with plain pyarrow",
        ),
        ("duplicates / missing", f"{record['duplicates']} / {record['missing']}", "both must be 0"),
        ("leaky", f"{record['leaky']}", "rows whose label the teacher could have seen"),
        ("snapshots of the teacher", f"{record['snapshots']}", "each trained on rows that had closed before"),
        (
            "freshness gap, median",
            f"{record['freshness_gap_seconds']['p50'] / 86_400:.1f} days",
            "from the last label that the teacher saw",
        ),
        ("late labels", f"{record['late_labels']:,}", "after their window of 3 days: kept, and not used"),
        ("coverage", f"{record['coverage']:.2%}", "of the ids that a trainer looked up"),
        (
            "normalised entropy of the teacher",
            f"{record['fm']['ne']:.4f}",
            "1 = knows the base rate alone; lower is better",
        ),
        ("AUC of the teacher", f"{record['fm']['auc']:.4f}", "0.5 = guessing"),
        ("seconds in all", f"{record['seconds']['total']:.0f}", seconds_text(record["seconds"])),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def vm_record(name: str, runs: StudentRuns) -> dict[str, Any]:
    """Give a student's entry in the record, over all its rows of the stream."""
    return {
        "name": name,
        "rows": len(runs.labels),
        **{f"ne_{run}": normalized_entropy(runs.logits[run], runs.labels) for run in RUNS},
        **{f"auc_{run}": auc(runs.logits[run], runs.labels) for run in ("without", "with")},
    }


def weekly_entropy(runs: StudentRuns) -> dict[int, dict[str, float]]:
    """Give each week's NE of each run."""
    weeks = per_week(runs.weeks, {"labels": runs.labels, **runs.logits})
    return {week: {run: normalized_entropy(part[run], part["labels"]) for run in RUNS} for week, part in weeks.items()}


def print_students(console: Console, vms: Iterable[Mapping[str, Any]]) -> None:
    """Print what supervision did for each student, in 80 columns."""
    title = "What supervision does for two students"
    table = Table(title=title, box=box.SIMPLE_HEAVY, title_justify="left", collapse_padding=True)
    table.add_column("student", style="bold")
    for heading in ("rows", "NE\nwithout", "NE\nwith", "change", "NE\nshuffled", "AUC\nwithout", "AUC\nwith"):
        table.add_column(heading, justify="right", style="cyan")
    for vm in vms:
        change = f"{vm['ne_with'] / vm['ne_without'] - 1:+.2%}"
        entropy, others = (vm["ne_without"], vm["ne_with"]), (vm["ne_shuffled"], vm["auc_without"], vm["auc_with"])
        numbers = (*map(_four, entropy), change, *map(_four, others))
        table.add_row(vm["name"], f"{vm['rows']:,}", *numbers)
    console.print(table)
    console.print(_STUDENTS_NOTE, style="dim")


def _four(value: float) -> str:
    return f"{value:.4f}"


def seconds_text(seconds: Mapping[str, float]) -> str:
    """Give the stages' times in one line."""
    return ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")


def per_week(weeks: np.ndarray, values: Mapping[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """Give each week's part of the columns."""
    return {int(week): {name: column[weeks == week] for name, column in values.items()} for week in np.unique(weeks)}


def to_json(record: Mapping[str, Any]) -> str:
    """Give the last line of the demo."""
    return json.dumps(record)
