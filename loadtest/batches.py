"""Training batches: closed rows with 39 features, labels and supervision, over HTTP from a real API to Arrow.

The floor is the same join (closed, examples and supervision on example_id) as one DuckDB statement to Arrow, the same
columns, in no order, in a process of its own that does nothing else, in turn. `python -m loadtest.batches` prints the
line; `--num-rows` shows that memory does not grow with the rows.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import duckdb
import redis

from das_service.client import Client
from das_service.folder import Folder
from das_service.tables.offline_store import TableReader, table_place
from das_service.up.supervisor import RunningService, running_service
from loadtest.closed_table import write_closed
from loadtest.join import DATASET, FM
from loadtest.lines import Round, say, to_line
from loadtest.supervision_table import declare
from loadtest.workload import SPEC
from schemas.tables import CLOSED, EXAMPLES, supervision_table

_BATCH_ROWS = 100_000
_SECONDS = 300.0


def measure(folder: Path, *, num_rows: int, rounds: int) -> dict[str, Any]:
    """Give the line. The first round of all only warms up."""
    with running_service(folder=folder / "service", roles=("api",)) as service:
        tables = Folder(str(service.folder.tables))
        with redis.Redis.from_url(service.redis_url, protocol=2) as server:
            declare(server, tables)
        write_closed(tables, num_rows=num_rows)
        with Floor(tables) as floor:
            measured = [_round(service, floor, num_rows) for _ in range(rounds + 1)][1:]
        return to_line(measured, rows=num_rows, peak_mb=peak_mb(service))


def _round(service: RunningService, floor: "Floor", num_rows: int) -> Round:
    start = time.perf_counter()
    with Client(service.url) as client:
        found = sum(batch.rows.num_rows for batch in client.batches(DATASET, fms=FM, embedding_format="encoded"))
    seconds = time.perf_counter() - start
    floor_seconds, floor_rows = floor.join()
    if not found == floor_rows == num_rows:
        raise RuntimeError(f"{found} rows were read and {floor_rows} joined, there are {num_rows}")
    say(f"      {num_rows / seconds:,.0f} rows/s, floor {num_rows / floor_seconds:,.0f}")
    return Round(num_rows, seconds, floor_seconds)


def peak_mb(service: RunningService) -> int:
    """Give the peak of the API's resident memory (Linux)."""
    status = Path(f"/proc/{service.pid_of('api')}/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)


class Floor:
    """A process that makes the one statement's join."""

    def __init__(self, tables: Folder) -> None:
        files = {name: _files(tables, name) for name in (CLOSED, EXAMPLES, supervision_table(FM))}
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, files), daemon=True)
        self._process.start()

    def __enter__(self) -> "Floor":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def join(self) -> tuple[float, int]:
        """Give the seconds it took, and the rows.

        Raises:
            RuntimeError: It took too long.
        """
        self._pipe.send(None)
        if not self._pipe.poll(_SECONDS):
            raise RuntimeError("the floor's join took too long")
        seconds, rows = self._pipe.recv()
        return seconds, rows


def _files(tables: Folder, table: str) -> list[str]:
    reader = TableReader(table_place(tables, DATASET, table))
    reader.refresh()
    return reader.files_of_days()


def _serve(pipe: Connection, files: dict[str, list[str]]) -> None:
    features = ", ".join(f'e."{feature.name}"' for feature in SPEC.features)
    labels = ", ".join(f'c."{task.name}"' for task in SPEC.tasks)
    query = (
        f"SELECT c.example_id, c.event_time, {features}, {labels}, s.snapshot_id, s.trained_through, s.scored_at, "
        "s.click__logit, s.buy__logit, s.hidden FROM read_parquet($closed) c "
        "JOIN read_parquet($examples) e ON c.example_id = e.example_id "
        "JOIN read_parquet($supervision) s ON c.example_id = s.example_id"
    )
    values = {"closed": files[CLOSED], "examples": files[EXAMPLES], "supervision": files[supervision_table(FM)]}
    config = {"threads": os.cpu_count() or 1, "preserve_insertion_order": False}
    while True:
        pipe.recv()
        start = time.perf_counter()
        with duckdb.connect(":memory:", config=config) as connection:
            connection.execute("SET enable_progress_bar = false")
            rows = sum(b.num_rows for b in connection.sql(query, params=values).to_arrow_reader(_BATCH_ROWS))
        pipe.send((time.perf_counter() - start, rows))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; default: a new one in /tmp")
    parser.add_argument("--num-rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="das-batches-", dir=options.folder) as folder:
        print(json.dumps({"batches": measure(Path(folder), num_rows=options.num_rows, rounds=options.rounds)}))


if __name__ == "__main__":
    main()
