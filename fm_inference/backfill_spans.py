"""Which snapshot a backfill scores a stored example with: the newest usable one that has not seen its label.

A snapshot is usable if it was validated and is not the shadow now; retired ones are. The newest is the one trained
through the latest time, of two alike the one registered later. It may score an example if trained_through <=
event_time; so each snapshot has a span of event times, from its trained_through to that of the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from das_service.errors import ConflictError
from das_service.registry import Catalog, SnapshotRecord
from fm_inference.publishing import microseconds

_USABLE = frozenset({"validated", "active", "retired"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Event times first_us <= t < end_us, and the snapshot that scores them, None if none is old enough."""

    first_us: int
    end_us: int
    snapshot: SnapshotRecord | None


def spans_between(snapshots: Sequence[SnapshotRecord], first_us: int, end_us: int) -> list[Span]:
    """Give the spans that [first_us, end_us) falls into, the earliest first; empty ones are left out.

    snapshots: usable ones with a trained_through, in the order of registration.
    """
    newest = {microseconds(each.trained_through): each for each in snapshots if each.trained_through is not None}
    starts = sorted(newest)
    before = Span(first_us=first_us, end_us=min([end_us, *starts[:1]]), snapshot=None)
    ends = [*starts[1:], end_us]
    found = [
        Span(first_us=max(first_us, start), end_us=min(end_us, end), snapshot=newest[start])
        for start, end in zip(starts, ends, strict=True)
    ]
    return [span for span in (before, *found) if span.first_us < span.end_us]


def usable_snapshots(catalog: Catalog, dataset: str, fm: str) -> list[SnapshotRecord]:
    """Give an FM's usable snapshots in the order of their registration.

    Raises:
        UnknownNameError: The dataset or the FM is not declared.
        ConflictError: There is none.
    """
    ids = catalog.fm(dataset, fm).snapshots
    validated = [snapshot_id for snapshot_id in ids if catalog.snapshots[dataset][fm][snapshot_id].state == "validated"]
    found = [catalog.snapshot(dataset, fm, snapshot_id) for snapshot_id in validated]
    usable = [each for each in found if each.state in _USABLE and each.trained_through is not None]
    if not usable:
        raise ConflictError(
            f"FM {fm!r} of dataset {dataset!r} has no snapshot to score with: none was validated, or it is the shadow",
            code="no_snapshot",
        )
    return usable
