"""`das demo`: the service on public data, from raw purchases to supervision that a trainer can read.

A teacher is trained on weeks 1-26 of Complete Journey and published; the weeks after are streamed over HTTP in the
order of time, as a product would; then every impression is looked up, and two students send their own tables to be
augmented and train on them with and without supervision (experiments.students says how). The last line is JSON.
"""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from das_service.client import Client
from das_service.settings import load_settings
from das_service.snapshot_publish import publish_snapshot
from das_service.up.supervisor import SupervisorError, running_service
from experiments import complete_journey as journey
from experiments import students
from experiments.demo_report import (
    metric_sum,
    peak_memory_bytes,
    per_week,
    print_students,
    print_table,
    recount,
    to_json,
    vm_record,
    weekly_entropy,
)
from experiments.plots import plot_students, plot_teacher
from experiments.teacher import TrainedTeacher, build_signature, train_teacher
from fm_inference import export_snapshot
from vm_training.metrics import auc, normalized_entropy

DATASET, FM, SNAPSHOT = "complete_journey", "teacher", "weeks-1-26"
CHUNK_ROWS = 5000
LOOKUP_IDS = 20_000
CLIENTS = 2
_WAIT_SECONDS = 300.0


@dataclass(slots=True)
class Clock:
    """Seconds of each stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)
    started_at: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 1)

    def total(self) -> dict[str, float]:
        """Give all stages and the total."""
        return {**self.seconds, "total": round(time.monotonic() - self.started_at, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What the trainer's look-ups gave, in the order of the stream."""

    weeks: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    present: np.ndarray


class Bars:
    """Progress bars on stderr, so that stdout ends with the record."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip

    @contextlib.contextmanager
    def bar(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show one bar; give the function that moves it."""
        with self._progress:
            task = self._progress.add_task(text, total=total)
            yield lambda done: self._progress.advance(task, done)
        self._progress.remove_task(task)


def run(*, folder: Path, num_weeks: int, console: Console) -> dict[str, Any]:
    """Run the demo in folder, which is emptied first; give the record of contract 10."""
    clock, bars = Clock(), Bars(console)
    _empty(folder)
    stream_weeks = list(journey.STREAM_WEEKS)[:num_weeks]
    with clock.stage("build"):
        files = _build(folder, stream_weeks, bars)
    with clock.stage("train"):
        first = [file for file in files if file.week in journey.TEACHER_WEEKS]
        teacher = _train(first, bars)
        signature = build_signature(fm=FM, snapshot_id=SNAPSHOT)
        export_snapshot(teacher.module, signature, folder / "export", trained_through=teacher.trained_through)
    console.print(
        f"The teacher saw {teacher.num_rows:,} impressions once, each predicted before it was trained on: "
        f"NE {teacher.normalized_entropy:.4f}, AUC {teacher.auc:.4f}."
    )
    stream = [file for file in files if file.week in stream_weeks]
    with contextlib.ExitStack() as stack:
        with clock.stage("start"):
            service = stack.enter_context(running_service(folder=folder / "service"))
            client = stack.enter_context(Client(service.url, timeout_seconds=60))
            _publish(client, folder)
        with clock.stage("stream"):
            posted = _stream(client, stream, folder / "posted.parquet", bars)
            _wait_until_committed(client, posted, bars)
        with clock.stage("lookup"):
            looked = _look_up(client, stream, bars)
        with clock.stage("augment"):
            augmented = _augment(client, stream, bars)
        metrics = _keep_metrics(client, service.url, folder / "metrics")
        memory = peak_memory_bytes([role["pid"] for role in service.roles() if role["pid"]])
    with clock.stage("recount"):
        counted = recount(folder / "service" / "tables", folder / "posted.parquet", dataset=DATASET, fm=FM)
    plot_teacher(path=folder / "teacher.png", **_weekly(looked))
    with clock.stage("students"):
        runs = _train_students(first, augmented, bars)
        _keep_students(folder, augmented, runs)
    return {
        "folder": str(folder),
        "examples_posted": posted,
        "examples_scored": int(metric_sum(metrics, "das_scored_rows_total", dataset=DATASET, fm=FM)),
        "fm_forwards": int(metric_sum(metrics, "das_fm_forward_rows_total", dataset=DATASET, fm=FM)),
        "supervision_rows_offline": counted.supervision_rows,
        "duplicates": counted.duplicates,
        "missing": counted.missing,
        "leaky": counted.leaky,
        "coverage": float(looked.present.mean()),
        "fm": {
            "ne": normalized_entropy(looked.logits[looked.present], looked.labels[looked.present]),
            "auc": auc(looked.logits[looked.present], looked.labels[looked.present]),
        },
        "vms": [vm_record(name, run) for name, run in runs.items()],
        "peak_memory_mb": round(memory / 1e6),
        "seconds": clock.total(),
    }


