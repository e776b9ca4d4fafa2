"""A snapshot folder as it lies on disk: its manifest, and that its files are the ones the manifest names.

Nothing here looks inside a model: the API and the command line may call it, and they have no torch.
"""

import hashlib
import stat
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from schemas.snapshot import MANIFEST_FILE, Manifest

MANIFEST_MAX_BYTES = 1 << 20
FOLDER_MAX_BYTES = 256 << 30
_READ_BYTES = 1 << 20


class SnapshotError(Exception):
    """A snapshot that cannot be used, and every reason why, as sentences for the team that made it."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


def manifest_sha256(folder: Path) -> str:
    """Give the hex SHA-256 of snapshot.json: what a publisher announces, and what the whole folder hangs on.

    Raises:
        SnapshotError: There is no such regular file, or it is too large.
    """
    return hashlib.sha256(_manifest_bytes(folder)).hexdigest()


def read_manifest(folder: Path, *, sha256: str | None = None) -> Manifest:
    """Give the manifest of a folder, checked against the announced hex SHA-256 when one is given.

    Raises:
        SnapshotError: The file is missing, too large, another one than announced, or says something unknown.
    """
    content = _manifest_bytes(folder)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise SnapshotError([f"{MANIFEST_FILE} is not the file that was announced (its SHA-256 differs)"])
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        raise SnapshotError([_fault_reason(fault["loc"], fault["msg"]) for fault in faults]) from None


def check_files(folder: Path, manifest: Manifest, *, max_bytes: int = FOLDER_MAX_BYTES) -> None:
    """Check that the folder holds exactly the manifest's files, each with its SHA-256, and snapshot.json.

    Raises:
        SnapshotError: A file is missing, unnamed, not a regular file, changed, or all are larger than max_bytes.
    """
    reasons: list[str] = []
    present = {entry.name: entry for entry in folder.iterdir()}
    unnamed = sorted(present.keys() - manifest.files.keys() - {MANIFEST_FILE})
    reasons += [f"{name} is in the folder and not in {MANIFEST_FILE}" for name in unnamed[:20]]
    reasons += [f"{name} is missing" for name in sorted(manifest.files.keys() - present.keys())]
    named = {name: present[name] for name in sorted(manifest.files.keys() & present.keys())}
    irregular = sorted(name for name, path in named.items() if not stat.S_ISREG(path.lstat().st_mode))
    reasons += [f"{name} is a link or a folder, not a file" for name in irregular]
    if sum(path.lstat().st_size for path in named.values()) > max_bytes:
        reasons.append(f"the files are larger than {max_bytes} bytes")
    if not reasons:
        changed = [name for name, path in named.items() if f"sha256:{file_sha256(path)}" != manifest.files[name]]
        reasons = [f"{name} is not the file that {MANIFEST_FILE} names (its SHA-256 differs)" for name in changed]
    if reasons:
        raise SnapshotError(reasons)


def file_sha256(path: Path) -> str:
    """Give the hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    for block in _iter_blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _iter_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            yield block


def _manifest_bytes(folder: Path) -> bytes:
    path = folder / MANIFEST_FILE
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        raise SnapshotError([f"there is no {MANIFEST_FILE} in {folder}"]) from None
    if not stat.S_ISREG(status.st_mode):
        raise SnapshotError([f"{MANIFEST_FILE} is a link or a folder, not a file"])
    if status.st_size > MANIFEST_MAX_BYTES:
        raise SnapshotError([f"{MANIFEST_FILE} is larger than {MANIFEST_MAX_BYTES} bytes"])
    return path.read_bytes()


def _fault_reason(place: tuple[int | str, ...], message: str) -> str:
    where = ".".join(str(part) for part in place)
    return f"{MANIFEST_FILE}: {where}: {message}" if where else f"{MANIFEST_FILE}: {message}"
