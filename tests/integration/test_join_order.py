"""Order (I6): half a million shuffled rows with repeats come back row by row, whole columns against numpy."""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from das_service.errors import UnavailableError
from das_service.folder import Folder
from das_service.supervision.answer import LookupQuery
from das_service.supervision.augment_files import WINDOWS_AT_ONCE, iter_joined, list_sources
from das_service.supervision.join import OfflineJoin
from das_service.supervision.windows import Rows, iter_windows
from das_service.tables.duck import JOIN_MEMORY, Duck
from das_service.tables.durable_table import DurableTable
from schemas.dataset import TIMESTAMP, DatasetSpec
from schemas.entries import Position
from schemas.snapshot import OutputColumns
from schemas.tables import dead_letters_table, dead_letters_table_schema, supervision_table, supervision_table_schema
from tests.joining import BASE_US, DAY_US, Fm, batches_of, catalog_of, files_of, table_rows

STORED, CALLED = 300_000, 600_000
OUTPUTS = OutputColumns(tasks=("click",), embeddings={"hidden": (4, "float16")})
SPEC = DatasetSpec.model_validate({"features": [{"name": "price", "type": "float"}], "partitions": 2})
THROUGH = {"new": BASE_US - DAY_US, "leaky": BASE_US + 9 * DAY_US, "also": BASE_US}
FM = Fm("f", OUTPUTS, THROUGH)
Numbers = NDArray[np.int64]


def ids_of(numbers: Numbers) -> pa.Array:
    return pa.array(np.char.mod("id-%07d", numbers).astype(object), pa.string())


def times_of(numbers: Numbers) -> Numbers:
    """Give event times over three days, another in each row."""
    return BASE_US + numbers % 3 * DAY_US + numbers


def hidden_of(numbers: Numbers) -> NDArray[np.uint8]:
    """Give 8 bytes that are another number's in no other row."""
    return np.ascontiguousarray(numbers, "<u8").view(np.uint8).reshape(-1, 8)


def kinds_of(numbers: Numbers) -> Numbers:
    """Give what is there of an example: -1, 0 nothing, 1 leaky alone, 2 dead, 3 three snapshots, 4..19 one."""
    return np.where(numbers < STORED, numbers % 20, -1)


def said_rows(numbers: Numbers, snapshot_id: str, *, scored_at: Numbers) -> pa.Table:
    columns: dict[str, Any] = {
        "example_id": ids_of(numbers),
        "event_time": times_of(numbers),
        "snapshot_id": pa.array([snapshot_id] * len(numbers)),
        "trained_through": np.full(len(numbers), THROUGH[snapshot_id]),
        "scored_at": scored_at,
        "available_at": scored_at,
        "click__logit": (numbers + (0.5 if snapshot_id == "also" else 0.0)).astype(np.float32),
        "hidden": pa.array(list(map(bytes, hidden_of(numbers))), pa.binary()),
    }
    return table_rows(columns, supervision_table_schema(OUTPUTS), SPEC)


def dead_rows(numbers: Numbers) -> pa.Table:
    columns: dict[str, Any] = {
        "example_id": ids_of(numbers),
        "event_time": times_of(numbers),
        "snapshot_id": pa.array(["new"] * len(numbers)),
        "failed_at": times_of(numbers),
        "reason": pa.array(["boom"] * len(numbers)),
    }
    return table_rows(columns, dead_letters_table_schema(), SPEC)


