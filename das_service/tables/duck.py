"""The process's one DuckDB: a memory limit, a spill bound and few threads, shared by whoever holds a permit.

A limit per request times N requests is no limit, so there is one instance per process and its users queue for it.
DuckDB's cache of Parquet footers stays off: it gave nothing back, 70 kB for each file ever read, and saved 10 ms of 60
files.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

from das_service.errors import OverloadedError


class Duck:
    """Owns one in-memory DuckDB instance."""

    def __init__(
        self, *, memory_bytes: int, threads: int = 2, concurrency: int = 1, spill_bytes: int | None = None
    ) -> None:
        self._spill = tempfile.TemporaryDirectory(prefix="das-duckdb-")
        self._permits = threading.BoundedSemaphore(concurrency)
        self._connection = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": f"{memory_bytes}B",
                "threads": threads,
                "temp_directory": self._spill.name,
                "max_temp_directory_size": f"{4 * memory_bytes if spill_bytes is None else spill_bytes}B",
                "preserve_insertion_order": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            },
        )
        self._connection.execute("SET TimeZone = 'UTC'")

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

    def close(self) -> None:
        """Free the memory and the spill folder."""
        self._connection.close()
        self._spill.cleanup()


def quoted_path(path: str) -> str:
    """Give a path as SQL has it, with what DuckDB would take for a pattern made plain."""
    plain = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)
    return "'" + plain.replace("'", "''") + "'"
