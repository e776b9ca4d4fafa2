"""Publishing a snapshot: its folder is copied to where workers find it, durably and whole, then registered.

The place is {DAS_SNAPSHOTS_URI}/{dataset}/{fm}/{snapshot_id}. A snapshot never changes: publishing the same folder
again goes on where it stopped, another one under the same id is refused.
"""

import hashlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from das_service.client import Client
from das_service.client.errors import NotFoundError
from das_service.folder import Folder, fsync_path, make_directory
from das_service.settings import Settings
from das_service.snapshot_folder import SnapshotError, check_files, manifest_sha256, read_manifest
from schemas.snapshot import MANIFEST_FILE, Manifest

_COPY_BYTES = 8 * 1024 * 1024


def publish_snapshot(
    client: Client,
    settings: Settings,
    dataset: str,
    folder: Path,
    *,
    activate: bool = False,
    timeout_seconds: float = 300.0,
    on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Copy a snapshot folder to where workers find it, register it, wait until a worker has found it good.

    activate: let it score from then on. An FM that is not declared yet is declared, as a required one. Gives the
    snapshot's record as it is at the end. Safe to repeat.

    Raises:
        SnapshotError: The folder is not a snapshot, or another snapshot has its id.
        SnapshotRejectedError: A worker refused it.
        DasClientError: The service refused a step, or no worker looked at it in time.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    snapshots = Folder(settings.snapshots_uri, settings.storage_options)
    fm, snapshot_id = manifest.fm, manifest.snapshot_id
    _declare_fm(client, dataset, fm, on_step)
    on_step(f"copying to {snapshots.uri_of(_place(dataset, manifest))}")
    uri = copy_snapshot(dataset, folder, manifest, snapshots)
    client.register_snapshot(dataset, fm, snapshot_id=snapshot_id, uri=uri, sha256=manifest_sha256(folder))
    on_step("registered; a worker validates it")
    record = client.wait_for_snapshot(dataset, fm, snapshot_id, timeout_seconds=timeout_seconds)
    if activate:
        client.activate_snapshot(dataset, fm, snapshot_id)
        on_step("active")
        record = client.get_snapshot(dataset, fm, snapshot_id)
    return record


def _declare_fm(client: Client, dataset: str, fm: str, on_step: Callable[[str], None]) -> None:
    """Declare an FM whose first snapshot this is; one that is declared stays as it is."""
    try:
        client.get_fm(dataset, fm)
    except NotFoundError as error:
        if error.code != "unknown_fm":
            raise
        client.put_fm(dataset, fm, required=True)
        on_step(f"FM {fm} is new and is declared, required (das fm put {dataset} {fm} --optional changes that)")


def copy_snapshot(dataset: str, folder: Path, manifest: Manifest, snapshots: Folder) -> str:
    """Copy the files that the manifest names, and give the uri of the copy; one that is there already is kept.

    Raises:
        SnapshotError: Another snapshot lies there.
    """
    place = _place(dataset, manifest)
    stored = snapshots.read(f"{place}/{MANIFEST_FILE}")
    if stored is None:
        root = snapshots.path
        if root is None:
            _upload(folder, manifest, snapshots, place)
        else:
            _copy_durably(folder, manifest, root / place)
    elif hashlib.sha256(stored).hexdigest() != manifest_sha256(folder):
        where = snapshots.uri_of(place)
        raise SnapshotError(
            [f"another snapshot {manifest.snapshot_id!r} of FM {manifest.fm!r} lies at {where}: give this a new id"]
        )
    return snapshots.uri_of(place)


def _place(dataset: str, manifest: Manifest) -> str:
    return f"{dataset}/{manifest.fm}/{manifest.snapshot_id}"


def _copy_durably(folder: Path, manifest: Manifest, target: Path) -> None:
    """Make the copy beside its place and rename it: it is there whole or not at all, after a power cut too."""
    make_directory(target.parent)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    scratch.mkdir()
    try:
        for name in (*manifest.files, MANIFEST_FILE):
            shutil.copyfile(folder / name, scratch / name)
            fsync_path(scratch / name)
        fsync_path(scratch)
        check_files(scratch, manifest)
        _rename_unless_there(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    fsync_path(target.parent)


def _rename_unless_there(scratch: Path, target: Path) -> None:
    try:
        scratch.rename(target)
    except OSError:
        theirs = target / MANIFEST_FILE  # another publisher of the same snapshot was faster
        if not theirs.exists() or theirs.read_bytes() != (scratch / MANIFEST_FILE).read_bytes():
            raise


def _upload(folder: Path, manifest: Manifest, snapshots: Folder, place: str) -> None:
    """Upload the files, the manifest last: what has one is whole."""
    store, root = snapshots.remote()
    for name in (*manifest.files, MANIFEST_FILE):
        with (folder / name).open("rb") as source, store.open_output_stream(f"{root}/{place}/{name}") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)
