"""The process's one DuckDB: a memory limit, a spill bound and few threads, shared by whoever holds a permit.

A limit per request times N requests is no limit, so there is one instance per process and its users queue for it.
DuckDB's cache of Parquet footers stays off: it gave nothing back, 70 kB for each file ever read, and saved 10 ms of 60
files.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb
import pyarrow.dataset as pads

from das_service.errors import DiskReserveError, OverloadedError, UnavailableError
from das_service.scratch_folder import ScratchFolder

JOIN_MEMORY = "join_memory"
_DISK_FULL = "No space left on device"

_HIVE = "union_by_name = true, hive_partitioning = false"


class Duck:
    """Owns one in-memory DuckDB instance.

    threads: each takes about 32 MiB of the memory to spill with: what two do in 64 MiB fails with four.
    joins_as_written: the hash table is built of what stands right of JOIN. By itself DuckDB guesses which side is the
    smaller, and a window of a large Parquet file it takes for a fifth of the file.
    """

    def __init__(
        self,
        *,
        memory_bytes: int,
        threads: int = 2,
        concurrency: int = 1,
        spill_bytes: int | None = None,
        joins_as_written: bool = False,
    ) -> None:
        self._spill = ScratchFolder("das-duckdb-")
        self._permits = threading.BoundedSemaphore(concurrency)
        self._connection = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": f"{memory_bytes}B",
                "threads": threads,
                "temp_directory": str(self._spill.path),
                "max_temp_directory_size": f"{4 * memory_bytes if spill_bytes is None else spill_bytes}B",
                "preserve_insertion_order": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            },
        )
        self._connection.execute("SET TimeZone = 'UTC'")
        if joins_as_written:
            self._connection.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")

    @contextmanager
    def cursor(self, *, timeout_seconds: float = 60.0) -> Iterator[duckdb.DuckDBPyConnection]:
        """Give a connection of the instance once a permit is free; what it registers is seen by it alone.

        Raises:
            OverloadedError: No permit became free within timeout_seconds.
        """
        if not self._permits.acquire(timeout=timeout_seconds):
            raise OverloadedError("too many queries wait for DuckDB", code="queries")
        try:
            cursor = self._connection.cursor()
            try:
                yield cursor
            finally:
                cursor.close()
        finally:
            self._permits.release()

    @contextmanager
    def room_for(self, what: str) -> Iterator[None]:
        """Say it where queries find too little memory, or a spill disk that is full or broken; others' errors pass.

        what: who needs the room, "the join".

        Raises:
            UnavailableError: join_memory: the memory and the spill that it may have are used up.
            DiskReserveError: The spill folder can't be written.
        """
        try:
            yield
        except (duckdb.Error, OSError) as error:  # pyarrow's reader turns DuckDB's errors into OSError
            if isinstance(error, duckdb.OutOfMemoryException) or "Out of Memory Error" in str(error):
                raise UnavailableError(
                    f"{what} needs more memory or spill disk than it may have (DAS_DUCKDB_MEMORY_BYTES)",
                    code=JOIN_MEMORY,
                ) from error
            if str(self._spill.path) in str(error) or _DISK_FULL in str(error):
                line = str(error).split("\n", 1)[0][:300]
                raise DiskReserveError(f"{what} finds no room to spill into: {line}") from error
            raise

    def close(self) -> None:
        """Free the memory and the spill folder."""
        self._connection.close()
        self._spill.close()


def quoted_path(path: str) -> str:
    """Give a path as SQL has it, with what DuckDB would take for a pattern made plain."""
    plain = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)
    return "'" + plain.replace("'", "''") + "'"


def source_of(cursor: duckdb.DuckDBPyConnection, name: str, rows: list[str] | pads.Dataset) -> str | None:
    """Give what SQL reads a table's files by, None where there are none; name: of what is registered for it."""
    if isinstance(rows, pads.Dataset):
        cursor.register(f"{name}_files", rows)
        return f"{name}_files"
    return f"read_parquet([{', '.join(map(quoted_path, rows))}], {_HIVE})" if rows else None
