"""Where a worker gets snapshots from: the folder of a registered snapshot, on this machine and checked."""

import contextlib
import hashlib
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs

from das_service.folder import Folder, local_path
from das_service.registry import SnapshotRecord
from das_service.scratch_folder import ScratchFolder
from das_service.snapshot_folder import SnapshotError, check_files, read_manifest
from fm_inference.engine import TorchEngine, load_engine

_PREFIX = "das-snapshots-"
_MOST_IDLE = 4


class Repository:
    """Snapshots on this machine. An object store's are fetched once; the copies used last stay, and no more of them.

    A copy that is borrowed, or that `keep` names, stays in any case. Any thread may ask.
    """

    def __init__(self, snapshots: Folder, *, most_idle: int = _MOST_IDLE) -> None:
        self._snapshots = snapshots
        self._most_idle = most_idle
        self._lock = threading.Lock()
        self._cache: ScratchFolder | None = None
        self._copies: list[str] = []  # the one used last stands last
        self._borrowed: Counter[str] = Counter()
        self._kept: frozenset[str] = frozenset()

    @contextlib.contextmanager
    def borrowed(self, record: SnapshotRecord) -> Iterator[Path]:
        """Give the snapshot's folder on this machine; it stays there for as long as this lasts.

        Raises:
            SnapshotError: The store does not have it.
            OSError: The store can't be reached, or its copy not be written: to be tried again.
        """
        here = local_path(record.uri)
        if here is not None:
            self._refuse_missing(here)
            yield here
            return
        name = _copy_name(record)
        with self._lock:
            self._borrowed[name] += 1
        try:
            yield self._fetched(record, name)
        finally:
            with self._lock:
                self._borrowed[name] -= 1
            self._evict()

    def load(self, record: SnapshotRecord, *, device: str, bf16: bool) -> TorchEngine:
        """Give a warm engine for a validated snapshot, its bytes being those that were registered.

        Raises:
            SnapshotError: They are not, or it can't be loaded.
            OSError, MemoryError, torch.OutOfMemoryError: To be tried again.
        """
        with self.borrowed(record) as folder:
            manifest = read_manifest(folder, sha256=record.sha256.removeprefix("sha256:"))
            check_files(folder, manifest)
            return load_engine(folder, manifest, device=device, bf16=bf16)

    def keep(self, records: Collection[SnapshotRecord]) -> None:
        """Say which snapshots are at work: their copies stay whatever else is used."""
        kept = frozenset(_copy_name(record) for record in records)
        if kept != self._kept:
            self._kept = kept
            self._evict()

    def close(self) -> None:
        """Remove what was fetched."""
        if self._cache is not None:
            self._cache.close()

    def _refuse_missing(self, here: Path) -> None:
        if here.is_dir():
            return
        root = self._snapshots.path
        if root is None or not root.is_dir() or not any(root.iterdir()):
            raise FileNotFoundError(f"the snapshot store {self._snapshots.uri} is not there")
        raise SnapshotError([f"there is no snapshot folder {here}"])

    def _fetched(self, record: SnapshotRecord, name: str) -> Path:
        with self._lock:
            if self._cache is None:
                self._cache = ScratchFolder(_PREFIX)
            target = self._cache.path / name
            is_there = name in self._copies
        if not is_there:
            partial = Path(tempfile.mkdtemp(dir=target.parent))
            try:
                self._copy(record, partial)
                with self._lock:
                    if not target.exists():
                        partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        with self._lock:
            self._copies = [*(copy for copy in self._copies if copy != name), name]
        return target

    def _copy(self, record: SnapshotRecord, target: Path) -> None:
        filesystem, _ = self._snapshots.remote()
        parts = urlsplit(record.uri)
        source = f"{parts.netloc}{parts.path}"
        if filesystem.get_file_info(source).type is fs.FileType.NotFound:
            raise SnapshotError([f"there is nothing at {record.uri}"])
        fs.copy_files(source, str(target), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())

    def _evict(self) -> None:
        with self._lock:
            self._borrowed += Counter()  # forgets those that nobody has
            idle = [copy for copy in self._copies if copy not in self._kept and copy not in self._borrowed]
            gone = idle[: max(0, len(idle) - self._most_idle)]
            self._copies = [copy for copy in self._copies if copy not in gone]
            for copy in gone:
                if self._cache is not None:
                    shutil.rmtree(self._cache.path / copy, ignore_errors=True)


def _copy_name(record: SnapshotRecord) -> str:
    return hashlib.sha256(f"{record.uri} {record.sha256}".encode()).hexdigest()
