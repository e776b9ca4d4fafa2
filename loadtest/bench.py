"""`make bench`: every stage against its floor, in one run; the last line on stdout is JSON (contract 10).

Stages run one after the other. Those that a service answers (ingest; end to end and lookup) are measured from this
process; the others (worker, sink, augment) in processes of their own, set up as the role is. Progress goes to stderr.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from das_service.up.embedded import NoServerError
from das_service.up.supervisor import SupervisorError, running_service
from loadtest import end_to_end, ingest, lookup
from loadtest.lines import line_text, say
from loadtest.report import ROOT, filesystem, machine, print_table, write_result
from loadtest.workload import CHUNK_ROWS

Record = dict[str, Any]
_STAGE_SECONDS = 900.0
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
_BUSY_LOAD = 0.5


class StageError(Exception):
    """A stage did not come to its end."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much a stage does: chunks of 5,000 rows in each round, and rounds."""

    num_chunks: int
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much all stages do."""

    ingest: Size
    stream_chunks: int
    lookup_rounds: int
    worker: Size
    worker_free: Size
    sink: Size
    augment_rows: int
    augment_rounds: int
    batches_rows: int
    batches_rounds: int
    loader_rows: int
    loader_rounds: int


FULL = Sizes(
    ingest=Size(14, 12),  # stays below the size at which the server would rewrite its log in the middle
    stream_chunks=220,  # likewise
    lookup_rounds=100,
    worker=Size(13, 3),
    worker_free=Size(16, 2),
    sink=Size(40, 3),
    augment_rows=5_000_000,
    augment_rounds=3,
    batches_rows=600_000,
    batches_rounds=3,
    loader_rows=200_000,
    loader_rounds=3,
)
QUICK = Sizes(
    ingest=Size(2, 2),
    stream_chunks=4,
    lookup_rounds=4,
    worker=Size(1, 2),
    worker_free=Size(1, 2),
    sink=Size(1, 2),
    augment_rows=20_000,
    augment_rounds=2,
    batches_rows=20_000,
    batches_rounds=2,
    loader_rows=20_000,
    loader_rounds=2,
)


def measure_ingest(folder: Path, sizes: Sizes) -> Record:
    """Give the line of ingest; API and server alone, so that nothing else takes turns with the two sides."""
    with running_service(folder=folder / "service", roles=("api",)) as service:
        return {"ingest": ingest.measure(service, num_chunks=sizes.ingest.num_chunks, rounds=sizes.ingest.rounds)}


def measure_service(folder: Path, sizes: Sizes) -> Record:
    """Give end to end, and lookup in the store that this filled."""
    num_rows = sizes.stream_chunks * CHUNK_ROWS
    with running_service(folder=folder / "service") as service:
        end_to_end.publish_fm(service, folder)
        streamed = end_to_end.measure(service, num_chunks=sizes.stream_chunks)
        looked_up = lookup.measure(service, num_rows=num_rows, rounds=sizes.lookup_rounds)
    return {"end_to_end": streamed, "lookup": looked_up}


def measure_worker(folder: Path, sizes: Sizes) -> Record:
    """Give the lines of the worker with either FM."""
    lines = {}
    for name, fm, size in (("worker", "compute_bound", sizes.worker), ("worker_free", "free", sizes.worker_free)):
        lines[name] = _in_own_process(
            "worker", folder / name, environment=_ONE_THREAD, fm=fm, num_chunks=size.num_chunks, rounds=size.rounds
        )
    return lines


def measure_sink(folder: Path, sizes: Sizes) -> Record:
    """Give the line of the sink."""
    size = sizes.sink
    return {"sink": _in_own_process("sink", folder, num_chunks=size.num_chunks, rounds=size.rounds)}


def measure_augment(folder: Path, sizes: Sizes) -> Record:
    """Give the lines of augment, by reference and over HTTP."""
    return _in_own_process("augment", folder, num_rows=sizes.augment_rows, rounds=sizes.augment_rounds)


def measure_batches(folder: Path, sizes: Sizes) -> Record:
    """Give the lines of training batches, to Arrow and over HTTP."""
    folder.mkdir(exist_ok=True)
    return _in_own_process("batches", folder, num_rows=sizes.batches_rows, rounds=sizes.batches_rounds)


def measure_loader(folder: Path, sizes: Sizes) -> Record:
    """Give the line of the loader."""
    return _in_own_process("loader", folder, num_rows=sizes.loader_rows, rounds=sizes.loader_rounds)


STAGES: dict[str, Callable[[Path, Sizes], Record]] = {
    "ingest": measure_ingest,
    "service": measure_service,
    "worker": measure_worker,
    "sink": measure_sink,
    "augment": measure_augment,
    "batches": measure_batches,
    "loader": measure_loader,
}


def _in_own_process(
    module: str, folder: Path, *, environment: Mapping[str, str] | None = None, **options: object
) -> Record:
    """Run `python -m loadtest.<module>` with these options; give what it prints.

    Raises:
        StageError: It failed; it has said why on stderr.
    """
    command = [sys.executable, "-m", f"loadtest.{module}", f"--folder={folder}"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    variables = {**os.environ, **(environment or {})}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, timeout=_STAGE_SECONDS, check=True
        )
    except subprocess.SubprocessError as error:
        raise StageError(f"loadtest.{module} failed: {error}") from error
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(folder: Path, sizes: Sizes, stages: list[str]) -> Record:
    """Give the record of these stages; the folder is emptied after each."""
    record: Record = {"machine": machine(folder), "seconds": {}}
    if record["machine"]["load_at_start"] > _BUSY_LOAD:
        say(f"the machine is busy (load {record['machine']['load_at_start']}): the rates will be too low")
    if filesystem(folder) == "tmpfs":
        say(f"{folder} is in memory, where fsync costs nothing: name a folder on a disk with --folder")
    began = time.monotonic()
    for i, stage in enumerate(stages, 1):
        start = time.monotonic()
        say(f"[{i}/{len(stages)}] {stage} ...")
        (folder / stage).mkdir()
        lines = STAGES[stage](folder / stage, sizes)
        shutil.rmtree(folder / stage)
        record |= lines
        record["seconds"][stage] = round(time.monotonic() - start, 1)
        for name, line in lines.items():
            text = f"{line['examples_per_s']:,} examples/s" if name == "end_to_end" else line_text(line)
            say(f"      {name}: {text}")
    record["seconds"]["total"] = round(time.monotonic() - began, 1)
    now = datetime.now(UTC)
    return {**record, "date": now.date().isoformat(), "finished_at": now.isoformat(timespec="seconds")}


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds a stage: shows that it works, not how fast")
    parser.add_argument(
        "--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument(
        "--folder", type=Path, help="where to work, on the disk to be measured; default: a new one in /tmp"
    )
    parser.add_argument("--write", metavar="NAME", help="keep loadtest/results/<date>-NAME.json and render the README")
    options = parser.parse_args(arguments)
    if options.write and (options.quick or options.only != list(STAGES)):
        parser.error("--write takes a whole run")
    with ExitStack() as stack:
        if options.folder:
            options.folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="das-bench-", dir=options.folder, ignore_cleanup_errors=True)
        try:
            record = run(Path(stack.enter_context(made)), QUICK if options.quick else FULL, options.only)
        except KeyboardInterrupt:
            say("stopped")
            return 130
        except (StageError, SupervisorError, NoServerError, RuntimeError, TimeoutError) as error:
            say(str(error))
            return 1
    print_table(Console(), record)
    if options.write:
        say(f"kept in {write_result(record, options.write)}")
    print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
