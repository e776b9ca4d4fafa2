"""Augment: a caller's rows joined with as many rows of supervision, by reference and over HTTP.

By reference is measured at its Arrow output, in a process that joins and does nothing else, and the floor in another
(`loadtest.join`); over HTTP is `Client.augment` against a real API, from a table in memory to a table in memory,
embeddings as encoded. The three take turns; each has joined once before. Beside it: for callers whose rows are in
random order, and once with the Parquet file written (`Client.augment_files`, which starts a process; its peak is told).
`python -m loadtest.augment` prints the lines; `--num-rows 20000000` shows that memory does not grow with the rows.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq
import redis

from das_service.client import Client
from das_service.folder import Folder
from das_service.up.supervisor import RunningService, running_service
from loadtest.join import DATASET, FM
from loadtest.lines import Round, peak_mb, say, to_line
from loadtest.report import ROOT
from loadtest.supervision_table import declare, write

Record = dict[str, Any]
_JOIN_SECONDS = 300.0


class Joiner:
    """A process of `loadtest.join`."""

    def __init__(self, which: str, service: RunningService) -> None:
        variables = {"DAS_REDIS_URL": service.redis_url, "DAS_TABLES_URI": str(service.folder.tables)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loadtest.join", which],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def join(self, caller: Path) -> Record:
        """Give rows, seconds and the process's peak of memory so far.

        Raises:
            RuntimeError: The process ended, or was ended because it took too long.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process has no pipes")
        watch = threading.Timer(_JOIN_SECONDS, self._process.kill)
        watch.start()
        try:
            print(caller, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not answer:
            raise RuntimeError("the join ended without an answer")
        return dict(json.loads(answer))


def measure(folder: Path, *, num_rows: int, rounds: int) -> Record:
    """Give the lines of `augment` and `augment_http`."""
    with running_service(folder=folder / "service", roles=("api",)) as service:
        tables = Folder(str(service.folder.tables))
        with redis.Redis.from_url(service.redis_url, protocol=2) as server:
            declare(server, tables)
        start = time.perf_counter()
        files = write(tables, folder, num_rows=num_rows)
        say(f"      {num_rows:,} rows of supervision committed in {time.perf_counter() - start:.0f} s")
        with Joiner("floor", service) as floor, Joiner("das", service) as das:
            sides = [floor.join, das.join, partial(_over_http, service.url)]
            in_order = _in_turn(sides, files.in_time_order, num_rows, rounds + 1)[1:]  # the first one warms up
            random = _in_turn(sides[:2], files.in_random_order, num_rows, max(1, rounds // 2))
        written = _to_parquet(service, files.in_time_order)
        over_http = to_line(_rounds(in_order, 2), rows=num_rows, peak_mb=peak_mb(service.pid_of("api")))
    by_reference = to_line(
        _rounds(in_order, 1),
        rows=num_rows,
        peak_mb=in_order[-1][1]["peak_mb"],
        random_order={**to_line(_rounds(random, 1)), "peak_mb": random[-1][1]["peak_mb"]},
        to_parquet_rows_per_s=round(num_rows / written["seconds"]),
        to_parquet_peak_mb=written["peak_mb"],
    )
    return {"augment": by_reference, "augment_http": over_http}


def _to_parquet(service: RunningService, caller: Path) -> Record:
    """Give what `das augment` takes, to a file on the same disk, and the peak of its memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(augment_to_file, service.url, service.folder.root, caller).result()


def augment_to_file(url: str, folder: Path, caller: Path) -> Record:
    """Give what Client.augment_files says, and `peak_mb` of the process that it starts.

    For a small process that starts nothing else: the kernel keeps one peak for all children, and a child's begins with
    what its parent holds.
    """
    target = caller.with_name("augmented.parquet")
    with Client(url) as client:
        answer = client.augment_files(DATASET, caller, target, fms=[FM], folder=folder)
    target.unlink()
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {**answer, "peak_mb": round(peak_bytes / 1e6)}


def _over_http(url: str, caller: Path) -> Record:
    """Give what `Client.augment` takes from table to table."""
    table = pq.read_table(caller)
    with Client(url) as client:
        start = time.perf_counter()
        answer = client.augment(DATASET, table, fms=[FM], embedding_format="encoded")
        seconds = time.perf_counter() - start
    statuses = answer[f"{FM}__status"].unify_dictionaries().value_counts().to_pylist()
    return {"rows": sum(s["counts"] for s in statuses if s["values"] == "present"), "seconds": seconds}


def _in_turn(sides: Sequence[Callable[[Path], Record]], caller: Path, num_rows: int, rounds: int) -> list[list[Record]]:
    """Give what each side says, round by round; every other round goes in the other order.

    Raises:
        RuntimeError: Not every row came out with supervision.
    """
    found = []
    for i in range(rounds):
        places = range(len(sides))
        answers = {place: sides[place](caller) for place in (reversed(places) if i % 2 else places)}
        for answer in answers.values():
            if answer["rows"] != num_rows:
                raise RuntimeError(f"{answer['rows']} of {num_rows} rows came out")
        found.append([answers[place] for place in places])
    return found


def _rounds(found: list[list[Record]], place: int) -> list[Round]:
    """Give the rounds of the side at that place; the floor is the first one."""
    return [Round(answers[place]["rows"], answers[place]["seconds"], answers[0]["seconds"]) for answers in found]


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
