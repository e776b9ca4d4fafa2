"""A teacher in the service: its snapshot published, what was posted scored, committed and closed."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from das_service.client import Client
from das_service.settings import load_settings
from das_service.snapshot_publish import publish_snapshot
from das_service.up.supervisor import SupervisorError
from experiments.progress import Bars
from experiments.scraping import metric_sum, scrape_workers
from experiments.streaming import Streamer
from experiments.teacher import TrainedTeacher, build_signature
from fm_inference import export_snapshot

_WAIT_SECONDS: Final = 600.0


def publish(client: Client, folder: Path, dataset: str, teacher: TrainedTeacher, *, fm: str, snapshot_id: str) -> None:
    """Export a snapshot under the folder whose `service` runs; what is posted from here on, it scores.

    Raises:
        SupervisorError: No worker took it up in time.
    """
    export = folder / "export" / fm / snapshot_id
    export.parent.mkdir(parents=True, exist_ok=True)
    signature = build_signature(fm=fm, snapshot_id=snapshot_id)
    export_snapshot(teacher.module, signature, export, trained_through=teacher.trained_through)
    settings = load_settings({}, snapshots_uri=str(folder / "service" / "snapshots"))
    publish_snapshot(client, settings, dataset, export, activate=True)
    deadline = time.monotonic() + _WAIT_SECONDS
    while not _is_at_work(client, dataset=dataset, fm=fm, snapshot=snapshot_id):
        if time.monotonic() > deadline:
            raise SupervisorError(f"snapshot {snapshot_id} of {fm} is active, and not every worker scores with it")
        time.sleep(0.1)


def _is_at_work(client: Client, **labels: str) -> bool:
    workers = scrape_workers(client)
    return bool(workers) and all(metric_sum(text, "das_worker_snapshot_info", **labels) for text in workers)


def wait_until_committed(
    client: Client, dataset: str, streamer: Streamer, scored: Mapping[str, int], bars: Bars
) -> None:
    """Wait until what was posted is in the tables, each FM has scored so many rows, and what can close has closed.

    Raises:
        SupervisorError: It takes too long.
    """
    deadline, done = time.monotonic() + _WAIT_SECONDS, 0
    settled = streamer.num_settled()
    total = streamer.posted + settled + sum(scored.values())
    with bars.bar("Waiting for the rows to reach the tables", total) as advance:
        while done < total:
            record = client.status()["datasets"][dataset]
            by_fm = {fm: min(record["fms"][fm]["scored"], rows) for fm, rows in scored.items()}
            now = record["distinct"] + min(record["closed"], settled) + sum(by_fm.values())
            advance(now - done)
            done = now
            if time.monotonic() > deadline:
                raise SupervisorError(
                    f"of {streamer.posted:,} rows {record['distinct']:,} reached the tables in time, of {settled:,} "
                    f"{record['closed']:,} closed, and scored were {by_fm} of {dict(scored)}"
                )
            time.sleep(0.2)
