"""Two trainers augment, one over HTTP and one by reference, while rows come in and tables are compacted.

Once all is committed each has many more rows than there are examples, and the memory of its join is measured.
"""

import itertools
import json
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from das_service.client import Client
from das_service.settings import load_settings
from das_service.snapshot_publish import publish_snapshot
from das_service.up.supervisor import RunningService, running_service
from schemas.dataset import DatasetSpec
from tests.fakes import export_closed_form

SPEC = DatasetSpec.model_validate(
    {
        "features": [{"name": "price", "type": "float"}],
        "tasks": [{"name": "click", "label_window_seconds": 3600}],
        "partitions": 2,
    }
)
FIRST = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(days=3)
FIRST_US, DAY_US = int(FIRST.timestamp()) * 1_000_000, 86_400_000_000
CHUNK, ROUNDS, ROWS, GHOST = 500, 3, 5_000, -1
MANY_ROWS = 1_500_000
MIB = 1024 * 1024
DUCKDB_BYTES = 128 * MIB
REST_BYTES = 300 * MIB  # libraries, bodies, answers: 280 to 300 MB before there are many rows
WINDOW_BYTES = 1_000_000 * 60  # the most rows of a window; `window_rows` counts 28 bytes of one FM and 32 more for each
WRITER_BYTES = 64 * MIB  # by reference alone: a row group being encoded, pages that are read; 630 to 663 MB in all
WAIT_SECONDS = 180.0
Numbers = NDArray[np.int64]


def table(numbers: Numbers) -> pa.Table:
    """Give examples over three days; every thousandth is one that the model fails on, a negative one is nobody's."""
    times = FIRST_US + numbers % 3 * DAY_US + numbers * 1000
    return pa.table(
        {
            "example_id": [f"e{number}" for number in numbers.tolist()],
            "event_time": pa.array(times).cast(pa.timestamp("us", "UTC")),
            "price": np.where(numbers % 1000 == 7, 2e6, numbers / 4),
        }
    )


@dataclass(frozen=True)
class Answers:
    """A trainer's rows and what came back."""

    numbers: Numbers
    found: pa.Table

    def check(self, *, is_settled: bool = False) -> None:
        """Every row is the caller's own, in order; what was acknowledged is known, and its values are its own."""
        status = np.array(self.found["teacher__status"].to_pylist())
        logit = self.found["teacher__click__logit"].to_numpy(zero_copy_only=False)
        assert self.found.select(["example_id", "event_time", "price"]).equals(table(self.numbers))
        is_ghost, is_poison = self.numbers == GHOST, self.numbers % 1000 == 7
        final = np.select([is_ghost, is_poison], ["missing", "failed"], "present")
        assert [row for row in np.flatnonzero(status != final) if is_settled or status[row] != "pending"] == []
        np.testing.assert_array_equal(
            logit, np.where(status == "present", (self.numbers / 32).astype(np.float32), np.float32(np.nan))
        )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("trainers")
    overrides = {
        "DAS_COMMIT_SECONDS": "0.2",
        "DAS_COMPACT_FILES": "3",
        "DAS_DUCKDB_MEMORY_BYTES": str(DUCKDB_BYTES),
    }
    export_closed_form(folder / "s1", SPEC, fm="teacher", poison="nan")
    with running_service(folder=folder / "data", env_overrides=overrides) as running:
        settings = load_settings({}, redis_url=running.redis_url, snapshots_uri=str(running.folder.snapshots))
        with Client(running.url) as client:
            client.put_dataset("ads", SPEC.model_dump(mode="json"))
            publish_snapshot(client, settings, "ads", folder / "s1", activate=True)
        yield running


def train(augment: Callable[[pa.Table], pa.Table], posted: list[int], enough: threading.Event, *, seed: int) -> int:
    """Augment shuffled rows of what was acknowledged so far, again and again; give how often."""
    random = np.random.default_rng(seed)
    for number in itertools.count(1):
        numbers = random.integers(0, posted[0], ROWS)
        numbers[random.integers(0, ROWS, 20)] = GHOST
        Answers(numbers, augment(table(numbers))).check()
        if number >= ROUNDS and enough.is_set():
            return number
    return 0


