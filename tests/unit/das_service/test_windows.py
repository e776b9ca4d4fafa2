"""Windows hold every row once, in order, and end where the day changes if that costs no more than half a window."""

import datetime as dt
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from das_service.errors import TooLargeError
from das_service.supervision.windows import BatchRows, FileRows, Window, cut_place, days_of, iter_windows
from schemas.dataset import TIMESTAMP

DAY_US = 86_400_000_000
DAYS = st.lists(st.integers(-2, 2), min_size=1, max_size=60)


def times(days: Sequence[int]) -> np.ndarray:
    return np.array(days, np.int64) * DAY_US + DAY_US // 2


def batch_rows(first: int, days: Sequence[int]) -> BatchRows:
    numbers = np.arange(first, first + len(days))
    batch = pa.record_batch({"example_id": pa.array([f"e{i}" for i in numbers], pa.string()), "number": numbers})
    return BatchRows(batch=batch, event_time=times(days))


def numbers_of(window: Window) -> list[int]:
    return [number for batch in window.batches() for number in batch["number"].to_pylist()]


@given(DAYS, st.integers(1, 70))
def test_a_cut_is_the_last_change_of_day_in_the_second_half_or_the_bound(days: list[int], most_rows: int) -> None:
    at = cut_place(np.array(days, np.int64), most_rows)

    changes = [i for i in range(1, len(days)) if days[i] != days[i - 1] and most_rows // 2 < i <= most_rows]
    assert at == (max(changes) if changes else min(most_rows, len(days)))


def test_a_cut_falls_on_a_change_right_after_the_window() -> None:
    assert cut_place(np.array([1, 1, 2, 2, 3], np.int64), 4) == 4
    assert cut_place(np.array([1, 1, 1, 2, 2, 2], np.int64), 4) == 3
    assert cut_place(np.array([1, 2, 2, 2, 2, 2], np.int64), 4) == 4


@given(st.lists(st.lists(st.integers(0, 2), max_size=20), max_size=8), st.integers(1, 30))
def test_windows_cover_all_rows_in_order_and_none_is_too_large(pieces: list[list[int]], most_rows: int) -> None:
    days = [day for piece in pieces for day in piece]
    starts = np.cumsum([0, *map(len, pieces)])
    parts = [batch_rows(int(start), piece) for start, piece in zip(starts, pieces, strict=False)]

    windows = list(iter_windows(parts, most_rows=most_rows, granularity="day"))

    assert [number for window in windows for number in numbers_of(window)] == list(range(len(days)))
    assert [day for window in windows for day in window.event_day.tolist()] == days
    assert all(1 <= window.num_rows <= most_rows for window in windows)
    assert all(window.num_rows > most_rows // 2 for window in windows[:-1])
    assert all(
        part.event_time.tolist() == times(days)[part.batch["number"].to_numpy()].tolist()
        for window in windows for part in window.parts
    )  # fmt: skip


def test_rows_are_taken_no_sooner_than_a_window_needs_them() -> None:
    taken = []

    def rows() -> Iterator[BatchRows]:
        for first in range(0, 100, 10):
            taken.append(first)
            yield batch_rows(first, [0] * 10)

    next(iter_windows(rows(), most_rows=25, granularity="day"))

    assert taken == [0, 10, 20]


@given(st.sampled_from(["day", "week", "month"]), st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999))
def test_the_day_of_a_time_is_that_of_its_calendar(granularity: str, time: int) -> None:
    moment = dt.datetime(1, 1, 1) + dt.timedelta(microseconds=time + 62_135_596_800_000_000)  # noqa: DTZ001 - UTC all along
    day = moment.date()
    if granularity == "week":
        day -= dt.timedelta(days=day.weekday())
    if granularity == "month":
        day = day.replace(day=1)

    (found,) = days_of(np.array([time], np.int64), granularity)

    assert found == day.toordinal() - dt.date(1970, 1, 1).toordinal()


@pytest.fixture(scope="module")
def connection() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(":memory:", config={"threads": 2}) as connection:
        yield connection


def asked(connection: duckdb.DuckDBPyConnection, window: Window) -> list[tuple[int, str]]:
    with connection.cursor() as cursor:
        window.register(cursor, max_id_bytes=1 << 20)
        return cursor.sql("SELECT row, example_id FROM asked ORDER BY row").fetchall()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 15), st.integers(1, 15), st.integers(1, 60))
def test_a_window_of_files_asks_for_the_rows_by_number(
    tmp_path_factory: pytest.TempPathFactory,
    connection: duckdb.DuckDBPyConnection,
    sizes: list[int],
    group_rows: int,
    part_rows: int,
    most_rows: int,
) -> None:
    folder = tmp_path_factory.mktemp("files")
    parts, ids = [], []
    for number, size in enumerate(sizes):
        path, mine = folder / f"{number}.parquet", [f"{number}-{i}" for i in range(size)]
        pq.write_table(pa.table({"example_id": mine}), path, row_group_size=group_rows)
        ids += mine
        parts += [
            FileRows(path=str(path), first=first, event_time=times([0] * min(part_rows, size - first)))
            for first in range(0, size, part_rows)
        ]

    windows = list(iter_windows(parts, most_rows=most_rows, granularity="day"))

    found = [asked(connection, window) for window in windows]
    assert [[row for row, _ in rows] for rows in found] == [list(range(window.num_rows)) for window in windows]
    assert [name for rows in found for _, name in rows] == ids


def test_the_same_file_twice_is_asked_for_twice(tmp_path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"example_id": ["a", "b", "c"]}), path)
    parts = [FileRows(path=str(path), first=first, event_time=times([0] * 2)) for first in (1, 0, 1)]

    (window,) = iter_windows(parts, most_rows=9, granularity="day")

    assert asked(connection, window) == list(enumerate(["b", "c", "a", "b", "b", "c"]))


def test_ids_that_grow_beyond_the_bound_are_refused(connection: duckdb.DuckDBPyConnection) -> None:
    ids = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array(["x" * 1000]))
    batch = pa.record_batch({"example_id": ids, "event_time": pa.array(times([0] * 100)).cast(TIMESTAMP)})
    (window,) = iter_windows([BatchRows(batch=batch, event_time=times([0] * 100))], most_rows=1000, granularity="day")

    with pytest.raises(TooLargeError):
        window.register(connection, max_id_bytes=99_999)
