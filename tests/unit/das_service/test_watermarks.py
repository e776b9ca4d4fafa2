"""Watermarks: what is late, that they never move back, and who follows whom."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from das_service.sink.watermarks import IDLE_SECONDS, Watermarks, latest_name, mark_late
from schemas.dataset import TIMESTAMP
from schemas.entries import Entry, Position

SECOND = 1_000_000


def entry(num_rows: int) -> Entry:
    return Entry(
        position=Position(epoch=1, seq=0), num_features=0, num_rows=num_rows, taken_at_us=0, rows_total=0,
        bytes_total=0, meta={}, fingerprint="", data=b"",
    )  # fmt: skip


def rows_of(times: list[int]) -> pa.Table:
    late = pa.array([False] * len(times), pa.bool_())
    return pa.table({"event_time": pa.array(times, pa.int64()).cast(TIMESTAMP), "is_late": late})


CHUNKS = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 50), min_size=1, max_size=5)), max_size=8)


@given(CHUNKS, st.integers(0, 20), st.integers(0, 7))
def test_lateness_is_that_of_the_log_however_it_is_cut_into_commits(
    chunks: list[tuple[int, list[int]]], lateness: int, cut: int
) -> None:
    late: list[bool] = []
    numbers: dict[str, int] = {}
    for part in (chunks[:cut], chunks[cut:]):
        rows, moved = mark_late(
            rows_of([t for _, times in part for t in times]), [(p, entry(len(times))) for p, times in part], numbers,
            lateness_us=lateness,
        )  # fmt: skip
        late += rows["is_late"].to_pylist()
        numbers |= moved

    wanted, latest = [], dict[int, int]()
    for partition, times in chunks:
        before = latest.get(partition)
        wanted += [before is not None and time < before - lateness for time in times]
        latest[partition] = max([*times, *([] if before is None else [before])])
    assert late == wanted
    assert numbers == {latest_name(partition): time for partition, time in latest.items()}


def look(marks: Watermarks, latest: dict[int, int | None], now: float, **waiting: int) -> dict[int, int]:
    behind = {int(name[1:]): entries for name, entries in waiting.items()}
    return dict(marks.look(latest, behind, lateness_us=10 * SECOND, now=now))


def test_each_partition_has_the_watermark_of_its_own_rows() -> None:
    assert look(Watermarks(), {0: 100 * SECOND, 1: 60 * SECOND, 2: None}, 0.0) == {0: 90 * SECOND, 1: 50 * SECOND}


def test_an_idle_partition_follows_the_slowest_of_the_others() -> None:
    marks = Watermarks()
    look(marks, {0: 100 * SECOND, 1: 60 * SECOND, 2: None}, 0.0)

    found = look(marks, {0: 200 * SECOND, 1: 60 * SECOND, 2: None}, IDLE_SECONDS)

    assert found == {0: 190 * SECOND, 1: 190 * SECOND, 2: 190 * SECOND}


def test_a_partition_whose_log_holds_more_is_not_idle() -> None:
    marks = Watermarks()
    look(marks, {0: 100 * SECOND, 1: 60 * SECOND}, 0.0)

    assert look(marks, {0: 200 * SECOND, 1: 60 * SECOND}, IDLE_SECONDS, p1=1)[1] == 50 * SECOND


def test_when_nothing_comes_event_time_runs_on_with_the_clock() -> None:
    marks = Watermarks()
    latest: dict[int, int | None] = {0: 100 * SECOND, 1: 60 * SECOND}
    look(marks, latest, 0.0)

    found = look(marks, latest, IDLE_SECONDS + 30)

    assert found == {0: 120 * SECOND, 1: 120 * SECOND}


@given(
    st.lists(
        st.tuples(
            st.lists(st.none() | st.integers(0, 100), min_size=2, max_size=2),
            st.lists(st.integers(0, 1), min_size=2, max_size=2),
            st.floats(0, 20),
        ),
        max_size=12,
    )
)
def test_a_watermark_never_moves_back(looks: list[tuple[list[int | None], list[int], float]]) -> None:
    marks, now = Watermarks(), 0.0
    before: dict[int, int] = {}
    for latest, waiting, seconds in looks:
        now += seconds
        found = look(marks, dict(enumerate(latest)), now, p0=waiting[0], p1=waiting[1])
        assert all(found[partition] >= time for partition, time in before.items())
        before = found


def test_quiet_time_before_a_restart_counts_until_something_new_comes() -> None:
    marks = Watermarks(reached={0: 100 * SECOND})

    def reached(now: float, latest: int) -> int:
        return marks.look({0: latest * SECOND}, {}, lateness_us=0, now=now)[0] // SECOND

    assert [reached(now, 40) for now in (0.0, IDLE_SECONDS, IDLE_SECONDS + 30)] == [100, 100, 130]
    assert reached(IDLE_SECONDS + 31, 140) == 140
    assert [reached(IDLE_SECONDS + now, 140) for now in (31 + IDLE_SECONDS, 33 + IDLE_SECONDS)] == [140, 142]