def over_http(service: RunningService) -> Callable[[pa.Table], pa.Table]:
    def augment(rows: pa.Table) -> pa.Table:
        with Client(service.url) as client:
            return client.augment("ads", rows, fms=["teacher"])

    return augment


def by_reference(
    service: RunningService, folder: Path, augmenter: ProcessPoolExecutor
) -> Callable[[pa.Table], pa.Table]:
    def augment(rows: pa.Table) -> pa.Table:
        pq.write_table(rows, folder / "in.parquet", row_group_size=max(2_000, rows.num_rows // 20))
        augmenter.submit(augment_files, service.url, service.folder.root, folder).result()
        return pq.read_table(folder / "out.parquet")

    return augment


def augment_files(url: str, root: Path, folder: Path) -> None:
    with Client(url) as client:
        client.augment_files(
            "ads", folder / "in.parquet", folder / "out.parquet", fms=["teacher"], folder=root, overwrite=True
        )


def peak_of_children() -> int:
    """Give the largest resident memory that a process had which the calling one started, in bytes."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def peak_of_api(service: RunningService) -> int:
    status = Path(f"/proc/{service.pid_of('api')}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def num_compactions(service: RunningService) -> int:
    """Give how many commits of the supervision table put files in the place of others."""
    commits = (service.folder.tables / "ads/supervision/teacher/_delta_log").glob("*.json")
    return sum(any("remove" in json.loads(line) for line in path.read_text().splitlines()) for path in commits)


def post_until(client: Client, posted: list[int], is_over: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_over():
        assert time.monotonic() < deadline
        rows = table(np.arange(posted[0], posted[0] + CHUNK))
        assert client.ingest("ads", rows, wait="scored", timeout_seconds=30).accepted == CHUNK
        posted[0] += CHUNK


def wait_until_committed(client: Client, num_rows: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        state = client.status()["datasets"]["ads"]
        done = state["fms"]["teacher"]["scored"] + state["fms"]["teacher"]["failed"]
        if (state["in_log"], done) == (0, num_rows):
            return
        assert time.monotonic() < deadline, state
        time.sleep(0.2)


@pytest.fixture
def augmenter() -> Iterator[ProcessPoolExecutor]:
    """A process whose only children are `das augment`: their peak is what the kernel says of its children."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def test_both_get_the_right_answers_at_every_moment_within_their_memory(
    service: RunningService, tmp_path: Path, augmenter: ProcessPoolExecutor
) -> None:
    posted, enough = [0], threading.Event()
    ways = [over_http(service), by_reference(service, tmp_path, augmenter)]
    with Client(service.url) as client, ThreadPoolExecutor(2) as pool:
        post_until(client, posted, lambda: posted[0] > 0)
        trainers = [pool.submit(train, way, posted, enough, seed=seed) for seed, way in enumerate(ways)]
        try:
            post_until(client, posted, lambda: num_compactions(service) > 0)
            enough.set()
            post_until(client, posted, lambda: all(trainer.done() for trainer in trainers))
        finally:
            enough.set()
        assert [trainer.result() >= ROUNDS for trainer in trainers] == [True, True]
        wait_until_committed(client, posted[0])

    random = np.random.default_rng(9)
    repeats = random.integers(0, posted[0], MANY_ROWS - posted[0])
    everything = np.append(random.permutation(np.append(np.arange(posted[0]), repeats)), [GHOST, 5, 5])
    for way in ways:
        Answers(everything, way(table(everything))).check(is_settled=True)
    assert peak_of_api(service) < REST_BYTES + DUCKDB_BYTES + 2 * WINDOW_BYTES
    join_bytes = DUCKDB_BYTES * 3 // 2 + 2 * WINDOW_BYTES
    assert augmenter.submit(peak_of_children).result() < REST_BYTES + join_bytes + WRITER_BYTES
