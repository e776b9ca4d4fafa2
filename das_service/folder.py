"""Small files beside the tables, on a folder or an object store: written durably, read whole."""

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from pyarrow import fs

from das_service.errors import UnavailableError

LOCK_WAIT_SECONDS = 30.0
_LOCK_POLL_SECONDS = 0.01


def local_path(uri: str) -> Path | None:
    """Give the path that a uri names on this machine, None for an object store.

    Raises:
        ValueError: The scheme is not one that we know.
    """
    parts = urlsplit(uri)
    if parts.scheme == "":
        return Path(uri).expanduser().absolute()
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    if parts.scheme in {"s3", "s3a"}:
        return None
    raise ValueError(f"{uri!r} is not a path, file:// or s3://")


def fsync_path(path: Path) -> None:
    """Wait until a file or a directory is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path) -> None:
    """Make a directory and its parents, durably."""
    missing = []
    current = path
    while not current.exists():
        missing.append(current)
        current = current.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        fsync_path(directory.parent)


@contextlib.contextmanager
def locked(path: Path, *, wait_seconds: float = LOCK_WAIT_SECONDS) -> Iterator[None]:
    """Hold a lock that all processes of this machine respect, on a file that stays.

    Raises:
        UnavailableError: Somebody else, who was stopped or hangs, holds it for longer than wait_seconds.
    """
    make_directory(path.parent)
    with path.open("a") as handle:
        deadline = time.monotonic() + wait_seconds
        while not _has_locked(handle):
            if time.monotonic() > deadline:
                raise UnavailableError(f"another process has held {path} for {wait_seconds:g} s: end it if it hangs")
            time.sleep(_LOCK_POLL_SECONDS)
        yield


def _has_locked(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file so that after any crash it holds the old or the new bytes, whole."""
    make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


@dataclass(frozen=True, slots=True)
class Folder:
    """A root uri under which relative names are read and written."""

    uri: str
    storage_options: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path | None:
        """The root on this machine, None on an object store."""
        return local_path(self.uri)

    def uri_of(self, name: str) -> str:
        """Give the full path or uri of a relative name."""
        root = self.path
        return f"{self.uri.rstrip('/')}/{name}" if root is None else str(root / name)

    def read(self, name: str) -> bytes | None:
        """Give a file's bytes, None if there is no such file."""
        root = self.path
        try:
            if root is not None:
                return (root / name).read_bytes()
            filesystem, base = self.remote()
            with filesystem.open_input_stream(f"{base}/{name}") as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file durably; on an object store a PUT is durable by itself."""
        root = self.path
        if root is not None:
            write_durably(root / name, data)
            return
        filesystem, base = self.remote()
        with filesystem.open_output_stream(f"{base}/{name}") as stream:
            stream.write(data)

    def locked(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Hold a lock beside a file, which all processes of this machine respect; an object store has no locks."""
        root = self.path
        return contextlib.nullcontext() if root is None else locked((root / name).with_suffix(".lock"))

    def remote(self) -> tuple[fs.FileSystem, str]:
        """Give the object store and the root within it."""
        options = {key.lower().removeprefix("aws_"): value for key, value in self.storage_options.items()}
        parts = urlsplit(self.uri)
        endpoint = options.get("endpoint_url") or options.get("endpoint")
        filesystem = fs.S3FileSystem(
            access_key=options.get("access_key_id"),
            secret_key=options.get("secret_access_key"),
            session_token=options.get("session_token"),
            region=options.get("region"),
            endpoint_override=urlsplit(endpoint).netloc if endpoint else None,
            scheme=urlsplit(endpoint).scheme if endpoint else "https",
        )
        return filesystem, f"{parts.netloc}{parts.path}".rstrip("/")


def free_bytes(path: Path) -> int:
    """Give the free bytes of the disk that a path, or its nearest existing parent, lies on."""
    current = path
    while not current.exists() and current != current.parent:
        current = current.parent
    stat = os.statvfs(current)
    return stat.f_bavail * stat.f_frsize