def _empty(folder: Path) -> None:
    """Make an empty folder of it, if it is a demo's.

    Raises:
        SupervisorError: There is something in it that no demo has made.
    """
    mark = folder / ".das-demo"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise SupervisorError(f"{folder} is not empty and not of an earlier demo; name another with --folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()


def _build(folder: Path, stream_weeks: list[int], bars: Bars) -> tuple[journey.WeekFile, ...]:
    weeks = [*journey.TEACHER_WEEKS, *stream_weeks]
    with bars.bar("Building impressions, week by week", len(weeks)) as advance:
        return journey.build_impressions(folder / "weeks", weeks=weeks, on_progress=lambda _: advance(1))


def _train(files: list[journey.WeekFile], bars: Bars) -> TrainedTeacher:
    with bars.bar("Training the teacher on weeks 1-26, once", sum(file.num_rows for file in files)) as advance:
        return train_teacher([file.path for file in files], on_progress=advance)


def _publish(client: Client, folder: Path) -> None:
    client.put_dataset(DATASET, journey.DATASET_SPEC)
    client.put_fm(DATASET, FM, required=True)
    settings = load_settings({}, snapshots_uri=str(folder / "service" / "snapshots"))
    publish_snapshot(client, settings, DATASET, folder / "export", activate=True)


def _stream(client: Client, files: list[journey.WeekFile], ledger: Path, bars: Bars) -> int:
    """Post every impression in the order of time; write each id down once its request was answered."""
    total = sum(file.num_rows for file in files)
    posted = 0
    with (
        bars.bar("Streaming impressions to the service", total) as advance,
        pq.ParquetWriter(ledger, pa.schema([("example_id", pa.string())])) as writer,
    ):
        for file in files:
            table = pq.read_table(file.path, columns=list(journey.EXAMPLE_COLUMNS))
            shown = 0

            def progress(result: Any) -> None:  # noqa: ANN401
                nonlocal shown
                advance(result.accepted - shown)
                shown = result.accepted

            result = client.ingest_batches(
                DATASET, table, concurrency=CLIENTS, rows_per_request=CHUNK_ROWS, on_progress=progress
            )
            if result.rejected:
                raise SupervisorError(f"the service refused {result.rejected} impressions: {result.errors[:3]}")
            writer.write_table(pa.table({"example_id": table["example_id"]}))
            posted += result.accepted
    return posted


def _wait_until_committed(client: Client, posted: int, bars: Bars) -> None:
    """Wait until every posted row is scored and in the tables."""
    deadline, done = time.monotonic() + _WAIT_SECONDS, 0
    with bars.bar("Waiting for the last rows to reach the tables", posted) as advance:
        while done < posted:
            record = client.status()["datasets"][DATASET]
            now = min(record["distinct"], record["fms"][FM]["scored"])
            advance(now - done)
            done = now
            if time.monotonic() > deadline:
                raise SupervisorError(f"only {done:,} of {posted:,} rows reached the tables in time")
            time.sleep(0.2)


def _look_up(client: Client, files: list[journey.WeekFile], bars: Bars) -> Looked:
    columns: dict[str, list[np.ndarray]] = {"weeks": [], "labels": [], "logits": [], "present": []}
    with bars.bar("Looking every impression up, as a trainer", sum(file.num_rows for file in files)) as advance:
        for file in files:
            table = pq.read_table(file.path, columns=["example_id", journey.LABEL_COLUMN])
            for start in range(0, table.num_rows, LOOKUP_IDS):
                part = table.slice(start, LOOKUP_IDS)
                answer = client.lookup(DATASET, part["example_id"], fms=[FM], embedding_format="float16")
                status = answer[f"{FM}__status"].cast(pa.string())
                columns["present"].append(np.asarray(pa.compute.equal(status, "present")))
                columns["logits"].append(answer[f"{FM}__purchase__logit"].to_numpy())
                columns["labels"].append(part[journey.LABEL_COLUMN].to_numpy())
                columns["weeks"].append(np.full(part.num_rows, file.week))
                advance(part.num_rows)
    return Looked(**{name: np.concatenate(parts) for name, parts in columns.items()})


def _augment(client: Client, files: list[journey.WeekFile], bars: Bars) -> dict[str, pa.Table]:
    """Give each student's own table with the teacher's supervision beside its columns."""
    tables = {name: students.read_table([file.path for file in files], student=name) for name in students.STUDENTS}
    augmented = {}
    with bars.bar("Augmenting the tables of two students", sum(map(len, tables.values()))) as advance:
        for name, table in tables.items():
            augmented[name] = client.augment(DATASET, table, fms=[FM], outputs=[journey.LABEL_COLUMN])
            advance(len(table))
    return augmented


def _train_students(
    files: list[journey.WeekFile], augmented: dict[str, pa.Table], bars: Bars
) -> dict[str, students.StudentRuns]:
    first = [file.path for file in files]
    with bars.bar("Training each student, three times", students.count_trained(first, augmented)) as advance:
        return students.train_students(first, augmented, fm=FM, on_progress=advance)


def _keep_students(folder: Path, augmented: dict[str, pa.Table], runs: dict[str, students.StudentRuns]) -> None:
    """Keep each student's augmented table with the logits that it is judged by, and the plot."""
    (folder / "students").mkdir()
    for name, table in augmented.items():
        logits = {f"logit_{run}": pa.array(values) for run, values in runs[name].logits.items()}
        kept = pa.table(dict(zip(table.column_names, table.columns, strict=True)) | logits)
        pq.write_table(kept, folder / "students" / f"{name}.parquet", compression="zstd")
    plot_students(folder / "students.png", {students.STUDENTS[name]: weekly_entropy(run) for name, run in runs.items()})


def _keep_metrics(client: Client, url: str, folder: Path) -> str:
    """Write each role's /metrics down; give all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = []
    for role in client.status()["roles"]:
        probe = url if role["role"] == "api" else role.get("probe_url")
        if probe:
            text = httpx.get(f"{probe}/metrics", timeout=10).text
            (folder / f"{role['role']}.txt").write_text(text)
            texts.append(text)
    return "\n".join(texts)


def _weekly(looked: Looked) -> dict[str, Any]:
    parts = per_week(looked.weeks, {"logits": looked.logits, "labels": looked.labels})
    return {
        "weeks": np.array(list(parts)),
        "normalized_entropy": np.array([normalized_entropy(p["logits"], p["labels"]) for p in parts.values()]),
        "auc": np.array([auc(p["logits"], p["labels"]) for p in parts.values()]),
        "base_rate": np.array([p["labels"].mean() for p in parts.values()]),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; give the exit code."""
    parser = argparse.ArgumentParser(prog="das demo", description=__doc__)
    parser.add_argument("--weeks", type=int, default=len(journey.STREAM_WEEKS), help="stream so many weeks (1..27)")
    parser.add_argument("--folder", type=Path, default=Path("demo-data"), help="emptied first, kept afterwards")
    options = parser.parse_args(arguments)
    if not 1 <= options.weeks <= len(journey.STREAM_WEEKS):
        parser.error(f"--weeks is 1..{len(journey.STREAM_WEEKS)}")
    console = Console(stderr=True)
    try:
        record = run(folder=options.folder.absolute(), num_weeks=options.weeks, console=console)
    except KeyboardInterrupt:
        console.print("Stopped; nothing is left running.")
        return 130
    except SupervisorError as error:
        console.print(f"[red]{error}[/red]")
        return 1
    print_table(console, record)
    print_students(console, record["vms"])
    console.print(f"Everything is kept in {record['folder']}; the plots are teacher.png and students.png there.")
    print(to_json(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
