"""Switching snapshots under load: `python -m loadtest.switch`; the last line on stdout is JSON.

Examples are posted at a steady rate while s2 takes over from s1, is rolled back from, and is the shadow for a while.
What is reported comes from the tables and the worker's own metrics: lost and doubled rows, the longest gap between two
publishes near the switches and at other times, and how long a batch takes from the log to its publish.
"""

import argparse
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from das_service.client import Client
from das_service.settings import load_settings
from das_service.snapshot_publish import publish_snapshot
from das_service.up.supervisor import RunningService, running_service
from loadtest.fms import export
from loadtest.lines import say
from loadtest.workload import CHUNK_ROWS, DATASET, DECLARATION, bodies
from schemas.wire import ARROW_STREAM

FM = "free"
_SETTLE_SECONDS = 3.0
_MOST_SECONDS = 300.0
_STAGES = ("read", "prepare", "forward", "publish")


def publish_times(rows: pa.Table) -> NDArray[np.float64]:
    """Give when something was published, in seconds, ascending; rows need available_at: a publish has one."""
    times = pc.unique(rows["available_at"].combine_chunks()).cast(pa.int64()).to_numpy()
    return np.sort(times) / 1e6


def longest_gap_seconds(rows: pa.Table) -> float:
    """Give the longest time between two publishes of these rows, 0 where there are fewer."""
    return float(np.diff(publish_times(rows)).max(initial=0.0))


