"""A large request body on disk: whole before the answer starts, gone when it is closed, or when the process dies."""

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import anyio.to_thread
import pyarrow as pa
from fastapi import Request

from das_service.door.door import iter_body
from das_service.errors import DiskReserveError, TooLargeError

BY_REFERENCE = "join it where the tables are: `das augment IN OUT`, or Client.augment_files"
_WRITE_BYTES = 4 * 1024 * 1024


class Spool:
    """A body's bytes in an unnamed file, mapped into memory: the kernel may drop and read them again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.flush()
        self.num_bytes = os.fstat(file.fileno()).st_size
        self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if self.num_bytes else b""

    @property
    def data(self) -> mmap.mmap | bytes:
        """The bytes, without a copy."""
        return self._map

    def buffer(self) -> pa.Buffer:
        """Give the bytes as an Arrow buffer; the spool must outlive it."""
        return pa.py_buffer(self._map)


@asynccontextmanager
async def spooled(
    request: Request, *, folder: Path | None, max_bytes: int, reserve_bytes: int, timeout_seconds: float
) -> AsyncIterator[Spool]:
    """Hold the request's body on disk.

    Raises:
        TooLargeError: It is longer than max_bytes.
        DiskReserveError: The disk would be left with less than reserve_bytes, or is full.
        DasError: 408 or 415, as iter_body says.
    """
    place = folder or Path(tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=place, prefix="das-spool-", buffering=0) as file:
        too_large = TooLargeError(f"the table is larger than the {max_bytes} bytes that may be sent; {BY_REFERENCE}")
        held: list[bytes] = []
        num_held = 0
        async for piece in iter_body(
            request, max_bytes=max_bytes, timeout_seconds=timeout_seconds, too_large=too_large
        ):
            held.append(piece)
            num_held += len(piece)
            if num_held >= _WRITE_BYTES:
                await anyio.to_thread.run_sync(_write, file, held, place, reserve_bytes)
                held, num_held = [], 0
        await anyio.to_thread.run_sync(_write, file, held, place, reserve_bytes)
        yield Spool(file)


def _write(file: IO[bytes], pieces: list[bytes], place: Path, reserve_bytes: int) -> None:
    data = b"".join(pieces)
    if shutil.disk_usage(place).free - len(data) < reserve_bytes:
        raise DiskReserveError(
            f"the disk of {place} has no room for the table beside its reserve of {reserve_bytes} bytes"
        )
    try:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise DiskReserveError(f"the disk of {place} is full") from error
