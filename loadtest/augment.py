"""Augment: a caller's rows joined with as many rows of supervision, by reference and over HTTP (`loadtest.join`).

Each join runs in a process of its own that has just started, the floor's too, in turn; the time is that of the join
alone. By reference is measured at its Arrow output; beside it with the Parquet file written (`das augment`), and for
callers whose rows are in random order. Over HTTP: `Client.augment` against a real API, from a table in memory to a
table in memory, embeddings as encoded. `python -m loadtest.augment` prints the lines; `--num-rows 20000000` shows that
memory does not grow with the rows.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import redis

from das_service.client import Client
from das_service.folder import Folder
from das_service.up.supervisor import RunningService, running_service
from loadtest.join import DATASET, FM
from loadtest.lines import Round, say, to_line
from loadtest.report import ROOT
from loadtest.supervision_table import CallerFiles, declare, write

Record = dict[str, Any]
_JOIN_SECONDS = 300.0


class Joins:
    """Runs joins on one service's tables, each in a process of its own."""

    def __init__(self, service: RunningService, num_rows: int) -> None:
        self._service = service
        self._num_rows = num_rows
        self._environment = {
            **os.environ,
            "DAS_REDIS_URL": service.redis_url,
            "DAS_TABLES_URI": str(service.folder.tables),
        }

    def floor(self, caller: Path) -> Record:
        """Give what one DuckDB statement takes."""
        return self._run("loadtest.join", "floor", str(caller))

    def by_reference(self, caller: Path) -> Record:
        """Give what the join to Arrow takes."""
        return self._run("loadtest.join", "das", str(caller))

    def to_parquet(self, caller: Path) -> Record:
        """Give what `das augment` takes, to a file on the same disk."""
        target = caller.with_name("augmented.parquet")
        with Client(self._service.url) as client:
            answer = client.augment_files(DATASET, caller, target, fms=[FM], folder=self._service.folder.root)
        target.unlink()
        return self._complete(answer)

    def over_http(self, caller: Path) -> Record:
        """Give what `Client.augment` takes from table to table."""
        table = pq.read_table(caller)
        with Client(self._service.url) as client:
            start = time.perf_counter()
            answer = client.augment(DATASET, table, fms=[FM], embedding_format="encoded")
            seconds = time.perf_counter() - start
        present = answer[f"{FM}__status"].unify_dictionaries().value_counts().to_pylist()
        rows = sum(found["counts"] for found in present if found["values"] == "present")
        return self._complete({"rows": rows, "seconds": seconds})

    def _run(self, module: str, *arguments: str) -> Record:
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment, stdout=subprocess.PIPE, timeout=_JOIN_SECONDS, check=True
        )
        return self._complete(dict(json.loads(done.stdout.splitlines()[-1])))

    def _complete(self, answer: Record) -> Record:
        """Give the answer back if every row has supervision.

        Raises:
            RuntimeError: Rows are missing.
        """
        if answer["rows"] != self._num_rows:
            raise RuntimeError(f"{answer['rows']} of {self._num_rows} rows came out")
        return answer


def measure(folder: Path, *, num_rows: int, rounds: int) -> Record:
    """Give the lines of `augment` and `augment_http`."""
    with running_service(folder=folder / "service", roles=("api",)) as service:
        with redis.Redis.from_url(service.redis_url, protocol=2) as server:
            declare(server, Folder(str(service.folder.tables)))
        start = time.perf_counter()
        files = write(Folder(str(service.folder.tables)), folder, num_rows=num_rows)
        say(f"      {num_rows:,} rows of supervision committed in {time.perf_counter() - start:.0f} s")
        lines = _by_reference(Joins(service, num_rows), files, num_rows, rounds)
        lines["augment_http"] = _over_http(service, Joins(service, num_rows), files, num_rows, max(1, rounds // 2))
    return lines


def _by_reference(joins: Joins, files: CallerFiles, num_rows: int, rounds: int) -> Record:
    line, peak_mb = _in_turn(joins.by_reference, joins.floor, files.in_time_order, num_rows, rounds)
    random, random_peak_mb = _in_turn(joins.by_reference, joins.floor, files.in_random_order, num_rows, rounds // 2)
    to_parquet = joins.to_parquet(files.in_time_order)
    more = {
        "rows": num_rows,
        "peak_mb": peak_mb,
        "random_order": {**to_line(random), "peak_mb": random_peak_mb},
        "to_parquet_rows_per_s": round(num_rows / to_parquet["seconds"]),
    }
    return {"augment": to_line(line, **more)}


def _over_http(service: RunningService, joins: Joins, files: CallerFiles, num_rows: int, rounds: int) -> Record:
    measured, _ = _in_turn(joins.over_http, joins.floor, files.in_time_order, num_rows, rounds)
    return to_line(measured, rows=num_rows, peak_mb=_peak_mb(service))


def _in_turn(
    join: Callable[[Path], Record], floor: Callable[[Path], Record], caller: Path, num_rows: int, rounds: int
) -> tuple[list[Round], int]:
    """Give the rounds, and the highest peak of memory of the joins."""
    measured, peaks = [], [0]
    for i in range(max(1, rounds)):
        if i % 2:
            found, under = join(caller), floor(caller)
        else:
            under, found = floor(caller), join(caller)
        peaks.append(found.get("peak_mb", 0))
        measured.append(Round(num_rows, found["seconds"], under["seconds"]))
    return measured, max(peaks)


def _peak_mb(service: RunningService) -> int:
    """Give the peak of the API's resident memory (Linux)."""
    status = Path(f"/proc/{service.pid_of('api')}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    return round(int(match[1]) * 1024 / 1e6) if match else 0


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rows", type=int, default=5_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a new or empty one; default: in /tmp")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="das-bench-")))
        lines = measure(folder, num_rows=options.num_rows, rounds=options.rounds)
    print(json.dumps(lines))


if __name__ == "__main__":
    main()