def commit_all(folder: Folder, name: str, schema: pa.Schema, commits: Iterable[pa.Table]) -> None:
    table = DurableTable(folder, "ads", name, schema=schema, partitions=2, retention_hours=24)
    table.open(epoch=1)
    for number, rows in enumerate(commits):
        table.commit(rows, {0: Position(epoch=1, seq=number)})


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Three days in three shuffled commits; every twentieth example has three snapshots, the leaky one scored first."""
    folder = Folder(str(tmp_path_factory.mktemp("order")))
    numbers = np.random.default_rng(1).permutation(STORED)
    kinds = kinds_of(numbers)
    commits = [
        pa.concat_tables(
            [
                said_rows(part[(kind >= 3)], "new", scored_at=times_of(part[kind >= 3]) + 7),
                said_rows(
                    part[(kind == 1) | (kind == 3)], "leaky", scored_at=times_of(part[(kind == 1) | (kind == 3)])
                ),
            ]
        )
        for part, kind in zip(np.array_split(numbers, 2), np.array_split(kinds, 2), strict=True)
    ]
    both = np.sort(numbers[kinds == 3])
    commits.append(said_rows(both, "also", scored_at=times_of(both) + 7 - both % 2))
    commit_all(folder, supervision_table("f"), supervision_table_schema(OUTPUTS), commits)
    commit_all(folder, dead_letters_table("f"), dead_letters_table_schema(), [dead_rows(numbers[kinds == 2])])
    return folder


@pytest.fixture(scope="module")
def called() -> Numbers:
    """The caller's rows: in no order, most of them several times, some of them nobody's."""
    return np.random.default_rng(2).integers(0, STORED + STORED // 20, CALLED)


def reference(numbers: Numbers) -> pa.Table:
    """Give what the join shall add, column by column, from the numbers alone."""
    kinds = kinds_of(numbers)
    present = kinds >= 3
    status = np.select([kinds == 1, kinds == 2, present], ["leaky", "failed", "present"], "missing")
    also = kinds == 3  # scored as early as by `new`, or earlier; "also" < "new"
    logit = (numbers + 0.5 * also).astype(np.float32)

    def where_present(values: pa.Array) -> pa.Array:
        return pa.compute.if_else(pa.array(present), values, pa.scalar(None, values.type))

    hidden = hidden_of(numbers)
    return pa.table(
        {
            "f__status": pa.array(status, pa.string()),
            "f__snapshot_id": where_present(pa.array(np.where(also, "also", "new"), pa.string())),
            "f__trained_through": where_present(
                pa.array(np.where(also, THROUGH["also"], THROUGH["new"])).cast(TIMESTAMP)
            ),
            "f__scored_at": where_present(pa.array(times_of(numbers) + 7 - also * (numbers % 2)).cast(TIMESTAMP)),
            "f__click__logit": where_present(pa.array(logit)),
            "f__hidden": where_present(
                pa.Array.from_buffers(pa.binary(8), len(numbers), [None, pa.py_buffer(hidden.tobytes())])
            ),
        }
    )


def caller_table(numbers: Numbers) -> pa.Table:
    return pa.table({"example_id": ids_of(numbers), "event_time": pa.array(times_of(numbers)).cast(TIMESTAMP)})


def joined(folder: Folder, rows: Iterable[Rows], *, window_rows: int) -> pa.Table:
    duck = Duck(memory_bytes=512 * 1024 * 1024, threads=2, joins_as_written=True)
    query = LookupQuery(fms=("f",), embedding_format="encoded")
    join = OfflineJoin(duck, folder, catalog_of(SPEC, [FM]), "ads", query, client=None)
    parts = [join.join(w).columns for w in iter_windows(rows, most_rows=window_rows, granularity="day")]
    duck.close()
    table = pa.concat_tables(parts)
    return table.cast(reference(np.empty(0, np.int64)).schema).combine_chunks()


def joined_files(folder: Folder, source: Path, *, memory_bytes: int, spill_bytes: int | None = None) -> pa.Table:
    """Give what `das augment` joins: windows at a time."""
    duck = Duck(
        memory_bytes=memory_bytes,
        threads=2,
        concurrency=WINDOWS_AT_ONCE,
        spill_bytes=spill_bytes,
        joins_as_written=True,
    )
    query = LookupQuery(fms=("f",), embedding_format="encoded")
    with closing(duck):
        join = OfflineJoin(duck, folder, catalog_of(SPEC, [FM]), "ads", query, client=None)
        parts = [found.columns for _, found in iter_joined(list_sources(source), join, window_rows=50_000)]
    return pa.concat_tables(parts).cast(reference(np.empty(0, np.int64)).schema).combine_chunks()


def first_difference(found: pa.Table, wanted: pa.Table) -> dict[str, Any]:
    """Give per column the first row that differs, with both values; empty when they are equal."""
    differences = {}
    for name in wanted.column_names:
        if not found[name].equals(wanted[name]):
            mine, theirs = found[name].to_pylist(), wanted[name].to_pylist()
            row = next(i for i, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other)
            differences[name] = (row, mine[row], theirs[row])
    return differences


@pytest.mark.parametrize("window_rows", [CALLED, 250_000], ids=["one window", "three windows"])
def test_rows_of_files_stand_in_the_callers_order(
    tables: Folder, called: Numbers, tmp_path: Path, window_rows: int
) -> None:
    paths = [tmp_path / "b.parquet", tmp_path / "a.parquet"]
    rows = files_of(caller_table(called), paths, group_rows=70_000, part_rows=110_000)

    found = joined(tables, rows, window_rows=window_rows)

    assert first_difference(found, reference(called).combine_chunks()) == {}


def test_rows_of_batches_stand_in_the_callers_order(tables: Folder, called: Numbers) -> None:
    found = joined(tables, batches_of(caller_table(called), batch_rows=65_536), window_rows=500_000)

    assert first_difference(found, reference(called).combine_chunks()) == {}


def test_rows_in_time_order_stand_in_the_callers_order(tables: Folder, called: Numbers, tmp_path: Path) -> None:
    ordered = called[np.argsort(times_of(called), kind="stable")]
    rows = files_of(caller_table(ordered), [tmp_path / "a.parquet"], group_rows=100_000)

    found = joined(tables, rows, window_rows=300_000)

    assert first_difference(found, reference(ordered).combine_chunks()) == {}


def test_rows_with_other_times_of_their_days_stand_in_the_callers_order(
    tables: Folder, called: Numbers, tmp_path: Path
) -> None:
    """Windows in the order of the stored times; in every second one the caller says midnight of all rows."""
    ordered = called[np.argsort(times_of(called), kind="stable")]
    times = times_of(ordered)
    moved = np.where(np.arange(len(ordered)) // 100_000 % 2, times // DAY_US * DAY_US, times)
    table = caller_table(ordered).set_column(1, "event_time", pa.array(moved).cast(TIMESTAMP))

    found = joined(tables, files_of(table, [tmp_path / "a.parquet"], group_rows=100_000), window_rows=100_000)

    assert first_difference(found, reference(ordered).combine_chunks()) == {}


@pytest.mark.parametrize("memory_mb", [512, 24], ids=["enough memory", "little memory"])
def test_windows_that_are_joined_at_a_time_come_in_the_callers_order(
    tables: Folder, called: Numbers, tmp_path: Path, memory_mb: int
) -> None:
    table = caller_table(called)
    pq.write_table(table.slice(0, 350_000), tmp_path / "a.parquet", row_group_size=70_000)
    pq.write_table(table.slice(350_000), tmp_path / "b.parquet", row_group_size=70_000)

    found = joined_files(tables, tmp_path, memory_bytes=memory_mb * 1024 * 1024)

    assert first_difference(found, reference(called).combine_chunks()) == {}


def test_too_little_memory_is_told_with_the_setting_to_raise(tables: Folder, called: Numbers, tmp_path: Path) -> None:
    pq.write_table(caller_table(called), tmp_path / "a.parquet")

    with pytest.raises(UnavailableError, match="DAS_DUCKDB_MEMORY_BYTES") as caught:
        joined_files(tables, tmp_path, memory_bytes=2 * 1024 * 1024, spill_bytes=0)

    assert caught.value.code == JOIN_MEMORY
