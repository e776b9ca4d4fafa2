"""Cells of the ExFM experiment on two processes: start states, tuning, and every cell, each kept when it is done."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from experiments.exfm_plan import METHODS, MIDDLE, Cell, Knobs, Plan, rates, trials
from experiments.exfm_students import Rows, Trainer, load_rows
from experiments.teacher import torch_settings
from vm_training.metrics import auc, calibration, normalized_entropy

Phase = Literal["tune", "report"]
Tried: TypeAlias = dict[tuple[str, str], dict[Knobs, float]]
_PROCESSES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A cell to be trained at these settings: from the start state of a phase, through its warm-up, over its rows."""

    cell: Cell
    knobs: Knobs
    phase: Phase

    @property
    def warm_up(self) -> tuple[object, ...]:
        """What cells must share to share a warm-up: they are trained in one go."""
        cell = self.cell
        return cell.method, cell.student, cell.seed, cell.warm_fm, cell.control, self.knobs, self.phase


@contextmanager
def processes() -> Iterator[ProcessPoolExecutor]:
    """Run processes that train on one thread each."""
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else all that waits is still trained
            raise


def make_starts(pool: ProcessPoolExecutor, folder: Path, plan: Plan, on_progress: Callable[[int], None]) -> None:
    """Train each student on the labels of the first weeks, unless that was done."""
    wanted = itertools.product([str(folder)], plan.students, plan.seeds)
    for done in as_completed([pool.submit(_make_start, *one) for one in wanted]):
        on_progress(done.result())


def tune(pool: ProcessPoolExecutor, folder: Path, plan: Plan, on_progress: Callable[[int], None]) -> Tried:
    """Give the mean NE over the weeks of the tuning of all settings that are tried of each (student, method).

    Of the methods at the learning rates that are best for labels alone.
    """

    def run(tried: Mapping[tuple[str, str], Sequence[Knobs]]) -> Tried:
        jobs = {
            (named, knobs): [_tuning_job(named, knobs, seed) for seed in plan.tune_seeds]
            for named, many in tried.items() for knobs in many
        }  # fmt: skip
        found = run_jobs(pool, folder, [job for many in jobs.values() for job in many], on_progress)
        ne = {tried_one: float(np.mean([found[job]["ne"] for job in many])) for tried_one, many in jobs.items()}
        return {named: {knobs: ne[named, knobs] for knobs in many} for named, many in tried.items()}

    alone = run({(student, "none"): rates(plan.trials) for student in plan.students})
    chosen = choose(alone)
    return alone | run(
        {
            (student, method): trials(method, chosen[student, "none"], plan.trials)
            for student in plan.students for method in METHODS if method != "none"
        }
    )  # fmt: skip


def choose(tried: Tried) -> dict[tuple[str, str], Knobs]:
    """Give the settings of the lowest NE of each (student, method)."""
    return {named: min(by_knobs, key=lambda knobs: by_knobs[knobs]) for named, by_knobs in tried.items()}


def _tuning_job(named: tuple[str, str], knobs: Knobs, seed: int) -> Job:
    student, method = named
    fm = "" if method == "none" else MIDDLE
    cell = Cell(method=method, student=student, seed=seed, fm=fm, teacher_size=fm or None)
    return Job(cell=cell, knobs=knobs, phase="tune")


def run_jobs(
    pool: ProcessPoolExecutor, folder: Path, jobs: Sequence[Job], on_progress: Callable[[int], None]
) -> dict[Job, dict[str, Any]]:
    """Give the metrics of each job; those that were kept are read."""
    groups: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.warm_up, []).append(job)
    running = {pool.submit(_run_group, str(folder), group): group for group in groups.values()}
    found: dict[Job, dict[str, Any]] = {}
    for done in as_completed(running):
        found |= dict(zip(running[done], done.result(), strict=True))
        on_progress(len(running[done]))
    return found


def _run_group(folder: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Train cells of one warm-up, unless they were."""
    kept = [Path(folder) / "cells" / f"{job.phase}-{job.cell.key(job.knobs)}.json" for job in jobs]
    if not all(path.exists() for path in kept):
        first = jobs[0]
        with torch_settings(seed=first.cell.seed, num_threads=1):
            warm = Trainer(first.cell, first.knobs)
            start = _start_path(folder, first.cell.student, first.cell.seed)
            warm.load(start.read_bytes())
            warm.add_method()
            warm = warm.copy(fm=first.cell.warm_fm)
            warm.train(_rows(folder, f"warm_{first.phase}"))
            for job, path in zip(jobs, kept, strict=True):
                record = _metrics(warm.copy(fm=job.cell.fm), _rows(folder, job.phase))
                keep(path, json.dumps({**asdict(job.cell), "knobs": asdict(job.knobs), **record}).encode())
    return [json.loads(path.read_text()) for path in kept]


def _metrics(trainer: Trainer, rows: Rows) -> dict[str, Any]:
    logits = trainer.train(rows)
    return {
        "rows": len(rows),
        "ne": normalized_entropy(logits, rows.labels),
        "auc": auc(logits, rows.labels),
        "calibration": calibration(logits, rows.labels),
    }


def _make_start(folder: str, student: str, seed: int) -> int:
    path = _start_path(folder, student, seed)
    if not path.exists():
        with torch_settings(seed=seed, num_threads=1):
            trainer = Trainer(Cell(method="none", student=student, seed=seed), Knobs())
            trainer.train(_rows(folder, "before"))
        keep(path, trainer.save())
    return 1


def _start_path(folder: str, student: str, seed: int) -> Path:
    return Path(folder) / "starts" / f"{student}-{seed}.pt"


def keep(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_bytes(data)
    half.rename(path)


@cache
def _rows(folder: str, name: str) -> Rows:
    return load_rows(Path(folder) / "rows" / name)
