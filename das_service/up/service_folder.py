"""The folder of `das up`: who owns it, and what is where in it.

lock         held by the supervisor and inherited by its children, so that nobody else starts on this folder
             while anything of a killed supervisor still runs; holds the supervisor's pid
roles.json   the processes as they are now, for `das status` when neither the API nor the server answers
valkey/      the server's append-only file
tables/      Delta tables
snapshots/   published snapshots
logs/        <role>.log, and <role>.log.1 of the former run
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOCK_WAIT_SECONDS = 30.0
FORMAT = 1


class FolderInUseError(Exception):
    """Another supervisor runs on this folder."""


@dataclass(frozen=True, slots=True)
class ServiceFolder:
    """Paths in the folder."""

    root: Path

    @property
    def server_data(self) -> Path:
        """Folder of the server's append-only file."""
        return self.root / "valkey"

    @property
    def tables(self) -> Path:
        """Folder of the tables."""
        return self.root / "tables"

    @property
    def snapshots(self) -> Path:
        """Folder of the published snapshots."""
        return self.root / "snapshots"

    def log_file(self, role: str) -> Path:
        """File of a role's output."""
        return self.root / "logs" / f"{role}.log"

    def write_roles(self, state: Mapping[str, Any]) -> None:
        """Replace roles.json; it is news, not a record, so nothing waits for the disk."""
        temporary = self.root / ".roles.json.new"
        temporary.write_text(json.dumps({"format": FORMAT, **state}, indent=1), encoding="utf-8")
        temporary.replace(self.root / "roles.json")

    def read_roles(self) -> dict[str, Any] | None:
        """Give what the supervisor last wrote, None if none ever ran here."""
        try:
            return dict(json.loads((self.root / "roles.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def has_supervisor(self) -> bool:
        """Give whether a supervisor, or what it left running, is at work on this folder now."""
        with contextlib.suppress(FileNotFoundError), (self.root / "lock").open("rb") as handle:
            return not _try_lock(handle.fileno())
        return False


@contextlib.contextmanager
def owned(folder: ServiceFolder) -> Iterator[int]:
    """Own the folder, and give the descriptor that children inherit to keep it owned.

    Children that outlive a killed supervisor for a moment are waited for.

    Raises:
        FolderInUseError: Another supervisor runs on it.
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + LOCK_WAIT_SECONDS
        while not _try_lock(descriptor):
            _refuse_owned(folder, descriptor, deadline)
            time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _refuse_owned(folder: ServiceFolder, descriptor: int, deadline: float) -> None:
    text = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
    pid = int(text) if text.isdigit() else None
    if pid is not None and _is_running(pid):
        raise FolderInUseError(
            f"`das up` runs on {folder.root} already (process {pid}): stop it first, or choose another --folder"
        )
    if time.monotonic() > deadline:
        raise FolderInUseError(
            f"processes of a former `das up` still run on {folder.root}: end them first, or choose another --folder"
        )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
