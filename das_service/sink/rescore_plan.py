"""What an FM has still to be fed from the examples table, and how it lies beside the tables. Policy and files only.

Each file has one writer. The plan (`_das/rescore.<fm>.json`) is the sink's. `das recover` says in
`_das/reach.<fm>.json` which log positions a loss is about; the sink makes event days of it in its plan, once it has
committed all that survived. The plan's epoch tells up to which recovery that is done.
"""

import datetime as dt
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from das_service.folder import Folder
from das_service.logs.streams import NOT_COUNTED
from das_service.tables.offline_store import DataFile, DayFiles

_FORMAT = 1
_SLICE_ROWS = 100_000
_COUNTED_ROWS = 2_000_000
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Entries of the examples log that an FM did not get there: log positions (numbers), both inclusive."""

    partition: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LostDay:
    """An event day on which outcomes may be missing: what is neither scored nor dead-lettered is to be fed.

    It is counted and then fed, each in slices of the hash space; their number is a power of two. rows: how many are
    lost by partition, as far as it is counted, less those that were fed.
    """

    day: dt.date
    num_slices: int = 1
    next_slice: int = 0
    rows: tuple[int, ...] = ()
    is_counted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an FM has still to be fed.

    epoch: of the last recovery whose losses are in it, 0 if there was none. gap_rows: by partition how many rows the
    gaps are, repeats included, less those that were fed.
    """

    epoch: int = 0
    gaps: tuple[Gap, ...] = ()
    gap_rows: tuple[int, ...] = ()
    days: tuple[LostDay, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to feed."""
        return not self.gaps and not self.days

    def rows_by_partition(self, partitions: int) -> list[int]:
        """Give how many rows are left to feed, NOT_COUNTED in each partition while a day is not counted."""
        if not all(lost.is_counted for lost in self.days):
            return [NOT_COUNTED] * partitions
        return add_rows([0] * partitions, self.gap_rows, *[lost.rows for lost in self.days])


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What of one partition of `examples` a loss is about: log positions in [start, end), less those still to come.

    start: where the FM began; end: where the epoch after the loss begins. pending: ranges of positions, first and last
    inclusive, ascending, that the FM gets by the log that survived.
    """

    start: int
    end: int
    pending: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What an FM may have lost before an epoch began: reaches by partition."""

    epoch: int
    reaches: tuple[Reach, ...]

    @property
    def first(self) -> int:
        """The lowest log position that it is about."""
        return min(reach.start for reach in self.reaches)

    @property
    def last(self) -> int:
        """The highest log position that it may be about."""
        return max(reach.end for reach in self.reaches) - 1

    def touched(self, days: DayFiles) -> list[dt.date]:
        """Give the event days whose files may hold such positions."""
        return sorted(day for day, files in days.items() if files_between(files, self.first, self.last))


def plan_name(dataset: str, fm: str) -> str:
    """Give the name of the file that holds an FM's plan."""
    return f"{dataset}/_das/rescore.{fm}.json"


def read_plan(folder: Folder, dataset: str, fm: str) -> Plan:
    """Give what an FM has still to be fed."""
    data = folder.read(plan_name(dataset, fm))
    if data is None:
        return Plan()
    record = json.loads(data)
    return Plan(
        epoch=record["epoch"],
        gaps=tuple(Gap(**gap) for gap in record["gaps"]),
        gap_rows=tuple(record["gap_rows"]),
        days=tuple(
            LostDay(**{**lost, "day": dt.date.fromisoformat(lost["day"]), "rows": tuple(lost["rows"])})
            for lost in record["days"]
        ),
    )


def write_plan(folder: Folder, dataset: str, fm: str, plan: Plan) -> None:
    """Record durably what an FM has still to be fed."""
    record = {
        "format": _FORMAT,
        "epoch": plan.epoch,
        "gaps": [asdict(gap) for gap in merge_gaps(plan.gaps)],
        "gap_rows": plan.gap_rows,
        "days": [{**asdict(lost), "day": lost.day.isoformat()} for lost in plan.days],
    }
    folder.write(plan_name(dataset, fm), json.dumps(record).encode())


def read_loss(folder: Folder, dataset: str, fm: str) -> Loss | None:
    """Give what the last recovery says that an FM may have lost, None if there was none."""
    data = folder.read(f"{dataset}/_das/reach.{fm}.json")
    if data is None:
        return None
    record = json.loads(data)
    reaches = [
        Reach(start=reach["start"], end=reach["end"], pending=tuple((first, last) for first, last in reach["pending"]))
        for reach in record["reaches"]
    ]
    return Loss(epoch=record["epoch"], reaches=tuple(reaches))


def write_loss(folder: Folder, dataset: str, fm: str, loss: Loss) -> None:
    """Record durably what an FM may have lost."""
    record = {"format": _FORMAT, "epoch": loss.epoch, "reaches": [asdict(reach) for reach in loss.reaches]}
    folder.write(f"{dataset}/_das/reach.{fm}.json", json.dumps(record).encode())


def plan_with_loss(plan: Plan, loss: Loss, days: DayFiles) -> Plan:
    """Give the plan that looks through every event day that a loss touches, instead of those that were planned.

    Of the gaps it keeps what the loss is not about: entries that were still to come, and that the FM left since.
    """
    num_rows = {day: sum(file.num_rows for file in days[day]) for day in loss.touched(days)}
    lost = [LostDay(day=day, num_slices=_num_slices(number, _COUNTED_ROWS)) for day, number in num_rows.items()]
    gaps = [kept for gap in plan.gaps for kept in _outside(gap, loss.reaches[gap.partition])]
    kept = {gap.partition for gap in gaps}
    gap_rows = tuple(number if partition in kept else 0 for partition, number in enumerate(plan.gap_rows))
    return Plan(epoch=loss.epoch, gaps=tuple(gaps), gap_rows=gap_rows, days=tuple(lost))


def _outside(gap: Gap, reach: Reach) -> list[Gap]:
    """Give the parts of a gap that the reach is not about."""
    others = [(gap.first, reach.start - 1), *reach.pending, (reach.end, gap.last)]
    parts = [(max(gap.first, first), min(gap.last, last)) for first, last in others]
    return [replace(gap, first=first, last=last) for first, last in parts if first <= last]


def with_counted_slice(plan: Plan, rows: Sequence[int]) -> Plan:
    """Give the plan once the next slice of its first day that is not counted is, by partition so many rows.

    A day without losses leaves the plan; another is cut anew, by what is lost of it.
    """
    at = next(place for place, lost in enumerate(plan.days) if not lost.is_counted)
    lost = replace(
        plan.days[at], rows=tuple(add_rows(rows, plan.days[at].rows)), next_slice=plan.days[at].next_slice + 1
    )
    known = [lost]
    if lost.next_slice == lost.num_slices:
        num_rows = sum(lost.rows)
        counted = replace(lost, is_counted=True, num_slices=_num_slices(num_rows, _SLICE_ROWS), next_slice=0)
        known = [counted] if num_rows else []
    return replace(plan, days=(*plan.days[:at], *known, *plan.days[at + 1 :]))


def with_fed_slice(plan: Plan, rows: Sequence[int]) -> Plan:
    """Give the plan once the next slice of its first day is fed, by partition so many rows."""
    lost, *others = plan.days
    left = tuple(max(0, number) for number in add_rows(lost.rows, [-fed for fed in rows]))
    following = replace(lost, rows=left, next_slice=lost.next_slice + 1)
    is_over = following.next_slice == lost.num_slices
    return replace(plan, days=tuple(others) if is_over else (following, *others))


def with_gaps(plan: Plan, gaps: Sequence[Gap], rows: Sequence[int]) -> Plan:
    """Give the plan with more gaps, by partition of so many rows."""
    return replace(plan, gaps=(*plan.gaps, *gaps), gap_rows=tuple(add_rows(rows, plan.gap_rows)))


def with_fed_gaps(plan: Plan, last: int, rows: Sequence[int]) -> Plan:
    """Give the plan once all gaps are fed up to a position, by partition so many rows."""
    gaps = tuple(replace(gap, first=max(gap.first, last + 1)) for gap in plan.gaps if gap.last > last)
    open_partitions = {gap.partition for gap in gaps}
    left = add_rows(plan.gap_rows, [-fed for fed in rows])
    gap_rows = tuple(max(0, number) if p in open_partitions else 0 for p, number in enumerate(left))
    return replace(plan, gaps=gaps, gap_rows=gap_rows)


def add_rows(rows: Sequence[int], *others: Sequence[int]) -> list[int]:
    """Give the sums of rows by partition; a count that lacks partitions has none there."""
    return [sum(each) for each in zip_longest(rows, *others, fillvalue=0)]


def _num_slices(num_rows: int, slice_rows: int) -> int:
    """Give into how many slices so many rows are cut: a power of two, at most slice_rows each if they are even."""
    return 1 << max(0, num_rows // slice_rows).bit_length()


def merge_gaps(gaps: Sequence[Gap]) -> list[Gap]:
    """Give the same positions as gaps that neither overlap nor touch, by partition and position."""
    merged: list[Gap] = []
    for gap in sorted(gaps, key=lambda g: (g.partition, g.first)):
        before = merged[-1] if merged else None
        if before is not None and before.partition == gap.partition and gap.first <= before.last + 1:
            merged[-1] = replace(before, last=max(before.last, gap.last))
        else:
            merged.append(gap)
    return merged


def in_gaps(positions: Int64s, partitions: Int64s, gaps: Sequence[Gap]) -> NDArray[np.bool_]:
    """Give which rows lie in a gap."""
    inside = np.zeros(len(positions), bool)
    merged = merge_gaps(gaps)
    for partition in {gap.partition for gap in merged}:
        ranges = [(gap.first, gap.last) for gap in merged if gap.partition == partition]
        inside |= (partitions == partition) & _in_ranges(positions, ranges)
    return inside


def is_lost(positions: Int64s, partitions: Int64s, reaches: Sequence[Reach]) -> NDArray[np.bool_]:
    """Give which rows no log brings to the FM any more."""
    lost = np.zeros(len(positions), bool)
    for partition, reach in enumerate(reaches):
        inside = (partitions == partition) & (positions >= reach.start) & (positions < reach.end)
        lost |= inside & ~_in_ranges(positions, reach.pending)
    return lost


def _in_ranges(positions: Int64s, ranges: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Give which positions lie in one of these ranges, first and last inclusive, which ascend and do not overlap."""
    if not ranges:
        return np.zeros(len(positions), bool)
    first, last = np.array(ranges, np.int64).T
    place = np.searchsorted(first, positions, side="right") - 1
    found: NDArray[np.bool_] = (place >= 0) & (positions <= last[place])
    return found


def files_between(files: Iterable[DataFile], first: int, last: int | None) -> list[DataFile]:
    """Give the files that may hold log positions from first to last (None: to the end)."""
    return [
        file
        for file in files
        if file.first_position is None
        or file.last_position is None
        or (file.last_position >= first and (last is None or file.first_position <= last))
    ]


def count_by_partition(partitions: Int64s, num_partitions: int) -> list[int]:
    """Give how many rows each partition has."""
    counts: list[int] = np.bincount(partitions, minlength=num_partitions).tolist()
    return counts
