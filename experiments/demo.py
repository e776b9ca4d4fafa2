"""`das demo`: the service on public data, from raw purchases to supervision that a trainer can read.

A teacher is trained on weeks 1-26 of Complete Journey and published; the weeks after are streamed over HTTP in the
order of time, as a product would, and so are their labels, as they become known (experiments.data.label_delays says
when). Every four weeks the teacher reads back what has closed, trains on it and takes its own place. Then every
impression is looked up, and two students read their closed rows as training batches and train on them with and without
supervision (experiments.students says how). The last line is JSON.
"""

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from das_service.client import Client
from das_service.up.supervisor import SupervisorError, running_service
from experiments import students
from experiments.data import complete_journey as journey
from experiments.demo_report import (
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
from experiments.progress import Bars, Clock, empty_folder
from experiments.scraping import metric_sum, scrape
from experiments.serving import publish, wait_until_committed
from experiments.streaming import Streamer, read_closed
from experiments.teacher import AGAIN_RATE, TeacherTrainer, TrainedTeacher, iter_batches, iter_table
from vm_training.metrics import auc, normalized_entropy

DATASET, FM = "complete_journey", "teacher"
LOOKUP_IDS = 20_000
ROTATE_WEEKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What the trainer's look-ups gave, in the order of the stream."""

    weeks: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    present: np.ndarray
    gap_seconds: np.ndarray


def run(*, folder: Path, num_weeks: int, rotate_weeks: int, console: Console) -> dict[str, Any]:
    """Run the demo in folder, which is emptied first; give the record of contract 10."""
    clock, bars = Clock(), Bars(console)
    empty_folder(folder, mark=".das-demo")
    stream_weeks = list(journey.STREAM_WEEKS)[:num_weeks]
    with clock.stage("build"):
        files = _build(folder, stream_weeks, bars)
    first = [file for file in files if file.week in journey.TEACHER_WEEKS]
    stream = [file for file in files if file.week in stream_weeks]
    trainer = TeacherTrainer()
    with clock.stage("train"):
        teacher = _train(trainer, first, bars)
    console.print(
        f"The teacher saw {teacher.num_rows:,} impressions once, each predicted before it was trained on: "
        f"NE {teacher.normalized_entropy:.4f}, AUC {teacher.auc:.4f}."
    )
    with contextlib.ExitStack() as stack:
        with clock.stage("start"):
            service = stack.enter_context(running_service(folder=folder / "service"))
            client = stack.enter_context(Client(service.url, timeout_seconds=60))
            client.put_dataset(DATASET, journey.DATASET_SPEC)
            client.put_fm(DATASET, FM, required=True)
            publish(client, folder, DATASET, teacher, fm=FM, snapshot_id=f"weeks-1-{journey.TEACHER_WEEKS[-1]}")
        snapshots = _stream(client, stream, trainer, folder, (clock, bars), rotate_weeks=rotate_weeks)
        posted = sum(file.num_rows for file in stream)
        with clock.stage("lookup"):
            looked = _look_up(client, stream, bars)
        with clock.stage("students"):
            runs = _train_students(service.url, first, stream, bars)
            _keep_students(folder, runs)
        late_labels = int(client.status()["datasets"][DATASET]["late_labels"])
        metrics = _keep_metrics(client, folder / "metrics")
        memory = peak_memory_bytes([role["pid"] for role in service.roles() if role["pid"]])
    with clock.stage("recount"):
        counted = recount(folder / "service" / "tables", folder / "posted.parquet", dataset=DATASET, fm=FM)
    plot_teacher(path=folder / "teacher.png", **_weekly(looked))
    p50, p95 = np.quantile(looked.gap_seconds[looked.present], [0.5, 0.95])
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
        "snapshots": snapshots,
        "late_labels": late_labels,
        "freshness_gap_seconds": {"p50": round(float(p50)), "p95": round(float(p95))},
        "fm": {
            "ne": normalized_entropy(looked.logits[looked.present], looked.labels[looked.present]),
            "auc": auc(looked.logits[looked.present], looked.labels[looked.present]),
        },
        "vms": [vm_record(name, run) for name, run in runs.items()],
        "peak_memory_mb": round(memory / 1e6),
        "seconds": clock.total(),
    }


def _build(folder: Path, stream_weeks: list[int], bars: Bars) -> tuple[journey.WeekFile, ...]:
    weeks = [*journey.TEACHER_WEEKS, *stream_weeks]
    with bars.bar("Building impressions, week by week", len(weeks)) as advance:
        return journey.build_impressions(folder / "weeks", weeks=weeks, on_progress=lambda _: advance(1))


def _train(trainer: TeacherTrainer, files: list[journey.WeekFile], bars: Bars) -> TrainedTeacher:
    paths = [file.path for file in files]
    num_rows = sum(file.num_rows for file in files)
    with bars.bar("Training the teacher on weeks 1-26, once", num_rows) as advance:
        return trainer.train(iter_batches(paths), num_rows=num_rows, on_progress=advance)


