"""Changes of the registry that callers ask for, each in an order that a crash anywhere leaves repairable by a repeat.

The record comes first, then the logs and groups that it calls for; all steps do nothing the second time.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import redis

from das_service.audit import AuditAction, Note
from das_service.errors import ConflictError, InvalidRowsError, UnknownNameError
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
from das_service.snapshot_life import (
    activated,
    active_etag,
    refuse_race,
    refuse_unusable,
    retired,
    rolled_back,
    shadow_etag,
    with_shadow,
    without_shadow,
)
from schemas.dataset import DatasetSpec, grow
from schemas.snapshot import OutputColumns


class Declarations:
    """Makes the changes. `client` must refuse to connect to a server that has lost data (LogGuard).

    who: what the audit log calls whoever asks for a change of an FM or a snapshot.
    """

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

    def put_fm(self, dataset: str, fm: str, *, required: bool, who: str) -> tuple[FmRecord, bool]:
        """Declare an FM and give (its record, whether it is new). Examples from now on are pending for it."""
        spec = read_catalog(self._client).spec(dataset)
        is_new = True

        def update(stored: FmRecord | None) -> FmRecord:
            nonlocal is_new
            is_new = stored is None
            return (stored or FmRecord(fm=fm, required=required)).model_copy(update={"required": required})

        note = Note(dataset=dataset, fm=fm, who=who, what="declare")
        record = self._registry.change(fm_field(dataset, fm), FmRecord, update, note=lambda _: note)
        create_logs(
            self._client, self._tables, dataset, partitions=spec.partitions, kinds=[*DATASET_LOGS, *fm_logs(fm)]
        )
        create_groups(self._client, dataset, partitions=spec.partitions, fm=fm)
        return record, is_new

    def register_snapshot(
        self, dataset: str, fm: str, *, snapshot_id: str, uri: str, sha256: str, who: str
    ) -> SnapshotRecord:
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

        def number(stored: FmRecord | None) -> FmRecord:
            record = _declared(stored, dataset, fm)
            if snapshot_id in record.snapshots:
                return record
            return record.model_copy(update={"snapshots": (*record.snapshots, snapshot_id)})

        def update(record: SnapshotRecord | None) -> SnapshotRecord:
            _refuse_other_sha(record, sha256)
            return wanted if record is None or record.state == "rejected" else record

        self._registry.change(fm_field(dataset, fm), FmRecord, number)
        note = Note(dataset=dataset, fm=fm, who=who, what="register", snapshot_id=snapshot_id)
        return self._registry.change(
            snapshot_field(dataset, fm, snapshot_id), SnapshotRecord, update, note=lambda _: note
        )

    def activate(self, dataset: str, fm: str, snapshot_id: str, *, if_match: str | None, who: str) -> FmRecord:
        """Let a validated snapshot score from now on. Naming one that was active before withdraws the present one.

        Without if_match, only another activation that is made in the same moment is in the way.

        Raises:
            ConflictError: not_validated or retired.
            DasError: 412, the FM was changed since if_match was read, or meanwhile.
        """
        owner, snapshot = self._stored(dataset, fm, snapshot_id)
        seen = active_etag(owner)

        def update(record: FmRecord) -> FmRecord:
            is_repeat = if_match is None and record.active == snapshot_id
            if not is_repeat:
                refuse_race(record, if_match or seen, active_etag(record))
            refuse_unusable(record, snapshot)
            return activated(record, snapshot_id)

        return self._withdrawing(dataset, self._change_fm(dataset, fm, update, who=who, what="activate"))

    def roll_back(self, dataset: str, fm: str, *, if_match: str | None, who: str) -> FmRecord:
        """Let the snapshot score that was active before the present one, which can't publish any more.

        Raises:
            ConflictError: nothing_to_roll_back_to.
            DasError: 412, the FM was changed since if_match was read, or meanwhile.
        """
        seen = active_etag(read_catalog(self._client).fm(dataset, fm))

        def update(record: FmRecord) -> FmRecord:
            refuse_race(record, if_match or seen, active_etag(record))
            return rolled_back(record)

        return self._withdrawing(dataset, self._change_fm(dataset, fm, update, who=who, what="roll_back"))

    def shadow(
        self, dataset: str, fm: str, snapshot_id: str, share: float, *, if_match: str | None, who: str
    ) -> FmRecord:
        """Let a validated snapshot score a share of the examples beside the active one, in place of any other shadow.

        Raises:
            ConflictError: not_validated, retired, is_active or no_active.
            DasError: 412, the shadow was changed since if_match was read, or meanwhile.
        """
        owner, snapshot = self._stored(dataset, fm, snapshot_id)
        seen = shadow_etag(owner)

        def update(record: FmRecord) -> FmRecord:
            refuse_race(record, if_match or seen, shadow_etag(record))
            refuse_unusable(record, snapshot)
            return with_shadow(record, snapshot_id, share)

        return self._change_fm(dataset, fm, update, who=who, what="shadow")

    def end_shadow(self, dataset: str, fm: str, *, if_match: str | None, who: str) -> FmRecord:
        """Let no snapshot shadow the active one any more; nothing happens where none does.

        Raises:
            DasError: 412, the shadow was changed since if_match was read, or meanwhile.
        """
        owner = read_catalog(self._client).fm(dataset, fm)
        seen = shadow_etag(owner)

        def update(record: FmRecord) -> FmRecord:
            refuse_race(record, if_match or seen, shadow_etag(record))
            return without_shadow(record)

        return self._change_fm(dataset, fm, update, who=who, what="end_shadow", snapshot_id=owner.shadow)

    def retire(self, dataset: str, fm: str, snapshot_id: str, *, who: str) -> SnapshotRecord:
        """Let a snapshot never score again, nor publish what it has in flight; again changes nothing.

        Raises:
            ConflictError: is_active or is_shadow.
        """
        before = read_catalog(self._client).snapshot(dataset, fm, snapshot_id).state
        note = Note(
            dataset=dataset, fm=fm, who=who, what="retire", snapshot_id=snapshot_id,
            before={"state": before}, after={"state": "retired"},
        )  # fmt: skip

        def update(record: FmRecord | None) -> FmRecord:
            return retired(_declared(record, dataset, fm), snapshot_id)

        record = self._registry.change(fm_field(dataset, fm), FmRecord, update, note=lambda _: note)
        self._withdrawing(dataset, record)
        return read_catalog(self._client).snapshot(dataset, fm, snapshot_id)

    def _stored(self, dataset: str, fm: str, snapshot_id: str) -> tuple[FmRecord, SnapshotRecord]:
        """Give an FM's record and a snapshot's as it is stored: whether it is validated never changes back."""
        catalog = read_catalog(self._client)
        catalog.snapshot(dataset, fm, snapshot_id)
        return catalog.fm(dataset, fm), catalog.snapshots[dataset][fm][snapshot_id]

    def _change_fm(
        self,
        dataset: str,
        fm: str,
        update: Callable[[FmRecord], FmRecord],
        *,
        who: str,
        what: AuditAction,
        snapshot_id: str | None = None,
    ) -> FmRecord:
        """Change an FM's record. snapshot_id: what the audit log names, default the active one or the shadow."""

        def note(record: FmRecord) -> Note:
            named = record.shadow if what == "shadow" else record.active
            return Note(dataset=dataset, fm=fm, who=who, what=what, snapshot_id=snapshot_id or named)

        return self._registry.change(
            fm_field(dataset, fm), FmRecord, lambda record: update(_declared(record, dataset, fm)), note=note
        )

    def _withdrawing(self, dataset: str, record: FmRecord) -> FmRecord:
        """Let the server know the FM's generation, so that what is withdrawn publishes no more."""
        partitions = read_catalog(self._client).spec(dataset).partitions
        raise_generation(
            self._client, dataset, partitions=partitions, fm=record.fm, generation=record.generation
        )  # fmt: skip
        return record


def _declared(record: FmRecord | None, dataset: str, fm: str) -> FmRecord:
    if record is None:
        raise UnknownNameError("FM", fm, f" of dataset {dataset!r}")
    return record


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
        "shadow": record.shadow,
        "shadow_share": record.shadow_share,
        "trained_through": None if active is None else active.trained_through,
        "snapshots": list(record.snapshots),
    }
