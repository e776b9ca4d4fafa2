"""Where a worker gets snapshots from: the folder of a registered snapshot, on this machine and checked."""

import hashlib
import shutil
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs

from das_service.folder import Folder, local_path
from das_service.registry import SnapshotRecord
from das_service.snapshot_folder import check_files, read_manifest
from fm_inference.engine import TorchEngine, load_engine


class Repository:
    """Local copies of snapshots; an object store's are fetched once per process."""

    def __init__(self, snapshots: Folder) -> None:
        self._snapshots = snapshots
        self._cache: Path | None = None

    def folder(self, record: SnapshotRecord) -> Path:
        """Give the snapshot's folder on this machine.

        Raises:
            FileNotFoundError: It is gone.
        """
        here = local_path(record.uri)
        if here is not None:
            if not here.is_dir():
                raise FileNotFoundError(f"the snapshot folder {here} is gone")
            return here
        if self._cache is None:
            self._cache = Path(tempfile.mkdtemp(prefix="das-snapshots-"))
        target = self._cache / hashlib.sha256(f"{record.uri} {record.sha256}".encode()).hexdigest()
        if not target.exists():
            filesystem, _ = self._snapshots.remote()
            parts = urlsplit(record.uri)
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            source = f"{parts.netloc}{parts.path}"
            fs.copy_files(
                source, str(partial), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem()
            )
            partial.rename(target)
        return target

    def load(self, record: SnapshotRecord, *, device: str, bf16: bool) -> TorchEngine:
        """Give a warm engine for a validated snapshot, its bytes being those that were registered.

        Raises:
            SnapshotError: They are not, or it can't be loaded.
            FileNotFoundError: The folder is gone.
        """
        folder = self.folder(record)
        manifest = read_manifest(folder, sha256=record.sha256.removeprefix("sha256:"))
        check_files(folder, manifest)
        return load_engine(folder, manifest, device=device, bf16=bf16)

    def close(self) -> None:
        """Remove what was fetched."""
        if self._cache is not None:
            shutil.rmtree(self._cache, ignore_errors=True)
