"""End to end: from the first POST to the last row both in lookup and committed, all roles running, a nearly free FM."""

import time
from pathlib import Path
from typing import Any

import psutil

from das_service.client import Client
from das_service.folder import Folder
from das_service.logs.records import read_mark
from das_service.settings import load_settings
from das_service.snapshot_publish import publish_snapshot
from das_service.up.supervisor import RunningService
from loadtest.fms import export
from loadtest.ingest import CLIENTS, post_all
from loadtest.workload import CHUNK_ROWS, DATASET, DECLARATION, bodies, example_ids
from schemas.tables import EXAMPLES, supervision_table

FM = "free"
_LAST_ROWS = 1000
_MOST_SECONDS = 300.0


def publish_fm(service: RunningService, folder: Path) -> None:
    """Declare the dataset and the nearly free FM, and let it score."""
    export(FM, folder / "export")
    settings = load_settings({}, snapshots_uri=str(service.folder.snapshots))
    with Client(service.url) as client:
        client.put_dataset(DATASET, DECLARATION)
        client.put_fm(DATASET, FM, required=True)
        publish_snapshot(client, settings, DATASET, folder / "export", activate=True)


def measure(service: RunningService, *, num_chunks: int) -> dict[str, Any]:
    """Stream that many chunks through a service whose FM scores; give the record."""
    requests = bodies(0, num_chunks)
    num_rows = num_chunks * CHUNK_ROWS
    before = cpu_seconds(service)
    start = time.perf_counter()
    posted_seconds = post_all(service.url, requests)
    _wait_until_committed(service, num_rows)
    seconds = time.perf_counter() - start
    used = {role: now - before[role] for role, now in cpu_seconds(service).items()}
    _refuse_unless_present(service, num_rows)
    return {
        "examples_per_s": round(num_rows / seconds),
        "cpu_seconds_per_million": {role: round(s / num_rows * 1e6, 2) for role, s in used.items()},
        "posting_examples_per_s": round(num_rows / posted_seconds),
        "examples": num_rows,
        "connections": CLIENTS,
    }


def _wait_until_committed(service: RunningService, num_rows: int) -> None:
    """Wait until the durable marks of both tables count all rows; a row is in lookup before it can be committed.

    Raises:
        TimeoutError: They do not.
    """
    folder = Folder(str(service.folder.tables))
    deadline = time.monotonic() + _MOST_SECONDS
    for table in (supervision_table(FM), EXAMPLES):
        while (mark := read_mark(folder, DATASET, table)) is None or mark.rows < num_rows:
            if time.monotonic() > deadline:
                committed = 0 if mark is None else mark.rows
                raise TimeoutError(f"{table}: {committed} of {num_rows} rows are committed")
            time.sleep(0.02)


def _refuse_unless_present(service: RunningService, num_rows: int) -> None:
    """Hold the last rows against lookup.

    Raises:
        RuntimeError: One of them is not there.
    """
    with Client(service.url) as client:
        last = client.lookup(DATASET, example_ids(num_rows - _LAST_ROWS, _LAST_ROWS), fms=[FM])
    found = set(last[f"{FM}__status"].to_pylist())
    if found != {"present"}:
        raise RuntimeError(f"the last rows are {', '.join(sorted(found))} in lookup")


def cpu_seconds(service: RunningService) -> dict[str, float]:
    """Give the CPU seconds that each role has used so far, and this process, which makes the load."""
    pids = {role["role"]: role["pid"] for role in service.roles()} | {"generator": None}
    used = {}
    for role, pid in pids.items():
        times = psutil.Process(pid).cpu_times()
        used[role] = times.user + times.system
    return used
