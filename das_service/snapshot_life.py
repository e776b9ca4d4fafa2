"""What becomes of an FM's record when a snapshot is activated, shadowed, rolled back or retired. Policy, no I/O.

All of it is one record, which is changed by compare-and-swap: of two changes at once one is made on what the other
left, or refused. The generation grows when a snapshot is withdrawn, by roll-back or retirement: what it has in flight
then can't be published any more. An ordinary activation leaves batches in flight valid.
"""

import xxhash

from das_service.errors import ConflictError, DasError
from das_service.registry import FmRecord, SnapshotRecord


def refuse_unusable(record: FmRecord, snapshot: SnapshotRecord) -> None:
    """Raise unless a snapshot may score. snapshot: as stored.

    Raises:
        ConflictError: retired or not_validated.
    """
    if snapshot.snapshot_id in record.retired:
        raise ConflictError(
            f"snapshot {snapshot.snapshot_id!r} is retired and can't score again: publish its weights under a new id",
            code="retired",
        )
    if snapshot.state != "validated":
        said = f": {'; '.join(snapshot.reasons)}" if snapshot.reasons else ""
        raise ConflictError(
            f"snapshot {snapshot.snapshot_id!r} is {snapshot.state}, not validated{said}", code="not_validated"
        )


def activated(record: FmRecord, snapshot_id: str) -> FmRecord:
    """Give the record with another active snapshot; going back to a former one raises the generation.

    A shadow that becomes the active one is the shadow no more.
    """
    if record.active == snapshot_id:
        return record
    former = record.was_active if record.active is None else (*record.was_active, record.active)
    latest_last = tuple(dict.fromkeys(former[::-1]))[::-1]
    changes: dict[str, object] = {
        "active": snapshot_id, "was_active": latest_last, "activations": record.activations + 1,
    }  # fmt: skip
    if snapshot_id in former:
        changes["generation"] = record.generation + 1
    if record.shadow == snapshot_id:
        changes |= {"shadow": None, "shadow_share": 0.0}
    return record.model_copy(update=changes)


def rolled_back(record: FmRecord) -> FmRecord:
    """Give the record with the snapshot active that was so before the present one, and that is not retired.

    Once more goes back one further: a snapshot that was rolled back from is passed by.

    Raises:
        ConflictError: nothing_to_roll_back_to.
    """
    before = record.was_active
    if record.active in before:
        before = before[: before.index(record.active)]
    usable = [snapshot_id for snapshot_id in before if snapshot_id not in record.retired]
    if not usable:
        retired = [snapshot_id for snapshot_id in before if snapshot_id in record.retired]
        why = f"those before it are retired ({', '.join(retired)})" if retired else "none was active before it"
        raise ConflictError(
            f"FM {record.fm!r} can't be rolled back from snapshot {record.active!r}: {why}. Activate another by name",
            code="nothing_to_roll_back_to",
        )
    return activated(record, usable[-1])


def with_shadow(record: FmRecord, snapshot_id: str, share: float) -> FmRecord:
    """Give the record with a snapshot that scores a share of the examples beside the active one.

    Raises:
        ConflictError: is_active, or no_active: there is none to stand beside.
    """
    if record.active == snapshot_id:
        raise ConflictError(f"snapshot {snapshot_id!r} is the active one: it scores everything", code="is_active")
    if record.active is None:
        raise ConflictError(f"FM {record.fm!r} has no active snapshot for a shadow to stand beside", code="no_active")
    return record.model_copy(update={"shadow": snapshot_id, "shadow_share": share})


def without_shadow(record: FmRecord) -> FmRecord:
    """Give the record without a shadow."""
    return record.model_copy(update={"shadow": None, "shadow_share": 0.0})


def retired(record: FmRecord, snapshot_id: str) -> FmRecord:
    """Give the record with a snapshot that can't score any more; the second time nothing changes.

    Raises:
        ConflictError: is_active or is_shadow: it is at work.
    """
    if record.active == snapshot_id:
        raise ConflictError(f"snapshot {snapshot_id!r} is the active one: activate another first", code="is_active")
    if record.shadow == snapshot_id:
        raise ConflictError(f"snapshot {snapshot_id!r} is the shadow: end that first", code="is_shadow")
    if snapshot_id in record.retired:
        return record
    return record.model_copy(
        update={"retired": (*record.retired, snapshot_id), "generation": record.generation + 1}
    )  # fmt: skip


def active_etag(record: FmRecord) -> str:
    """Give the entity tag of "which snapshot is active": another after every change of that, and only then."""
    return _etag(record.fm, str(record.active), str(record.activations), *record.was_active)


def shadow_etag(record: FmRecord) -> str:
    """Give the entity tag of "which snapshot is the shadow, of what share"."""
    return _etag(record.fm, "shadow", str(record.shadow), repr(record.shadow_share))


def refuse_race(record: FmRecord, if_match: str, etag: str) -> None:
    """Raise if a change was decided on another state than the present one.

    Raises:
        DasError: 412, lost_race.
    """
    if if_match.strip() != "*" and etag not in {tag.strip() for tag in if_match.split(",")}:
        beside = "" if record.shadow is None else f", its shadow {record.shadow!r}"
        raise DasError(
            f"FM {record.fm!r} was changed by somebody else: its active snapshot is {record.active!r}{beside}",
            code="lost_race", http_status=412,
        )  # fmt: skip


def _etag(*parts: str) -> str:
    return f'"{xxhash.xxh64_hexdigest("/".join(parts).encode())}"'
