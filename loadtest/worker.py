"""The worker: a real lane on a real server, from its XREADGROUP to the reply of the script that publishes.

Floor: the model's forward alone, over the tensors of the very batches that the lane has just scored, ready on the
device. Each round has rows of its own, logged before the clock starts; its floor is the mean of the runs right before
and right after it, since a machine's speed changes within seconds. `python -m loadtest.worker` prints the line; torch,
OMP and BLAS have as many threads as in `das worker` (loadtest.bench sets the environment).
"""

import argparse
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from das_service.folder import Folder
from das_service.logs.records import EXAMPLES, fm_logs
from das_service.logs.streams import AppendLimits, append_chunks, create_groups, create_logs
from das_service.metrics import Metrics
from das_service.redis_client import connect, has_msetex
from das_service.role import RoleContext
from das_service.settings import Settings
from fm_inference.engine import Prepared, TorchEngine, choose_device
from fm_inference.lane import Lane, Loaded
from fm_inference.publishing import Outcome, Publisher, microseconds
from loadtest.fms import FMS, export
from loadtest.lines import Round, to_line
from loadtest.server import running_server
from loadtest.workload import CHUNK_ROWS, DATASET, SPEC, bodies, entries
from schemas.snapshot import MODEL_FILE, Manifest

_CONSUMER = "bench"
_MOST_SECONDS = 120.0
_WARM_UP_CHUNKS = 4


class WatchedEngine(TorchEngine):
    """The worker's engine; keeps the batches that it prepared, so that the floor runs over the same."""

    prepared: list[Prepared]

    def prepare(self, columns: pa.RecordBatch | pa.Table) -> Prepared:
        """Give the chunk's tensors, and keep them."""
        self.prepared.append(super().prepare(columns))
        return self.prepared[-1]

    def forward_alone(self) -> float:
        """Run the model over the kept batches, and forget them; give the seconds it took."""
        batches = [{name: t.to(self.device) for name, t in p.tensors.items()} for p in self.prepared]
        self.prepared = []
        self._synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            for tensors in batches:
                self._module(**tensors)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class WatchedLane(Lane):
    """The worker's lane; says when it has published as many rows as were logged, without anybody asking it."""

    num_rows: int
    is_done: threading.Event
    done_at = 0.0

    def _publish(self, loaded: Loaded, outcomes: Sequence[Outcome]) -> None:
        super()._publish(loaded, outcomes)
        if self.rows_scored >= self.num_rows:
            self.done_at = time.perf_counter()
            self.is_done.set()


def measure(folder: Path, *, fm: str, num_chunks: int, rounds: int) -> dict[str, Any]:
    """Give the line of one FM. The first round of all only warms up."""
    manifest = export(fm, folder / "export")
    with running_server(folder) as settings:
        torch.set_num_threads(settings.torch_threads)
        pa.set_cpu_count(settings.torch_threads)
        engine = _load(folder / "export", manifest, settings)
        _create_logs(settings, fm)
        timed, batches = [], 0
        for i in range(rounds + 1):
            count = min(num_chunks, _WARM_UP_CHUNKS) if i == 0 else num_chunks
            _append(settings, i * num_chunks * CHUNK_ROWS, count)
            seconds = _score(settings, fm, engine, count * CHUNK_ROWS)
            batches += len(engine.prepared)
            timed.append(Round(count * CHUNK_ROWS, seconds, engine.forward_alone()))
    measured = [
        Round(
            now.num_rows, now.seconds, (before.floor_seconds * now.num_rows / before.num_rows + now.floor_seconds) / 2
        )
        for before, now in pairwise(timed)
    ]
    mean_rows = sum(r.num_rows for r in timed) / batches
    return to_line(measured, batch_rows=round(mean_rows), threads=torch.get_num_threads(), device=str(engine.device))


def _load(folder: Path, manifest: Manifest, settings: Settings) -> WatchedEngine:
    program = torch.export.load(str(folder / MODEL_FILE))
    engine = WatchedEngine(program, manifest, {}, device=choose_device(settings.device))
    engine.prepared = []
    engine.warm_up()
    return engine


def _create_logs(settings: Settings, fm: str) -> None:
    with connect(settings) as client:
        folder = Folder(settings.tables_uri)
        create_logs(client, folder, DATASET, partitions=SPEC.partitions, kinds=(EXAMPLES, *fm_logs(fm)))
        create_groups(client, DATASET, partitions=SPEC.partitions, fm=fm)


def _append(settings: Settings, first: int, num_chunks: int) -> None:
    limits = AppendLimits(epoch=1, floors={}, max_bytes=1 << 40, dedup_seconds=3600)
    with connect(settings) as client:
        for chunks in entries(bodies(first, num_chunks)):
            append_chunks(client, chunks, limits)


def _score(settings: Settings, fm: str, engine: WatchedEngine, num_rows: int) -> float:
    """Let a lane score what waits; give the seconds from its first read to its last publish.

    Raises:
        RuntimeError: It halted, or did not score all rows in time.
    """
    with connect(settings) as client:
        loaded = Loaded(engine=engine, publisher=_publisher(fm, engine, has_msetex=has_msetex(client)), spec=SPEC)
        context = RoleContext(settings, role="worker", instance=_CONSUMER, client=client, metrics=Metrics("worker"))
        lane = WatchedLane(context, dataset=DATASET, fm=fm, partitions=SPEC.partitions)
        lane.num_rows, lane.is_done, lane.loaded = num_rows, threading.Event(), loaded
        threads = [threading.Thread(target=run) for run in (lane.read_until_stopped, lane.score_until_stopped)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        while not lane.is_done.wait(0.5) and not lane.halted and time.perf_counter() - start < _MOST_SECONDS:
            pass
        context.stopping.set()
        for thread in threads:
            thread.join(settings.drain_seconds)
        if lane.rows_scored != num_rows:
            raise RuntimeError(f"{lane.rows_scored} of {num_rows} rows are scored {lane.halted}")
        return lane.done_at - start


def _publisher(fm: str, engine: TorchEngine, *, has_msetex: bool) -> Publisher:
    manifest = engine.manifest
    return Publisher(
        dataset=DATASET,
        fm=fm,
        consumer=_CONSUMER,
        snapshot_id=manifest.snapshot_id,
        snapshot_number=0,
        trained_through_us=microseconds(manifest.trained_through),
        generation=0,
        epoch=1,
        ttl_seconds=SPEC.online_ttl_seconds,
        outputs=manifest.outputs.columns(),
        has_msetex=has_msetex,
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fm", choices=sorted(FMS), default="compute_bound")
    parser.add_argument("--num-chunks", type=int, default=12, help="of 5,000 rows, in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a new or empty one; default: in /tmp")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="das-bench-")))
        line = measure(folder, fm=options.fm, num_chunks=options.num_chunks, rounds=options.rounds)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
