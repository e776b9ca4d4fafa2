"""The sink: from entries in the log of `examples` to rows that are durable in the table, and the log freed.

Floor: `write_deltalake` of the same rows, ready-made, into a table of its own. It neither reads a log nor looks for
repeats nor fsyncs; what these cost the sink is said beside the ratio. Each round is one commit of as many rows as the
sink takes at once, into the same event day, so that later rounds look for repeats among more rows.
`python -m loadtest.sink` prints the line.
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake

from das_service.folder import Folder
from das_service.logs.records import EXAMPLES, read_mark
from das_service.logs.streams import AppendLimits, append_chunks, create_logs, read_after, read_counters
from das_service.metrics import Metrics
from das_service.redis_client import connect
from das_service.registry import Registry, dataset_field
from das_service.role import RoleContext
from das_service.settings import Settings
from das_service.sink.sink import Sink
from das_service.sink.table_rows import example_rows
from loadtest.lines import Round, to_line
from loadtest.server import running_server
from loadtest.workload import CHUNK_ROWS, DATASET, SPEC, bodies, entries
from schemas.dataset import DatasetSpec
from schemas.tables import EVENT_DAY

_THREADS = 2  # as in das_service.sink.sink
_MOST_SECONDS = 60.0
_STAGES = {"build": "rows", "dedup": "identity", "commit": "commit"}


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent so far."""

    seconds: float = 0.0


def measure(folder: Path, *, num_chunks: int, rounds: int) -> dict[str, Any]:
    """Give the line. The first round of all only warms up."""
    pa.set_cpu_count(_THREADS)
    pa.set_io_thread_count(_THREADS)
    num_rows = num_chunks * CHUNK_ROWS
    with running_server(folder) as base, connect(base) as client, fsync_timed() as fsync:
        settings = base.model_copy(update={"commit_rows": num_rows})
        Registry(client, Folder(settings.tables_uri)).change(dataset_field(DATASET), DatasetSpec, lambda _: SPEC)
        create_logs(
            client, Folder(settings.tables_uri), DATASET, partitions=SPEC.partitions, kinds=(EXAMPLES,)
        )  # fmt: skip
        metrics = Metrics("sink")
        sink = Sink(RoleContext(settings, role="sink", instance="bench", client=client, metrics=metrics))
        sink.step(now=time.monotonic())
        measured = []
        for i in range(rounds + 1):
            rows = _log_rows(settings, i * num_rows, num_chunks)
            if i == 1:
                before = _seconds(metrics, fsync)
            seconds = _commit(settings, sink, (i + 1) * num_rows)
            measured.append(Round(num_rows, seconds, _write(folder / "floor", rows)))
        after = _seconds(metrics, fsync)
        sink.close()
    spent = {name: (after[name] - before[name]) / rounds / num_rows * 1e6 for name in after}
    return to_line(measured[1:], commit_rows=num_rows, seconds_per_million={n: round(s, 3) for n, s in spent.items()})


def _log_rows(settings: Settings, first: int, num_chunks: int) -> pa.Table:
    """Append chunks to the log; give the rows that the table shall have of them."""
    limits = AppendLimits(epoch=1, floors={}, max_bytes=1 << 40, dedup_seconds=3600)
    with connect(settings) as client:
        counters = read_counters(client, DATASET, range(SPEC.partitions), [EXAMPLES])
        if any(found.kept_rows for found in counters.values()):
            raise RuntimeError("the sink did not free the log")
        for chunks in entries(bodies(first, num_chunks)):
            append_chunks(client, chunks, limits)
        logged = read_after(client, DATASET, EXAMPLES, dict.fromkeys(range(SPEC.partitions)), count=1_000_000)
    return example_rows([entry for part in logged.values() for entry in part], SPEC)


def _commit(settings: Settings, sink: Sink, num_rows: int) -> float:
    """Let the sink work until the table's durable mark counts num_rows and the log is free; give the seconds.

    Raises:
        TimeoutError: It does not.
    """
    folder = Folder(settings.tables_uri)
    start = time.perf_counter()
    while (mark := read_mark(folder, DATASET, EXAMPLES)) is None or mark.rows < num_rows:
        if time.perf_counter() - start > _MOST_SECONDS:
            raise TimeoutError(f"the sink did not commit: {'; '.join(sink.health())}")
        sink.step(now=time.monotonic())
    return time.perf_counter() - start


def _write(path: Path, rows: pa.Table) -> float:
    start = time.perf_counter()
    write_deltalake(path, rows, mode="append", partition_by=[EVENT_DAY])
    return time.perf_counter() - start


@contextlib.contextmanager
def fsync_timed() -> Iterator[Stopwatch]:
    """Measure how long this process waits for fsync."""
    watch, fsync = Stopwatch(), os.fsync

    def timed(fd: Any) -> None:  # noqa: ANN401 - as os.fsync
        start = time.perf_counter()
        fsync(fd)
        watch.seconds += time.perf_counter() - start

    os.fsync = timed
    try:
        yield watch
    finally:
        os.fsync = fsync


def _seconds(metrics: Metrics, fsync: Stopwatch) -> dict[str, float]:
    """Give the seconds spent so far by stage; those of fsync are part of the commit's."""
    stages = {
        name: metrics.registry.get_sample_value("das_stage_seconds_sum", {"role": "sink", "stage": stage}) or 0.0
        for name, stage in _STAGES.items()
    }
    return {**stages, "fsync": fsync.seconds}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-chunks", type=int, default=40, help="of 5,000 rows, in each commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a new or empty one; default: in /tmp")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="das-bench-")))
        line = measure(folder, num_chunks=options.num_chunks, rounds=options.rounds)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
