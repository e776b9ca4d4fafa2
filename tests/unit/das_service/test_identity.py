"""Identity against a brute force: whatever the batches, the first row of an example is kept and the rest is named."""

import datetime as dt
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from das_service.sink.identity import EXAMPLE, Verdict, first_of_key, settle_identity
from das_service.tables.duck import Duck
from schemas.dataset import TIMESTAMP

EPOCH_DAY = dt.date(2026, 3, 1)
DAY_US = 86_400_000_000
START_US = 1_772_323_200_000_000


class Row(NamedTuple):
    """An example as identity sees it; `hash_` is free, so that hashes collide."""

    example_id: str
    day: int
    second: int
    content: int
    hash_: int


ROWS = st.builds(
    Row,
    example_id=st.sampled_from(["a", "b", "c", "d", "e"]),
    day=st.integers(0, 2),
    second=st.integers(0, 1),
    content=st.integers(0, 1),
    hash_=st.just(0),
).map(lambda row: row._replace(hash_=0 if row.example_id in "abc" else ord(row.example_id)))


def table(rows: Sequence[Row], *, with_content: bool = True) -> pa.Table:
    columns = {
        "example_id": pa.array([row.example_id for row in rows], pa.string()),
        "event_time": pa.array([START_US + row.day * DAY_US + row.second * 10**6 for row in rows], TIMESTAMP),
        "content_hash": pa.array([row.content for row in rows], pa.int64()),
        "event_day": pa.array([EPOCH_DAY + dt.timedelta(row.day) for row in rows], pa.date32()),
        "_example_hash": pa.array([row.hash_ for row in rows], pa.int64()),
    }
    if not with_content:
        del columns["content_hash"]
    return pa.table(columns)


def write_days(rows: pa.Table, folder: Path) -> list[str]:
    """Write one file per event day, the day in its path alone, as the tables have it."""
    paths = []
    for day in rows["event_day"].unique().to_pylist():
        path = folder / f"event_day={day}" / "part.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = rows.filter(pa.compute.equal(rows["event_day"], pa.scalar(day, pa.date32())))
        pq.write_table(part.drop_columns(["event_day"]), path)
        paths.append(str(path))
    return paths


def brute_force(stored: Sequence[Row], batch: Sequence[Row]) -> tuple[list[int], list[int], list[int]]:
    known = {(row.example_id, row.day): row for row in stored}
    kept, duplicate, conflicting = [], [], []
    for number, row in enumerate(batch):
        winner = known.setdefault((row.example_id, row.day), row)
        if winner is row:
            kept.append(number)
        elif (winner.second, winner.content) == (row.second, row.content):
            duplicate.append(number)
        else:
            conflicting.append(number)
    return kept, duplicate, conflicting


def distinct(rows: Sequence[Row]) -> list[Row]:
    return list({(row.example_id, row.day): row for row in reversed(rows)}.values())


def lists(verdict: Verdict) -> tuple[list[int], list[int], list[int]]:
    return verdict.kept.tolist(), verdict.duplicate.tolist(), verdict.conflicting.tolist()


@pytest.fixture(scope="module")
def duck() -> Iterator[Duck]:
    duck = Duck(memory_bytes=128 << 20, threads=1)
    yield duck
    duck.close()


@given(stored=st.lists(ROWS, max_size=8), batch=st.lists(ROWS, min_size=1, max_size=16))
def test_the_verdict_is_that_of_the_brute_force(
    stored: list[Row], batch: list[Row], duck: Duck, tmp_path_factory: pytest.TempPathFactory
) -> None:
    batch = [Row(*row) for row in batch]
    stored = distinct(stored)
    paths = write_days(table(stored), tmp_path_factory.mktemp("days")) if stored else []
    assert lists(settle_identity(table(batch), paths, duck)) == brute_force(stored, batch)


def test_rows_without_content_are_never_conflicting(duck: Duck, tmp_path: Path) -> None:
    stored = [Row("a", 0, 0, 0, 1)]
    batch = [Row("a", 0, 1, 0, 1), Row("b", 0, 0, 0, 2), Row("b", 0, 1, 0, 2)]
    paths = write_days(table(stored, with_content=False), tmp_path)
    assert lists(settle_identity(table(batch, with_content=False), paths, duck)) == ([1], [0, 2], [])


def test_one_id_on_two_event_days_is_two_examples(duck: Duck, tmp_path: Path) -> None:
    paths = write_days(table([Row("a", 0, 0, 0, 1)]), tmp_path)
    assert lists(settle_identity(table([Row("a", 1, 0, 0, 1)]), paths, duck)) == ([0], [], [])


def test_a_dataset_off_this_machine_gives_the_same_as_paths(duck: Duck, tmp_path: Path) -> None:
    stored, batch = [Row("a", 0, 0, 0, 1)], [Row("a", 0, 0, 0, 1), Row("a", 0, 0, 1, 1), Row("b", 0, 0, 0, 2)]
    paths = write_days(table(stored), tmp_path)
    partitioning = pads.HivePartitioning(pa.schema([pa.field("event_day", pa.date32())]))
    known = pads.dataset(paths, format="parquet", partitioning=partitioning, partition_base_dir=str(tmp_path))
    assert lists(settle_identity(table(batch), known, duck)) == ([2], [0], [1])


def test_equal_hashes_of_other_ids_are_no_repeats() -> None:
    rows = table([Row("a", 0, 0, 0, 7), Row("b", 0, 0, 0, 7), Row("a", 1, 0, 0, 7), Row("a", 0, 0, 0, 7)])
    assert np.array_equal(first_of_key(rows, EXAMPLE), [0, 1, 2, 0])
