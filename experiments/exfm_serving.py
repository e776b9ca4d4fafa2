"""The stream of the ExFM experiment: teachers of three sizes and four lags in one running service.

The teachers are trained on the first weeks, then renewed on what has closed, read back through training batches. A
teacher that lags publishes the same snapshots later. Two more know the weeks that they score: `peek` says so, and the
service calls what it says leaky; `peek_unguarded` says that it has not, which no service can tell.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from das_service.client import Client
from experiments.data import complete_journey as journey
from experiments.exfm_plan import MIDDLE, PEEK, PEEK_UNGUARDED, TEACHERS, Plan
from experiments.exfm_students import TASK, Rows
from experiments.progress import Bars
from experiments.scraping import metric_sum, scrape_workers
from experiments.serving import publish, wait_until_committed
from experiments.streaming import Streamer, read_closed
from experiments.students import IDS, build_indices
from experiments.teacher import AGAIN_RATE, TeacherTrainer, TrainedTeacher, count_rows, iter_batches, iter_table
from vm_training import AugmentedDataset

DATASET = "complete_journey"


@dataclass(slots=True)
class Teachers:
    """Trainers by size, the snapshots that they gave by (size, last week), and the one that peeked."""

    trainers: dict[str, TeacherTrainer]
    snapshots: dict[tuple[str, int], TrainedTeacher] = field(default_factory=dict)
    peeking: TrainedTeacher | None = None


def train_first(plan: Plan, files: Sequence[journey.WeekFile], bars: Bars) -> Teachers:
    """Give the teachers of the first weeks, and the one that has seen all of them."""
    teachers = Teachers({size: TeacherTrainer(size=TEACHERS[size]) for size in plan.sizes})
    first = [file.path for file in files if file.week in plan.first]
    every = [file.path for file in files]
    jobs = [(size, trainer, first) for size, trainer in teachers.trainers.items()]
    total = len(jobs) * count_rows(first) + count_rows(every)
    with bars.bar("Training the teachers on the first weeks", total) as advance, ThreadPoolExecutor(2) as pool:

        def train(trainer: TeacherTrainer, paths: list[Path]) -> TrainedTeacher:
            return trainer.train(iter_batches(paths), num_rows=count_rows(paths), on_progress=advance)

        peeking = pool.submit(train, TeacherTrainer(size=TEACHERS[MIDDLE]), every)
        done = {size: pool.submit(train, trainer, paths) for size, trainer, paths in jobs}
        teachers.snapshots = {(size, plan.first[-1]): future.result() for size, future in done.items()}
        teachers.peeking = peeking.result()
    return teachers


def stream(
    client: Client, plan: Plan, files: Sequence[journey.WeekFile], teachers: Teachers, folder: Path, bars: Bars
) -> int:
    """Stream the weeks, with every teacher in its place; give the number of rows posted."""
    cursor: str | None = None
    scored: dict[str, int] = {}
    with Streamer(client, DATASET, folder / "posted.parquet") as streamer:
        for boundary in plan.boundaries():
            weeks = plan.part_after(boundary)
            _take_places(client, plan, boundary, teachers, folder, scored)
            part = [file for file in files if file.week in weeks]
            is_last = weeks[-1] == plan.report[-1]
            title = f"Streaming weeks {weeks[0]}-{weeks[-1]} past {len(scored)} teachers"
            with bars.bar(title, sum(file.num_rows for file in part)) as advance:
                for file in part:
                    streamer.post_week(file.path, on_progress=advance)
                    scored |= {fm: rows + file.num_rows for fm, rows in scored.items()}
                if is_last:
                    streamer.post_other_labels()
            wait_until_committed(client, DATASET, streamer, scored, bars)
            if not is_last:
                cursor = _train_again(client, teachers, weeks[-1], cursor, bars)
        return streamer.posted


def _take_places(
    client: Client, plan: Plan, boundary: int, teachers: Teachers, folder: Path, scored: dict[str, int]
) -> None:
    """Publish what changes behind a boundary, each FM declared when it first has something to say."""
    wanted = [(size, size, boundary) for size in plan.sizes]
    if boundary >= plan.tune[-1]:
        wanted += [(fm, MIDDLE, plan.source(lag, boundary)) for fm, lag in plan.lag_fms().items()]
    for fm, size, week in wanted:
        snapshot_id = f"weeks-1-{week}"
        if fm not in scored:
            _declare(client, fm, scored)
        elif (folder / "export" / fm / snapshot_id).exists():
            continue
        teacher = teachers.snapshots[size, week]
        publish(client, folder, DATASET, teacher, fm=fm, snapshot_id=snapshot_id)
    if boundary == plan.tune[-1] and teachers.peeking is not None:
        honest = teachers.snapshots[MIDDLE, boundary].trained_through
        for fm, through in ((PEEK, teachers.peeking.trained_through), (PEEK_UNGUARDED, honest)):
            _declare(client, fm, scored)
            peeking = replace(teachers.peeking, trained_through=through)
            publish(client, folder, DATASET, peeking, fm=fm, snapshot_id="weeks-1-53")


def _declare(client: Client, fm: str, scored: dict[str, int]) -> None:
    client.put_fm(DATASET, fm, required=True)
    scored[fm] = 0


def _train_again(client: Client, teachers: Teachers, week: int, cursor: str | None, bars: Bars) -> str | None:
    """Let each teacher train on what has closed since the cursor; give the cursor behind it."""
    closed, cursor = read_closed(client, DATASET, cursor=cursor)
    total = closed.num_rows * len(teachers.trainers)
    with bars.bar(f"Training the teachers again, to week {week}", total) as advance, ThreadPoolExecutor(2) as pool:
        done = {
            size: pool.submit(
                trainer.train, iter_table(closed), num_rows=closed.num_rows, layer_rate=AGAIN_RATE, on_progress=advance
            )
            for size, trainer in teachers.trainers.items()
        }
        teachers.snapshots |= {(size, week): future.result() for size, future in done.items()}
    return cursor


def read_rows(url: str, fms: Sequence[str], *, filters: list[list[object]]) -> tuple[Rows, np.ndarray]:
    """Give a student's closed rows in ready order with what the FMs said, and their event times in microseconds."""
    dataset = AugmentedDataset(
        url,
        DATASET,
        fms=list(fms),
        outputs=[TASK] if fms else None,
        columns=[*IDS, TASK],
        filter=filters,
        batch_rows=16_384,
        buckets=1 << 20,
    )
    kept: dict[str, list[np.ndarray]] = {}
    for batch in dataset:
        found = {"time": batch.event_time_B, "label": batch.labels[TASK]}
        found["index"] = build_indices(batch.categories_BC.numpy())
        for fm in fms:
            found |= {f"logit_{fm}": batch.fms[fm].logits[TASK], f"present_{fm}": batch.fms[fm].present_B}
        for name, values in found.items():
            kept.setdefault(name, []).append(values.numpy())
    columns = {name: np.concatenate(parts) for name, parts in kept.items()}
    rows = Rows(
        indices=columns["index"],
        labels=columns["label"],
        logits={fm: columns[f"logit_{fm}"] for fm in fms},
        present={fm: columns[f"present_{fm}"] for fm in fms},
    )
    return rows, columns["time"]


def count_forwards(client: Client, fms: Sequence[str]) -> dict[str, int]:
    """Give how many rows each FM went over, as the workers count them."""
    metrics = "\n".join(scrape_workers(client))
    return {fm: int(metric_sum(metrics, "das_fm_forward_rows_total", dataset=DATASET, fm=fm)) for fm in fms}
