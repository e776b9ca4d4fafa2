"""Gaps and reaches against sets of positions; a plan from the first look to the last row."""

import datetime as dt
import itertools
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from das_service.folder import Folder
from das_service.logs.backlog import merge_positions
from das_service.logs.streams import NOT_COUNTED
from das_service.sink.rescore_plan import (
    Gap,
    Loss,
    LostDay,
    Plan,
    Reach,
    in_gaps,
    is_lost,
    merge_gaps,
    plan_with_loss,
    read_loss,
    read_plan,
    with_counted_slice,
    with_fed_gaps,
    with_fed_slice,
    with_gaps,
    write_loss,
    write_plan,
)
from das_service.tables.offline_store import DataFile

GAPS = st.lists(
    st.builds(
        lambda partition, first, size: Gap(partition=partition, first=first, last=first + size),
        st.integers(0, 1), st.integers(0, 12), st.integers(0, 5),
    ),
    max_size=6,
)  # fmt: skip
REACHES = st.lists(
    st.builds(
        lambda start, end, pending: Reach(start=start, end=end, pending=tuple(merge_positions(sorted(pending)))),
        st.integers(0, 10), st.integers(0, 20), st.sets(st.integers(0, 20)),
    ),
    min_size=2, max_size=2,
)  # fmt: skip
PARTITIONS, POSITIONS = (grid.ravel() for grid in np.meshgrid(np.arange(2), np.arange(25), indexing="ij"))


def covered(gaps: list[Gap]) -> set[tuple[int, int]]:
    return {(gap.partition, position) for gap in gaps for position in range(gap.first, gap.last + 1)}


@given(gaps=GAPS)
def test_merged_gaps_cover_the_same_and_stay_apart(gaps: list[Gap]) -> None:
    merged = merge_gaps(gaps)
    assert covered(merged) == covered(gaps)
    assert sum(gap.last - gap.first + 1 for gap in merged) == len(covered(gaps))
    neighbours = itertools.pairwise(merged)
    assert all(a.partition < b.partition or a.last + 1 < b.first for a, b in neighbours)


@given(gaps=GAPS)
def test_rows_in_gaps_are_those_that_the_gaps_cover(gaps: list[Gap]) -> None:
    inside = in_gaps(POSITIONS, PARTITIONS, gaps)
    assert {(int(p), int(at)) for p, at in zip(PARTITIONS[inside], POSITIONS[inside], strict=True)} == covered(gaps)


@given(reaches=REACHES)
def test_lost_rows_are_those_that_no_log_brings(reaches: list[Reach]) -> None:
    expected = [
        reaches[partition].start <= at < reaches[partition].end
        and not any(first <= at <= last for first, last in reaches[partition].pending)
        for partition, at in zip(PARTITIONS, POSITIONS, strict=True)
    ]
    assert is_lost(POSITIONS, PARTITIONS, reaches).tolist() == expected


@given(positions=st.sets(st.integers(0, 40)))
def test_merged_positions_are_the_same_and_do_not_touch(positions: set[int]) -> None:
    ranges = merge_positions(sorted(positions))
    assert [at for first, last in ranges for at in range(first, last + 1)] == sorted(positions)
    assert all(before[1] + 1 < after[0] for before, after in itertools.pairwise(ranges))


MONDAY, TUESDAY, SUNDAY = dt.date(2026, 3, 2), dt.date(2026, 3, 3), dt.date(2026, 3, 1)
LOSS = Loss(epoch=3, reaches=(Reach(start=10, end=50), Reach(start=20, end=40, pending=((25, 26), (30, 30)))))


def file_of(first: int | None, last: int | None, *, num_rows: int = 1) -> DataFile:
    return DataFile(path="f", size_bytes=1, num_rows=num_rows, first_position=first, last_position=last)


def test_a_loss_plans_the_event_days_whose_files_it_may_touch() -> None:
    days = {
        MONDAY: [file_of(0, 9), file_of(45, 60)],
        SUNDAY: [file_of(50, 70)],
        TUESDAY: [file_of(None, None, num_rows=5_000_000)],
    }
    lost = (LostDay(day=MONDAY), LostDay(day=TUESDAY, num_slices=4))
    assert plan_with_loss(Plan(epoch=2, days=(LostDay(day=SUNDAY),)), LOSS, days) == Plan(epoch=3, days=lost)


@given(gaps=GAPS, reaches=REACHES)
def test_rows_of_gaps_are_kept_or_lost(gaps: list[Gap], reaches: list[Reach]) -> None:
    plan = with_gaps(Plan(), gaps, [30, 40])
    kept = plan_with_loss(plan, Loss(epoch=2, reaches=tuple(reaches)), {})
    is_kept = in_gaps(POSITIONS, PARTITIONS, kept.gaps)
    assert (is_kept == in_gaps(POSITIONS, PARTITIONS, gaps) & ~is_lost(POSITIONS, PARTITIONS, reaches)).all()
    assert kept.gap_rows == tuple(rows * (PARTITIONS[is_kept] == p).any() for p, rows in enumerate([30, 40]))


def test_rows_of_a_plan_are_not_known_before_each_day_is_counted() -> None:
    days = (LostDay(day=SUNDAY), LostDay(day=MONDAY, num_slices=2))
    plan = with_gaps(Plan(days=days), [Gap(partition=1, first=3, last=4)], [0, 7])
    for rows in ([0, 0], [2, 3], [1, 0]):
        assert plan.rows_by_partition(2) == [NOT_COUNTED, NOT_COUNTED]
        plan = with_counted_slice(plan, rows)
    assert ([lost.day for lost in plan.days], plan.rows_by_partition(2)) == ([MONDAY], [3, 10])


def test_a_day_is_cut_by_what_is_lost_of_it_and_over_after_its_last_slice() -> None:
    plan = with_counted_slice(Plan(days=(LostDay(day=SUNDAY), LostDay(day=MONDAY))), [150_000, 1])
    assert (plan.days[0].num_slices, plan.days[0].next_slice) == (2, 0)
    plan = with_fed_slice(with_counted_slice(plan, [0, 0]), [70_000, 1])
    assert (plan.rows_by_partition(2), plan.days[0].next_slice) == ([80_000, 0], 1)
    assert with_fed_slice(plan, [79_000, 0]).is_done


def test_rows_of_gaps_that_are_over_are_forgotten() -> None:
    gaps = [Gap(partition=0, first=3, last=9), Gap(partition=1, first=5, last=30)]
    plan = with_fed_gaps(with_gaps(Plan(), gaps, [100, 200]), 10, [90, 60])
    assert (plan.gaps, plan.gap_rows) == ((Gap(partition=1, first=11, last=30),), (0, 140))


def test_plans_and_losses_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    assert (read_plan(folder, "ads", "f"), read_loss(folder, "ads", "f")) == (Plan(), None)
    counted = LostDay(day=MONDAY, rows=(1, 2), is_counted=True, num_slices=4, next_slice=3)
    plan = Plan(epoch=2, gaps=(Gap(partition=0, first=1, last=2),), gap_rows=(5,), days=(counted, LostDay(day=SUNDAY)))
    write_plan(folder, "ads", "f", plan)
    write_loss(folder, "ads", "f", LOSS)
    assert (read_plan(folder, "ads", "f"), read_loss(folder, "ads", "f")) == (plan, LOSS)
