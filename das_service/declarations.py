"""Changes of the registry that callers ask for, each in an order that a crash anywhere leaves repairable by a repeat.

The record comes first, then the logs and groups that it calls for; all steps do nothing the second time.
"""

from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import redis
import xxhash

from das_service.errors import ConflictError, DasError, InvalidRowsError, UnknownNameError
from das_service.folder import Folder, local_path
from das_service.logs.records import DATASET_LOGS, fm_logs
from das_service.logs.streams import create_groups, create_logs, raise_generation
from das_service.registry import (
    Catalog,
    FmRecord,
    Registry,
    SnapshotRecord,
    dataset_field,
    fm_field,
    read_catalog,
    snapshot_field,
)
from das_service.snapshot_folder import SnapshotError, read_manifest
from schemas.dataset import DatasetSpec, grow
from schemas.snapshot import OutputColumns


class Declarations:
    """Makes the changes. `client` must refuse to connect to a server that has lost data (LogGuard)."""

    def __init__(self, client: redis.Redis, tables: Folder, snapshots_uri: str) -> None:
        self._client = client
        self._tables = tables
        self._snapshots_uri = snapshots_uri
        self._registry = Registry(client, tables)

    def put_dataset(self, dataset: str, wanted: DatasetSpec) -> tuple[DatasetSpec, bool]:
        """Declare a dataset and give (the declaration that holds now, whether it is new).

        Raises:
            ConflictError: dataset_conflict, with the differences that can't be declared over what is stored.
        """
        is_new = True

        def update(stored: DatasetSpec | None) -> DatasetSpec:
            nonlocal is_new
            is_new = stored is None
            if stored is None:
                return wanted
            grown, differences = grow(stored, wanted)
            if differences:
                fields = ", ".join(str(item["field"]) for item in differences[:10])
                raise ConflictError(
                    f"dataset {dataset!r} is declared differently: {fields}", code="dataset_conflict",
                    extra={"differences": differences},
                )  # fmt: skip
            return grown

        spec = self._registry.change(dataset_field(dataset), DatasetSpec, update)
        create_logs(self._client, self._tables, dataset, partitions=spec.partitions, kinds=DATASET_LOGS)
        return spec, is_new

    def put_fm(self, dataset: str, fm: str, *, required: bool) -> tuple[FmRecord, bool]:
        """Declare an FM and give (its record, whether it is new). Examples from now on are pending for it."""
        spec = read_catalog(self._client).spec(dataset)
        is_new = True

        def update(stored: FmRecord | None) -> FmRecord:
            nonlocal is_new
            is_new = stored is None
            return (stored or FmRecord(fm=fm, required=required)).model_copy(update={"required": required})

        record = self._registry.change(fm_field(dataset, fm), FmRecord, update)
        create_logs(
            self._client, self._tables, dataset, partitions=spec.partitions, kinds=[*DATASET_LOGS, *fm_logs(fm)]
        )
        create_groups(self._client, dataset, partitions=spec.partitions, fm=fm)
        return record, is_new

    def register_snapshot(self, dataset: str, fm: str, *, snapshot_id: str, uri: str, sha256: str) -> SnapshotRecord:
        """Register a snapshot for a worker to validate; again with the same sha256 changes nothing.

        A rejected snapshot that is registered again is validated again. The id gets its number in the FM's record
        before its own record exists, so that whoever sees the snapshot sees its number.

        Raises:
            ConflictError: snapshot_conflict (another sha256 under this id), or outputs_fixed.
            InvalidRowsError: bad_uri: it does not lie under DAS_SNAPSHOTS_URI.
        """
        catalog = read_catalog(self._client)
        owner = catalog.fm(dataset, fm)
        place = snapshot_place(self._snapshots_uri, uri)
        stored = catalog.snapshots.get(dataset, {}).get(fm, {}).get(snapshot_id)
        _refuse_other_sha(stored, sha256)
        _refuse_other_outputs(owner, place, sha256)
        wanted = SnapshotRecord(snapshot_id=snapshot_id, uri=place, sha256=sha256, registered_at=datetime.now(UTC))

        def number(record: FmRecord | None) -> FmRecord:
            if record is None:
                raise UnknownNameError("FM", fm, f" of dataset {dataset!r}")
            if snapshot_id in record.snapshots:
                return record
            return record.model_copy(update={"snapshots": (*record.snapshots, snapshot_id)})

        def update(record: SnapshotRecord | None) -> SnapshotRecord:
            _refuse_other_sha(record, sha256)
            return wanted if record is None or record.state == "rejected" else record

        self._registry.change(fm_field(dataset, fm), FmRecord, number)
        return self._registry.change(snapshot_field(dataset, fm, snapshot_id), SnapshotRecord, update)

    def activate(self, dataset: str, fm: str, snapshot_id: str, *, if_match: str | None) -> FmRecord:
        """Let a validated snapshot score from now on. Naming one that was active before withdraws the present one.

        Raises:
            ConflictError: not_validated.
            DasError: 412, the FM was changed since if_match was read.
        """
        catalog = read_catalog(self._client)
        spec = catalog.spec(dataset)
        snapshot = catalog.snapshot(dataset, fm, snapshot_id)
        if snapshot.state not in {"validated", "active"}:
            raise ConflictError(f"snapshot {snapshot_id!r} is {snapshot.state}, not validated", code="not_validated")

        def update(record: FmRecord | None) -> FmRecord:
            if record is None:
                raise UnknownNameError("FM", fm, f" of dataset {dataset!r}")
            if if_match is not None and not _matches(if_match, active_etag(record)):
                raise DasError(
                    f"FM {fm!r} was changed by somebody else: its active snapshot is {record.active!r}",
                    code="lost_race", http_status=412,
                )  # fmt: skip
            return activated(record, snapshot_id)

        record = self._registry.change(fm_field(dataset, fm), FmRecord, update)
        raise_generation(self._client, dataset, partitions=spec.partitions, fm=fm, generation=record.generation)
        return record


