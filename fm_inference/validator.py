"""Takes registered snapshots from `validating` to `validated` or `rejected`, one at a time, beside the scoring."""

import logging
from datetime import datetime

from das_service.beats import Peer
from das_service.registry import (
    Catalog,
    FmRecord,
    Registry,
    SnapshotRecord,
    fm_field,
    snapshot_field,
)
from das_service.snapshot_folder import SnapshotError, read_manifest
from fm_inference.repository import Repository
from fm_inference.validate import validate_snapshot
from schemas.snapshot import OutputColumns

log = logging.getLogger("das.worker")


class _NotMineError(Exception):
    """Another worker validates it, or somebody has already."""


def waiting_snapshots(catalog: Catalog) -> list[tuple[str, str, SnapshotRecord]]:
    """Give (dataset, fm, snapshot) of all that await validation, the oldest first."""
    waiting = [
        (dataset, fm, record)
        for dataset, fms in catalog.snapshots.items()
        for fm, records in fms.items()
        for record in records.values()
        if record.state == "validating" and fm in catalog.fms.get(dataset, {})
    ]
    return sorted(waiting, key=lambda item: item[2].registered_at)


def validate_next(
    registry: Registry,
    repository: Repository,
    catalog: Catalog,
    *,
    instance: str,
    peers: dict[str, Peer],
    device: str,
) -> bool:
    """Validate the oldest waiting snapshot that no living worker is at; give whether there was one."""
    for dataset, fm, record in waiting_snapshots(catalog):
        other = peers.get(record.validator or "")
        if record.validator not in {None, instance} and other is not None and other.alive:
            continue
        try:
            taken = _take(registry, dataset, fm, record, instance)
        except _NotMineError:
            continue
        log.info("validating snapshot %s of %s/%s", record.snapshot_id, dataset, fm)
        reasons, outputs, trained_through = _check(repository, catalog, dataset, fm, taken, device)
        if not reasons and outputs is not None:
            reasons = _fix_outputs(registry, dataset, fm, outputs)
        _settle(registry, dataset, fm, record.snapshot_id, reasons, trained_through)
        return True
    return False


def _take(registry: Registry, dataset: str, fm: str, seen: SnapshotRecord, instance: str) -> SnapshotRecord:
    def update(stored: SnapshotRecord | None) -> SnapshotRecord:
        if stored is None or stored.state != "validating" or stored.validator not in {seen.validator, instance}:
            raise _NotMineError
        return stored.model_copy(update={"validator": instance})

    return registry.change(snapshot_field(dataset, fm, seen.snapshot_id), SnapshotRecord, update)


def _check(
    repository: Repository, catalog: Catalog, dataset: str, fm: str, record: SnapshotRecord, device: str
) -> tuple[list[str], OutputColumns | None, datetime | None]:
    sha256 = record.sha256.removeprefix("sha256:")
    try:
        folder = repository.folder(record)
        reasons = validate_snapshot(
            folder,
            catalog.spec(dataset),
            fm=fm,
            snapshot_id=record.snapshot_id,
            sha256=sha256,
            fixed_outputs=catalog.fm(dataset, fm).outputs,
            device=device,
        )
        if reasons:
            return reasons, None, None
        manifest = read_manifest(folder, sha256=sha256)
    except (SnapshotError, OSError) as error:
        return (error.reasons if isinstance(error, SnapshotError) else [str(error)]), None, None
    return [], manifest.outputs.columns(), manifest.trained_through


def _fix_outputs(registry: Registry, dataset: str, fm: str, outputs: OutputColumns) -> list[str]:
    """Fix the FM's outputs at its first validated snapshot; give reasons if another one fixed others meanwhile."""

    def update(stored: FmRecord | None) -> FmRecord:
        if stored is None:
            raise _NotMineError
        return stored if stored.outputs is not None else stored.model_copy(update={"outputs": outputs})

    fixed = registry.change(fm_field(dataset, fm), FmRecord, update).outputs
    return [] if fixed == outputs else [f"the FM's outputs are fixed ({fixed}); other outputs are another FM"]


def _settle(
    registry: Registry, dataset: str, fm: str, snapshot_id: str, reasons: list[str], trained_through: datetime | None
) -> None:
    def update(stored: SnapshotRecord | None) -> SnapshotRecord:
        if stored is None:
            raise _NotMineError
        if stored.state != "validating":
            return stored
        state = "rejected" if reasons else "validated"
        change = {"state": state, "reasons": tuple(reasons), "trained_through": trained_through}
        return stored.model_copy(update=change)

    registry.change(snapshot_field(dataset, fm, snapshot_id), SnapshotRecord, update)
    if reasons:
        log.warning("snapshot %s of %s/%s is rejected: %s", snapshot_id, dataset, fm, "; ".join(reasons))
    else:
        log.info("snapshot %s of %s/%s is validated", snapshot_id, dataset, fm)