def _stream(
    client: Client,
    files: list[journey.WeekFile],
    trainer: TeacherTrainer,
    folder: Path,
    shown: tuple[Clock, Bars],
    *,
    rotate_weeks: int,
) -> int:
    """Stream all weeks, and renew the teacher between each rotate_weeks of them; give the number of snapshots."""
    clock, bars = shown
    cursor: str | None = None
    parts = [files[start : start + rotate_weeks] for start in range(0, len(files), rotate_weeks)]
    with Streamer(client, DATASET, folder / "posted.parquet") as streamer:
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            with clock.stage("stream"), bars.bar(_weeks_text("Streaming", part), _num_rows(part)) as advance:
                for file in part:
                    streamer.post_week(file.path, on_progress=advance)
                if is_last:
                    streamer.post_other_labels()
            with clock.stage("settle"):
                wait_until_committed(client, DATASET, streamer, {FM: streamer.posted}, bars)
            if not is_last:
                with clock.stage("rotate"):
                    cursor = _rotate(client, trainer, folder, f"weeks-1-{part[-1].week}", cursor, bars)
    return len(parts)


def _rotate(
    client: Client, trainer: TeacherTrainer, folder: Path, snapshot_id: str, cursor: str | None, bars: Bars
) -> str | None:
    """Train on what has closed since the cursor, and put the new snapshot to work; give the cursor behind it."""
    closed, cursor = read_closed(client, DATASET, cursor=cursor)
    with bars.bar(f"Training the teacher again: {snapshot_id}", closed.num_rows) as advance:
        teacher = trainer.train(
            iter_table(closed), num_rows=closed.num_rows, layer_rate=AGAIN_RATE, on_progress=advance
        )
    publish(client, folder, DATASET, teacher, fm=FM, snapshot_id=snapshot_id)
    return cursor


def _num_rows(files: list[journey.WeekFile]) -> int:
    return sum(file.num_rows for file in files)


def _weeks_text(what: str, files: list[journey.WeekFile]) -> str:
    return f"{what} weeks {files[0].week}-{files[-1].week} to the service"


def _look_up(client: Client, files: list[journey.WeekFile], bars: Bars) -> Looked:
    columns: dict[str, list[np.ndarray]] = {
        name: [] for name in ("weeks", "labels", "logits", "present", "gap_seconds")
    }
    with bars.bar("Looking every impression up, as a trainer", sum(file.num_rows for file in files)) as advance:
        for file in files:
            table = pq.read_table(file.path, columns=["example_id", "event_time", journey.LABEL_COLUMN])
            for start in range(0, table.num_rows, LOOKUP_IDS):
                part = table.slice(start, LOOKUP_IDS)
                answer = client.lookup(DATASET, part["example_id"], fms=[FM], embedding_format="float16")
                status = answer[f"{FM}__status"].cast(pa.string())
                columns["present"].append(np.asarray(pa.compute.equal(status, "present")))
                columns["logits"].append(answer[f"{FM}__purchase__logit"].to_numpy())
                columns["labels"].append(part[journey.LABEL_COLUMN].to_numpy())
                through = answer[f"{FM}__trained_through"].cast(pa.int64()).fill_null(0).to_numpy()
                columns["gap_seconds"].append((part["event_time"].cast(pa.int64()).to_numpy() - through) / 1e6)
                columns["weeks"].append(np.full(part.num_rows, file.week))
                advance(part.num_rows)
    return Looked(**{name: np.concatenate(parts) for name, parts in columns.items()})


def _train_students(
    url: str, first: list[journey.WeekFile], stream: list[journey.WeekFile], bars: Bars
) -> dict[str, students.StudentRuns]:
    before, after = [file.path for file in first], [file.path for file in stream]
    with bars.bar("Training each student, three runs at once", students.count_trained(before, after)) as advance:
        return students.train_students(
            before,
            after,
            open_batches=lambda name: students.student_batches(url, DATASET, name, fm=FM),
            fm=FM,
            on_progress=advance,
        )


def _keep_students(folder: Path, runs: dict[str, students.StudentRuns]) -> None:
    """Keep what each student was judged by, row by row, and the plot."""
    (folder / "students").mkdir()
    for name, run in runs.items():
        pq.write_table(run.to_table(), folder / "students" / f"{name}.parquet", compression="zstd")
    plot_students(folder / "students.png", {students.STUDENTS[name]: weekly_entropy(run) for name, run in runs.items()})


def _keep_metrics(client: Client, folder: Path) -> str:
    """Write each role's /metrics down; give all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = scrape(client)
    for role, text in texts:
        (folder / f"{role}.txt").write_text(text)
    return "\n".join(text for _, text in texts)


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
    parser.add_argument("--rotate-weeks", type=int, default=ROTATE_WEEKS, help="renew the teacher after so many weeks")
    parser.add_argument("--folder", type=Path, default=Path("demo-data"), help="emptied first, kept afterwards")
    options = parser.parse_args(arguments)
    if not 1 <= options.weeks <= len(journey.STREAM_WEEKS):
        parser.error(f"--weeks is 1..{len(journey.STREAM_WEEKS)}")
    if options.rotate_weeks < 1:
        parser.error("--rotate-weeks is 1 or more")
    console = Console(stderr=True)
    try:
        record = run(
            folder=options.folder.absolute(),
            num_weeks=options.weeks,
            rotate_weeks=options.rotate_weeks,
            console=console,
        )
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