def activated(record: FmRecord, snapshot_id: str) -> FmRecord:
    """Give the record with another active snapshot; going back to a former one raises the generation."""
    if record.active == snapshot_id:
        return record
    former = record.was_active if record.active is None else (*record.was_active, record.active)
    latest_last = tuple(dict.fromkeys(former[::-1]))[::-1]
    changes: dict[str, object] = {"active": snapshot_id, "was_active": latest_last}
    if snapshot_id in former:
        changes["generation"] = record.generation + 1
    return record.model_copy(update=changes)


def active_etag(record: FmRecord) -> str:
    """Give the entity tag of "which snapshot is active": another after every change of that, and only then."""
    text = "/".join([record.fm, str(record.active), str(record.generation), *record.was_active])
    return f'"{xxhash.xxh64_hexdigest(text.encode())}"'


def _matches(if_match: str, etag: str) -> bool:
    return if_match.strip() == "*" or etag in {tag.strip() for tag in if_match.split(",")}


def _refuse_other_sha(stored: SnapshotRecord | None, sha256: str) -> None:
    if stored is not None and stored.sha256 != sha256:
        raise ConflictError(
            f"snapshot {stored.snapshot_id!r} is registered with sha256 {stored.sha256}: snapshots never change, "
            "publish this one under another id",
            code="snapshot_conflict",
        )


def _refuse_other_outputs(owner: FmRecord, place: str, sha256: str) -> None:
    """Refuse early what a worker would reject, where the manifest can be read from here."""
    folder = local_path(place)
    if owner.outputs is None or folder is None:
        return
    try:
        outputs = read_manifest(folder, sha256=sha256).outputs.columns()
    except (SnapshotError, OSError):
        return
    if outputs != owner.outputs:
        raise ConflictError(
            f"the outputs of FM {owner.fm!r} are fixed by its first snapshot: {_spell(owner.outputs)}; this snapshot "
            f"has {_spell(outputs)}. Declare another FM for it",
            code="outputs_fixed",
        )


def _spell(outputs: OutputColumns) -> str:
    vectors = [f"{name}[{size}] {codec}" for name, (size, codec) in outputs.embeddings.items()]
    return ", ".join([*outputs.tasks, *vectors])


def snapshot_place(root_uri: str, uri: str) -> str:
    """Give where a snapshot's folder lies, links resolved.

    Raises:
        InvalidRowsError: bad_uri: it does not lie under root_uri.
    """
    try:
        root, wanted = local_path(root_uri), local_path(uri)
        if root is None or wanted is None:
            return _remote_place(root_uri, uri)
        resolved, base = wanted.resolve(), root.resolve()
    except (ValueError, OSError, RuntimeError) as error:
        raise InvalidRowsError(f"the uri can't be read: {error}", code="bad_uri") from None
    if resolved == base or not resolved.is_relative_to(base):
        raise _outside(root_uri)
    return str(resolved)


def _remote_place(root_uri: str, uri: str) -> str:
    root, wanted = urlsplit(root_uri), urlsplit(uri)
    same_store = wanted.scheme == root.scheme and wanted.netloc == root.netloc and not wanted.query + wanted.fragment
    parts = Path(unquote(wanted.path)).parts
    base = Path(root.path).parts
    if not same_store or ".." in parts or len(parts) <= len(base) or parts[: len(base)] != base:
        raise _outside(root_uri)
    return uri


def _outside(root_uri: str) -> InvalidRowsError:
    return InvalidRowsError(f"a snapshot lies in a folder under DAS_SNAPSHOTS_URI ({root_uri})", code="bad_uri")


def declared_fm(catalog: Catalog, dataset: str, record: FmRecord) -> dict[str, object]:
    """Give an FM as callers see it."""
    active = None if record.active is None else catalog.snapshots.get(dataset, {}).get(record.fm, {}).get(record.active)
    return {
        "fm": record.fm,
        "required": record.required,
        "outputs": None if record.outputs is None else record.outputs.model_dump(mode="json"),
        "active": record.active,
        "was_active": list(record.was_active),
        "trained_through": None if active is None else active.trained_through,
        "snapshots": list(record.snapshots),
    }
