"""`python -m experiments.exfm`: what external distillation is worth to a student, through the running service.

Teachers of three sizes and four lags score the stream of Complete Journey; two students, five seeds each, learn from
what they said by every method of ExFM (arXiv 2502.17494), and from labels alone. Writes experiments/results/exfm.json,
exfm.md and the plots; the last line is JSON. Methods are tuned on weeks 15-26, eight settings each, and reported on
weeks 27-53, which chose nothing of them; the teachers' own rates were chosen on weeks 15-26 too
(`python -m experiments.tune_teacher`).

What is done is kept in --folder: run again after an interruption, and it goes on. `--quick` runs a small part of it.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, Final, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

from das_service.client import Client
from das_service.up.supervisor import SupervisorError, running_service
from experiments.data import complete_journey as journey
from experiments.exfm_cells import Job, Tried, choose, keep, make_starts, processes, run_jobs, tune
from experiments.exfm_plan import FULL, METHODS, MIDDLE, PEEK, PEEK_UNGUARDED, QUICK, Cell, Knobs, Plan, fingerprint
from experiments.exfm_report import GUIDE, build_record, render_guide, write_report
from experiments.exfm_serving import DATASET, count_forwards, read_rows, stream, train_first
from experiments.exfm_students import Trainer, build_first_rows, save_rows
from experiments.progress import Bars, Clock, empty_folder
from experiments.teacher import torch_settings
from vm_training.metrics import auc, normalized_entropy

SLICES: Final[dict[str, list[list[object]]]] = {
    "display": [["display", "!=", "0"]],
    "mailer": [["mailer", "!=", "0"]],
    "department GROCERY": [["department", "=", "GROCERY"]],
    "department DRUG GM": [["department", "=", "DRUG GM"]],
}
_MARK: Final = ".das-exfm"
Found: TypeAlias = dict[Job, dict[str, Any]]
_SERVED: Final = "served.json"
_LOOKED_UP: Final = 1_000


def run(plan: Plan, folder: Path, console: Console) -> dict[str, Any]:
    """Run what is not done yet; give the record of contract 10."""
    clock, bars = Clock(), Bars(console)
    if not _is_served(plan, folder):
        empty_folder(folder, mark=_MARK)
        served = _serve(plan, folder, clock, bars)
        _keep_served(plan, folder, served, clock)
    kept = json.loads((folder / _SERVED).read_text())
    served, clock.seconds = kept["served"], kept["seconds"]
    try:
        found, tried = _train(plan, folder, clock, bars)
    finally:
        _keep_served(plan, folder, served, clock)  # who goes on later has this time too
    seconds = {**clock.seconds, "total": round(sum(clock.seconds.values()), 1)}
    return build_record(plan, found, tried, served, seconds=seconds, machine=_machine())


def _train(plan: Plan, folder: Path, clock: Clock, bars: Bars) -> tuple[Found, Tried]:
    """Train every student that is not trained yet; give the metrics of each, and of the settings that were tried."""
    with processes() as pool:
        with clock.stage("starts"):
            count = len(plan.students) * len(plan.seeds)
            with bars.bar("Students on the labels before", count) as advance:
                make_starts(pool, folder, plan, advance)
        with (
            clock.stage("tune"),
            bars.bar("Tuning each method", len(plan.students) * len(METHODS) * plan.trials) as advance,
        ):
            tried = tune(pool, folder, plan, advance)
        tuned = choose(tried)
        jobs = [
            Job(cell=cell, knobs=tuned[cell.student, cell.method], phase="report") for cell in plan.cells()
        ]  # fmt: skip
        with clock.stage("cells"), bars.bar("Training every student, once per method", len(jobs)) as advance:
            return run_jobs(pool, folder, jobs, advance), tried


def _keep_served(plan: Plan, folder: Path, served: dict[str, Any], clock: Clock) -> None:
    keep(
        folder / _SERVED,
        json.dumps({"made_by": fingerprint(plan), "served": served, "seconds": clock.seconds}).encode(),
    )


def _is_served(plan: Plan, folder: Path) -> bool:
    """Give whether the folder has what this very plan and code streamed: another one's rows are not its own."""
    kept = folder / _SERVED
    return kept.exists() and json.loads(kept.read_text()).get("made_by") == fingerprint(plan)


