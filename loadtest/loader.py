"""The loader: closed rows from the service to tensors in the trainer's process, batch after batch, nothing trained.

The floor is the same rows, already joined, read from one Parquet file with pyarrow into the same tensors by the same
code, in a process that does nothing else. Service and trainer share the machine's cores. Beside it: the same from the
tables, without a service (`TableSource`). Peaks are those of the trainer's process and of the API.
`python -m loadtest.loader` prints the line; `--num-rows` shows that memory does not grow with the rows.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import redis

from das_service.client import Client, TableSource
from das_service.folder import Folder
from das_service.up.supervisor import RunningService, running_service
from loadtest.closed_table import write_closed
from loadtest.join import DATASET, FM
from loadtest.lines import Round, peak_mb, say, to_line
from loadtest.supervision_table import declare

Record = dict[str, Any]
Source = Client | TableSource
BATCH_ROWS = 8_192
BUCKETS = 100_000
_ROW_GROUP_ROWS = 131_072
_SECONDS = 600.0


def measure(folder: Path, *, num_rows: int, rounds: int) -> Record:
    """Give the line. The first round of all only warms up."""
    joined = folder / "joined.parquet"
    with (
        running_service(folder=folder / "service", roles=("api",)) as service,
        Reader(_load, Client(service.url)) as loader,  # all three load torch while the tables are written
        Reader(_read_parquet, joined) as floor,
        Reader(_load, TableSource(service.folder.root)) as beside,
    ):
        tables = Folder(str(service.folder.tables))
        with redis.Redis.from_url(service.redis_url, protocol=2) as server:
            declare(server, tables)
        write_closed(tables, num_rows=num_rows)
        _write_joined(service, joined)
        measured = [_round(loader, floor, num_rows) for _ in range(rounds + 1)][1:]
        peaks = {"peak_mb": loader.peak_mb, "api_peak_mb": peak_mb(service.pid_of("api"))}
        from_tables = round(num_rows / beside.read(num_rows))
    return to_line(measured, rows=num_rows, batch_rows=BATCH_ROWS, from_tables_rows_per_s=from_tables, **peaks)


def _write_joined(service: RunningService, path: Path) -> None:
    with Client(service.url) as client:
        reader = client.batches(DATASET, fms=FM, embedding_format="encoded", batch_rows=65_536)
        with pq.ParquetWriter(path, reader.schema()) as writer:
            held: list[pa.RecordBatch] = []
            for batch in reader:
                held.append(batch.rows)
                if sum(rows.num_rows for rows in held) >= _ROW_GROUP_ROWS:
                    writer.write_table(pa.Table.from_batches(held))
                    held = []
            if held:
                writer.write_table(pa.Table.from_batches(held))


def _round(loader: "Reader", floor: "Reader", num_rows: int) -> Round:
    seconds, floor_seconds = loader.read(num_rows), floor.read(num_rows)
    say(f"      {num_rows / seconds:,.0f} rows/s, floor {num_rows / floor_seconds:,.0f}")
    return Round(num_rows, seconds, floor_seconds)


class Reader:
    """A process that reads all rows into tensors whenever it is asked."""

    def __init__(self, read: Callable[[Any], int], source: Source | Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, read, source), daemon=True)
        self._process.start()
        self.peak_mb = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def read(self, num_rows: int) -> float:
        """Give the seconds that it took.

        Raises:
            RuntimeError: It took too long, failed, or found another number of rows.
        """
        self._pipe.send(None)
        try:
            if not self._pipe.poll(_SECONDS):
                raise RuntimeError("the rows took too long")
            seconds, found, self.peak_mb = self._pipe.recv()
        except EOFError:
            raise RuntimeError("the reading process ended; it has said why") from None
        if found != num_rows:
            raise RuntimeError(f"{found} of {num_rows} rows came")
        return float(seconds)


def _serve(pipe: Connection, read: Callable[[Any], int], source: Source | Path) -> None:
    import torch  # noqa: PLC0415 - which only the reading processes need

    import vm_training  # noqa: F401, PLC0415 - as above; before anything is timed

    torch.set_num_threads(1)  # OpenMP's would wait by spinning for the next embedding, in the way of all others
    while True:
        pipe.recv()
        start = time.perf_counter()
        found = read(source)
        seconds = time.perf_counter() - start
        pipe.send((seconds, found, peak_mb()))


def _load(source: Source) -> int:
    from vm_training import AugmentedDataset  # noqa: PLC0415 - torch, which only the reading processes need

    dataset = AugmentedDataset(source, DATASET, fms=[FM], batch_rows=BATCH_ROWS, buckets=BUCKETS)
    return sum(_used(batch) for batch in dataset)


def _read_parquet(path: Path) -> int:
    from vm_training.layout import read_layout  # noqa: PLC0415 - as above
    from vm_training.tensors import build_batch  # noqa: PLC0415

    with pq.ParquetFile(path) as file:
        batches = file.iter_batches(BATCH_ROWS)
        layout = read_layout(file.schema_arrow)
        return sum(_used(build_batch(rows, layout, buckets=BUCKETS)) for rows in batches)


def _used(batch: Any) -> int:  # noqa: ANN401 - a Batch, whose module needs torch
    """Decode the embedding, as a training step would; give how many rows there are."""
    return len(batch.fms[FM].embedding("hidden"))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; default: a new one in /tmp")
    parser.add_argument("--num-rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="das-loader-", dir=options.folder) as folder:
        print(json.dumps({"loader": measure(Path(folder), num_rows=options.num_rows, rounds=options.rounds)}))


if __name__ == "__main__":
    main()
