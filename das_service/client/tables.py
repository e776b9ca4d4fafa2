"""Training batches without a service: `das batches` processes read the tables, for trainers that stand beside them."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, Self, Unpack
from urllib.parse import urlencode

from das_service.client.batches import BatchReader, ReaderOptions, batch_params
from das_service.client.errors import DasClientError
from das_service.client.http import Clock, path_of
from schemas.wire import TruncatedStreamError


class TableSource:
    """Reads the tables of one service: what Client.batches gives, with the same cursors, for the same options.

    folder: of `das up`; default: where DAS_TABLES_URI (and DAS_STORAGE_OPTIONS) lead. Each reader has a process of its
    own, which joins within DAS_DUCKDB_MEMORY_BYTES and DAS_BATCHES_MEMORY_BYTES. timeout_seconds: the longest that a
    reader tries to go on when its processes are killed. It pickles, and needs no closing.
    """

    FOLLOW_SECONDS = 10.0  # how often a loader that follows looks for more; each look starts a process

    def __init__(
        self, folder: Path | str | None = None, *, timeout_seconds: float = 60.0, clock: Clock | None = None
    ) -> None:
        """Name the folder; nothing is looked at yet."""
        self._folder = None if folder is None else Path(folder).absolute()
        self._timeout_seconds = timeout_seconds
        self._clock = clock or Clock()

    def batches(self, dataset: str, **options: Unpack[ReaderOptions]) -> BatchReader:
        """Give a reader of closed rows, as Client.batches does.

        Raises (as it is read):
            DasClientError: `das batches` refuses (code `batches_refused`), with what it said.
        """
        path_of(dataset)  # refuses what can't be a name
        return BatchReader(
            partial(_process_stream, dataset, self._folder),
            batch_params(options),
            where=f"`das batches {dataset}`",
            timeout_seconds=self._timeout_seconds,
            clock=self._clock,
        )

    def clone(self, *, clock: Clock | None = None) -> "TableSource":
        """Give another source of the same tables."""
        return TableSource(self._folder, timeout_seconds=self._timeout_seconds, clock=clock or self._clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held between reads."""


@contextmanager
def _process_stream(dataset: str, folder: Path | None, params: Mapping[str, Any]) -> Iterator[IO[bytes]]:
    """Give what a `das batches` process writes.

    Raises:
        DasClientError: It refused.
        TruncatedStreamError: It was killed.
    """
    command = [sys.executable, "-m", "das_service.cli", "batches"]
    command += [] if folder is None else [f"--folder={folder}"]
    query = urlencode(dict(params), doseq=True)
    with tempfile.TemporaryFile() as said, _running([*command, "--", dataset, query], said) as process:
        if process.stdout is None:
            raise RuntimeError("the process has no pipe")
        try:
            yield process.stdout
        except TruncatedStreamError as error:
            process.stdout.close()
            if process.wait() > 0:
                said.seek(0)
                words = said.read().decode(errors="replace").strip().removeprefix("das: ")
                raise DasClientError(words or "`das batches` failed", code="batches_refused") from error
            raise


@contextmanager
def _running(command: list[str], said: IO[bytes]) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said)  # noqa: S603 - our own module
    try:
        yield process
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)  # it only reads
        if process.stdout is not None:
            process.stdout.close()
        process.wait()
