"""Training batches: closed rows with 39 features, labels and supervision, in ready order.

`batches` is what the server does, up to Arrow, in a process that does nothing else; `batches_http` the whole way, over
HTTP to a client's Arrow. The floor of both is the same join (closed, examples and supervision on example_id) as one
DuckDB statement to Arrow, the same columns, in no order, in a process of its own, in turn. `python -m loadtest.batches`
prints the lines; `--num-rows` shows that memory does not grow with the rows.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import duckdb
import redis

from das_service.batches.bounds import start_cursor
from das_service.batches.query import BatchQuery, all_columns
from das_service.batches.stream import BatchStream, PageBudget, Reading, page_pool
from das_service.client import Client
from das_service.folder import Folder
from das_service.freed_memory import keep_freed_memory
from das_service.registry import read_catalog
from das_service.settings import load_settings
from das_service.tables.duck import Duck
from das_service.tables.offline_store import TableReader, table_place
from das_service.up.supervisor import RunningService, running_service
from loadtest.closed_table import write_closed
from loadtest.join import DATASET, FM
from loadtest.lines import Round, peak_mb, say, to_line
from loadtest.supervision_table import declare
from loadtest.workload import SPEC
from schemas.tables import CLOSED, EXAMPLES, supervision_table

_BATCH_ROWS = 100_000
_SECONDS = 300.0


def measure(folder: Path, *, num_rows: int, rounds: int) -> dict[str, Any]:
    """Give the lines. The first round of all only warms up."""
    with running_service(folder=folder / "service", roles=("api",)) as service:
        tables = Folder(str(service.folder.tables))
        with redis.Redis.from_url(service.redis_url, protocol=2) as server:
            declare(server, tables)
        write_closed(tables, num_rows=num_rows)
        files = {name: _files(tables, name) for name in (CLOSED, EXAMPLES, supervision_table(FM))}
        with Timed(_join, files) as floor, Timed(_stream, service.redis_url, tables.uri_of("")) as stream:
            found = [_round(service, stream, floor, num_rows) for _ in range(rounds + 1)][1:]
            to_arrow = to_line([direct for direct, _ in found], rows=num_rows, peak_mb=stream.peak_mb)
        over_http = to_line([http for _, http in found], rows=num_rows, peak_mb=peak_mb(service.pid_of("api")))
        return {"batches": to_arrow, "batches_http": over_http}


def _round(service: RunningService, stream: "Timed", floor: "Timed", num_rows: int) -> tuple[Round, Round]:
    floor_seconds = floor.seconds(num_rows)
    direct = stream.seconds(num_rows)
    start = time.perf_counter()
    with Client(service.url) as client:
        found = sum(batch.rows.num_rows for batch in client.batches(DATASET, fms=FM, embedding_format="encoded"))
    over_http = time.perf_counter() - start
    if found != num_rows:
        raise RuntimeError(f"{found} rows were read over HTTP, there are {num_rows}")
    rates = [f"{num_rows / seconds:,.0f}" for seconds in (direct, over_http, floor_seconds)]
    say(f"      {rates[0]} rows/s, over HTTP {rates[1]}, floor {rates[2]}")
    return Round(num_rows, direct, floor_seconds), Round(num_rows, over_http, floor_seconds)


class Timed:
    """A process that does one thing again and again: a function that is given how to answer, and its arguments."""

    def __init__(self, target: Callable[..., None], *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self._process.start()

    def __enter__(self) -> "Timed":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def seconds(self, num_rows: int) -> float:
        """Let it do it once; give the seconds it took.

        Raises:
            RuntimeError: It took too long, or found another number of rows.
        """
        self._pipe.send(None)
        if not self._pipe.poll(_SECONDS):
            raise RuntimeError(f"it took more than {_SECONDS:g} s")
        seconds, rows = self._pipe.recv()
        if rows != num_rows:
            raise RuntimeError(f"{rows} rows came, there are {num_rows}")
        return float(seconds)

    @property
    def peak_mb(self) -> int:
        """The peak of its resident memory (Linux)."""
        return peak_mb(self._process.pid or 0)


def _files(tables: Folder, table: str) -> list[str]:
    reader = TableReader(table_place(tables, DATASET, table))
    reader.refresh()
    return reader.files_of_days()


def _stream(pipe: Connection, redis_url: str, tables_uri: str) -> None:
    """Read the batches as the API does, up to Arrow."""
    keep_freed_memory()
    settings = load_settings({}, redis_url=redis_url, tables_uri=tables_uri)
    folder = Folder(settings.tables_uri)
    with (
        closing(Duck(memory_bytes=settings.duckdb_memory_bytes, joins_as_written=True)) as duck,
        page_pool() as pool,
        redis.Redis.from_url(redis_url, protocol=2) as server,
    ):
        catalog = read_catalog(server)
        query = BatchQuery(fms=(FM,), embedding_format="encoded", columns=all_columns(catalog.spec(DATASET)))
        reading = Reading(
            duck=duck,
            pool=pool,
            folder=folder,
            catalog=lambda: catalog,
            budget=PageBudget(total_bytes=settings.batches_memory_bytes),
            count=lambda *_: None,
        )
        while True:
            pipe.recv()
            start = time.perf_counter()
            stream = BatchStream(reading, start_cursor(folder, catalog, DATASET, query, duck=duck))
            rows = sum(item[0].num_rows for item in stream.iter_marked() if item is not None)
            pipe.send((time.perf_counter() - start, rows))


def _join(pipe: Connection, files: dict[str, list[str]]) -> None:
    """Join in one statement: the floor."""
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
        print(json.dumps(measure(Path(folder), num_rows=options.num_rows, rounds=options.rounds)))


if __name__ == "__main__":
    main()
