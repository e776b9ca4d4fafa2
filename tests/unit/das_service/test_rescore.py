"""Gaps and reaches against sets of positions."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from das_service.sink.rescore import Gap, Reach, in_gaps, is_lost, merge_gaps

GAPS = st.lists(
    st.builds(
        lambda partition, first, size: Gap(partition=partition, first=first, last=first + size),
        st.integers(0, 1), st.integers(0, 12), st.integers(0, 5),
    ),
    max_size=6,
)  # fmt: skip
REACHES = st.lists(
    st.builds(
        lambda start, end, pending: Reach(start=start, end=end, pending=pending),
        st.integers(0, 10), st.integers(0, 20),
        st.none() | st.tuples(st.integers(0, 20), st.integers(0, 20)),
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
        and not (pending is not None and pending[0] <= at <= pending[1])
        for partition, at in zip(PARTITIONS, POSITIONS, strict=True)
        for pending in [reaches[partition].pending]
    ]
    assert is_lost(POSITIONS, PARTITIONS, reaches).tolist() == expected
