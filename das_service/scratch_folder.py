"""Folders for what a process needs only while it lives; a killed process's folder goes with the next that is made."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import weakref
from pathlib import Path

_LOCK = ".lock"


class ScratchFolder:
    """A folder of this process's own in `parent`, or among the temporary files; its name is the prefix and more.

    The prefix ends in "-". The folder is gone when it is closed or the process ends. After a kill -9 it stays until
    somebody makes one of the same prefix in the same place; for good on a file system that has no locks.
    """

    def __init__(self, prefix: str, *, parent: Path | None = None) -> None:
        place = parent or Path(tempfile.gettempdir())
        for former in place.glob(f"{glob.escape(prefix)}*"):
            _remove_if_abandoned(former)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        self._finalizer = weakref.finalize(self, _remove, self.path, _lock(self.path))

    def close(self) -> None:
        """Delete the folder and what is in it; more than once is harmless."""
        self._finalizer()


def _lock(folder: Path) -> int | None:
    """Give the open lock file; None, and no file, where there are no locks: nobody takes the folder for abandoned."""
    fresh = folder / f"{_LOCK}.new"
    descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        fresh.unlink()
        return None
    fresh.rename(folder / _LOCK)  # whoever finds it finds it locked
    return descriptor


def _remove(path: Path, descriptor: int | None) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if descriptor is not None:
        os.close(descriptor)
        shutil.rmtree(path, ignore_errors=True)  # NFS keeps a file that was open, and so its folder


def _remove_if_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another user's, not ready yet, or locked: it is at work
        descriptor = os.open(folder / _LOCK, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        _remove(folder, descriptor)