class Poster:
    """Posts chunks at a rate from two connections until it is stopped, and counts what was accepted."""

    def __init__(self, url: str, *, rows_per_s: float, seconds: float) -> None:
        self._place = urlsplit(url)
        self._pause = CHUNK_ROWS / rows_per_s
        self._made = bodies(0, int(rows_per_s * seconds / CHUNK_ROWS))
        self._lock = threading.Lock()
        self._next = 0
        self._started_at = time.perf_counter()
        self.accepted = 0
        self.seconds = 0.0
        self.refused: list[str] = []
        self._threads = [threading.Thread(target=self._post) for _ in range(2)]

    def start(self) -> None:
        """Begin to post."""
        self._started_at = time.perf_counter()
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Wait until everything is posted."""
        for thread in self._threads:
            thread.join()

    def _post(self) -> None:
        connection = HTTPConnection(self._place.hostname or "", self._place.port, timeout=60)
        with contextlib.closing(connection):
            while (number := self._take()) is not None:
                due = self._started_at + number * self._pause
                time.sleep(max(0.0, due - time.perf_counter()))
                headers = {"Content-Type": ARROW_STREAM}
                connection.request("POST", f"/v1/datasets/{DATASET}/examples", self._made[number], headers)
                answer = connection.getresponse()
                body = answer.read()
                with self._lock:
                    self.seconds = time.perf_counter() - self._started_at
                    if answer.status == 202:
                        self.accepted += json.loads(body)["accepted"]
                    else:
                        self.refused.append(f"{answer.status}: {body[:200]!r}")

    def _take(self) -> int | None:
        with self._lock:
            if self._next == len(self._made):
                return None
            self._next += 1
            return self._next - 1


def measure(service: RunningService, folder: Path, *, fm: str, rows_per_s: float, seconds: float) -> dict[str, Any]:
    """Switch snapshots under load, and give the record."""
    _publish(service, folder, fm)
    poster = Poster(service.url, rows_per_s=rows_per_s, seconds=seconds)
    marks: list[tuple[str, float]] = []
    poster.start()
    with Client(service.url) as client:
        steps: list[tuple[str, Callable[[], object]]] = [
            ("activate s2", lambda: client.activate_snapshot(DATASET, FM, "s2")),
            ("roll back to s1", lambda: client.roll_back_snapshot(DATASET, FM)),
            ("s2 in the shadow of 10 %", lambda: client.shadow_snapshot(DATASET, FM, "s2", share=0.1)),
            ("end of the shadow", lambda: client.end_shadow(DATASET, FM)),
        ]
        for name, step in steps:
            time.sleep(seconds / (len(steps) + 1))
            marks.append((name, time.time()))
            step()
        poster.finish()
        _wait_until_scored(client, poster.accepted)
        status = client.status()["datasets"][DATASET]["fms"][FM]
    return _record(service, poster, marks, status)


def _publish(service: RunningService, folder: Path, fm: str) -> None:
    settings = load_settings({}, snapshots_uri=str(service.folder.snapshots))
    with Client(service.url) as client:
        client.put_dataset(DATASET, DECLARATION)
        client.put_fm(DATASET, FM, required=True)
        for name in ("s1", "s2"):
            export(fm, folder / name, name=FM, snapshot_id=name)
            publish_snapshot(client, settings, DATASET, folder / name, activate=name == "s1")


def _wait_until_scored(client: Client, num_rows: int) -> None:
    """Wait until the table has an outcome of every accepted row.

    Raises:
        TimeoutError: It does not get there.
    """
    deadline = time.monotonic() + _MOST_SECONDS
    while (scored := client.status()["datasets"][DATASET]["fms"][FM]["scored"]) < num_rows:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{scored} of {num_rows} rows are scored")
        time.sleep(0.5)


def _record(
    service: RunningService, poster: Poster, marks: list[tuple[str, float]], status: dict[str, Any]
) -> dict[str, Any]:
    table = DeltaTable(str(service.folder.tables / DATASET / "supervision" / FM))
    rows = pa.table(table.to_pyarrow_table(columns=["example_id", "snapshot_id", "available_at", "_is_shadow"]))
    is_shadow = pc.fill_null(rows["_is_shadow"], False)  # noqa: FBT003 - what null is
    outcomes = rows.filter(pc.invert(is_shadow))
    distinct = pc.count_distinct(outcomes["example_id"]).as_py()
    times = publish_times(outcomes)
    by_snapshot = pc.value_counts(outcomes["snapshot_id"].combine_chunks()).to_pylist()
    return {
        "accepted": poster.accepted,
        "accepted_per_s": round(poster.accepted / poster.seconds),
        "refused": poster.refused[:5],
        "lost": poster.accepted - distinct,
        "doubled": outcomes.num_rows - distinct,
        "rows_by_snapshot": {item["values"]: item["counts"] for item in by_snapshot},
        "shadow_rows": rows.num_rows - outcomes.num_rows,
        "status": {name: status[name] for name in ("scored", "failed", "pending")},
        "longest_gap_seconds": {name: _gap_near(times, at) for name, at in marks},
        "longest_gap_otherwise_seconds": _gap_elsewhere(times, [at for _, at in marks]),
        "batch_seconds": _batch_seconds(service),
    }


def _gaps(times: NDArray[np.float64]) -> Iterator[tuple[float, float]]:
    """Give (when it began, seconds) of every gap between two publishes."""
    return zip(times[:-1].tolist(), np.diff(times).tolist(), strict=True)


def _gap_near(times: NDArray[np.float64], at: float) -> float:
    """Give the longest gap that touches the seconds after a step."""
    near = (gap for begin, gap in _gaps(times) if begin + gap >= at and begin <= at + _SETTLE_SECONDS)
    return round(max(near, default=0.0), 4)


def _gap_elsewhere(times: NDArray[np.float64], marks: list[float]) -> float:
    """Give the longest gap that touches none of these, from the time on at which the stream is in flow."""
    flowing = times[times > times[0] + _SETTLE_SECONDS]
    others = (
        gap
        for begin, gap in _gaps(flowing)
        if not any(begin + gap >= at and begin <= at + _SETTLE_SECONDS for at in marks)
    )
    return round(max(others, default=0.0), 4)


def _batch_seconds(service: RunningService) -> dict[str, float]:
    """Give the mean seconds of a batch's stages and their sum, and the 99th percentile's bucket of each, summed."""
    samples = [
        sample
        for url in _worker_urls(service)
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=10).text)
        for sample in family.samples
        if sample.name.startswith("das_stage_seconds") and sample.labels.get("role") == "worker"
    ]
    found: dict[str, float] = {}
    slow = 0.0
    for stage in _STAGES:
        mine = [sample for sample in samples if sample.labels["stage"] == stage]
        count = sum(sample.value for sample in mine if sample.name.endswith("_count"))
        total = sum(sample.value for sample in mine if sample.name.endswith("_sum"))
        found[stage] = round(total / max(count, 1), 4)
        buckets = [(float(s.labels["le"]), s.value) for s in mine if s.name.endswith("_bucket")]
        slow += min((bound for bound, reached in buckets if reached >= 0.99 * count), default=0.0)
    return {**found, "mean": round(sum(found.values()), 4), "p99_at_most": round(slow, 4)}


def _worker_urls(service: RunningService) -> list[str]:
    with Client(service.url) as client:
        return [str(role["probe_url"]) for role in client.status()["roles"] if role["role"] == "worker"]


def main() -> None:
    """Measure on a service of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows-per-s", type=float, default=25_000)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--fm", choices=("free", "compute_bound"), default="free")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="das-switch-") as name:
        folder = Path(name)
        with running_service(folder=folder / "service") as service:
            say(f"posting {given.rows_per_s:.0f} examples/s for {given.seconds:.0f} s")
            record = measure(service, folder, fm=given.fm, rows_per_s=given.rows_per_s, seconds=given.seconds)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