def _serve(plan: Plan, folder: Path, clock: Clock, bars: Bars) -> dict[str, Any]:
    """Stream everything past all teachers, and keep the rows of the students; give what there is to report of that."""
    weeks = [*plan.first, *plan.tune, *plan.report]
    with clock.stage("build"), bars.bar("Building impressions, week by week", len(weeks)) as advance:
        files = journey.build_impressions(folder / "weeks", weeks=weeks, on_progress=lambda _: advance(1))
    with clock.stage("teachers"):
        teachers = train_first(plan, files, bars)
    with contextlib.ExitStack() as stack:
        with clock.stage("stream"):
            service = stack.enter_context(running_service(folder=folder / "service"))
            client = stack.enter_context(Client(service.url, timeout_seconds=60))
            client.put_dataset(DATASET, journey.DATASET_SPEC)
            posted = stream(client, plan, files, teachers, folder, bars)
        with clock.stage("read"):
            read = _keep_rows(plan, files, folder, service.url)
        with clock.stage("slices"):
            slices = {name: _cost_of_supervision(service.url, SLICES[name]) for name in plan.slices}
        last_week = next(file.path for file in files if file.week == plan.report[-1])
        read["teachers"][PEEK]["statuses"] = _statuses(client, PEEK, last_week)
        forwards = count_forwards(client, [*plan.sizes, *plan.lag_fms(), PEEK, PEEK_UNGUARDED])
    return {"posted": posted, "forwards": forwards, **read, "slices": slices}


def _keep_rows(plan: Plan, files: tuple[journey.WeekFile, ...], folder: Path, url: str) -> dict[str, Any]:
    """Keep the rows that the students begin with, are tuned on and are reported on; give the teachers' own metrics."""
    fms = [*plan.sizes, *plan.lag_fms(), PEEK, PEEK_UNGUARDED]
    rows, time_N = read_rows(url, fms, filters=SLICES["display"])
    counted, first_of_report = _first_time(files, plan.first_counted_of_tune()), _first_time(files, plan.report[0])
    for name, mask_N in {
        "warm_tune": time_N < counted,
        "tune": (time_N >= counted) & (time_N < first_of_report),
        "warm_report": time_N < first_of_report,
        "report": time_N >= first_of_report,
    }.items():
        save_rows(folder / "rows" / name, rows.part(mask_N))
    paths = [file.path for file in files if file.week in plan.first]
    save_rows(folder / "rows" / "before", build_first_rows(paths, student="display"))
    reported = rows.part(time_N >= first_of_report)
    teachers = {}
    for fm in fms:
        present = reported.present[fm]
        teachers[fm] = {"coverage": float(present.mean())}
        if present.any():
            logits, labels = reported.logits[fm][present], reported.labels[present]
            teachers[fm] |= {"ne": normalized_entropy(logits, labels), "auc": auc(logits, labels)}
    return {"rows": {"tune": int(len(rows) - len(reported)), "report": len(reported)}, "teachers": teachers}


def _first_time(files: tuple[journey.WeekFile, ...], week: int) -> int:
    path = next(file.path for file in files if file.week == week)
    return int(pq.read_table(path, columns=["event_time"])["event_time"].cast(pa.int64())[0].as_py())


def _cost_of_supervision(url: str, filters: list[list[object]]) -> dict[str, Any]:
    """Read a slice and train a student on it, twice with and twice without supervision; give rows and seconds."""
    seconds: dict[str, dict[str, list[float]]] = {
        method: {"read": [], "train": []} for method in ("none", "ah")
    }  # fmt: skip
    rows = 0
    for method in ("none", "ah", "ah", "none"):  # whatever gets slower or faster meanwhile does so for both
        fms = [MIDDLE] if method == "ah" else []
        start = time.perf_counter()
        found, _ = read_rows(url, fms, filters=filters)
        seconds[method]["read"].append(round(time.perf_counter() - start, 2))
        start = time.perf_counter()
        with torch_settings(seed=0, num_threads=1):
            trainer = Trainer(Cell(method=method, student="small", seed=0, fm="".join(fms)), Knobs())
            trainer.add_method()
            trainer.train(found)
        seconds[method]["train"].append(round(time.perf_counter() - start, 2))
        rows = len(found)
    return {"rows": rows, "without": seconds["none"], "with": seconds["ah"]}


def _statuses(client: Client, fm: str, path: Path) -> dict[str, int]:
    """Give how many of the first rows of a week file have each status of an FM."""
    ids = pq.read_table(path, columns=["example_id"])["example_id"].slice(0, _LOOKED_UP).to_pylist()
    found = client.lookup(DATASET, ids, fms=[fm])[f"{fm}__status"]
    return {one["values"]: one["counts"] for one in found.value_counts().to_pylist()}


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.exfm", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few weeks, one teacher, one student, two seeds")
    parser.add_argument(
        "--folder", type=Path, help="where everything is kept on the way; default: exfm-data, or exfm-quick-data"
    )
    parser.add_argument("--results", type=Path, help="default: experiments/results, with --quick the folder itself")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    folder = (options.folder or Path("exfm-quick-data" if options.quick else "exfm-data")).absolute()
    results = options.results or (folder if options.quick else Path(__file__).parent / "results")
    try:
        record = run(QUICK if options.quick else FULL, folder, console)
    except KeyboardInterrupt:
        console.print("Stopped; run it again, and it goes on with the cells that are not trained yet.")
        return 130
    except SupervisorError as error:
        console.print(f"[red]{error}[/red]")
        return 1
    write_report(results, record)
    console.print(f"Written: {results}/exfm.json, exfm.md and the plots.")
    if not options.quick and options.results is None:
        render_guide()
        console.print(f"Brought up to date: {GUIDE}")
    print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
