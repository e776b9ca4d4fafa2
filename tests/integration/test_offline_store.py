"""Durable tables on a real folder: fenced commits, torn tails as after a power cut, compaction, growth."""

import datetime as dt
import errno
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from pyarrow import fs

from das_service.folder import Folder
from das_service.logs.records import read_mark, write_mark
from das_service.sink import compaction
from das_service.sink.compaction import compact_step
from das_service.tables import durable_table, offline_store
from das_service.tables.durable_table import DurableTable, LostOwnershipError, TableBehindMarkError
from das_service.tables.offline_store import CHECKPOINT_COMMITS, TablePlace, TableReader, table_place
from schemas.dataset import TIMESTAMP
from schemas.entries import Position

SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string()),
        pa.field("event_time", TIMESTAMP),
        pa.field("log_position", pa.int64()),
        pa.field("event_day", pa.date32()),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("image", pa.binary(), metadata={"codec": "float32", "size": "1"}),
        pa.field("_example_hash", pa.int64()),
    ]
)
DAY = dt.date(2026, 3, 1)
NOON = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)


def rows(first: int, last: int, *, days: int = 1, schema: pa.Schema = SCHEMA, **values: Any) -> pa.Table:
    made = [
        {
            "example_id": f"e{i}", "event_time": NOON + dt.timedelta(days=i % days), "log_position": i,
            "event_day": DAY + dt.timedelta(days=i % days), "tags": [str(i), None], "image": b"abcd",
            "_example_hash": i, **values,
        }
        for i in range(first, last)
    ]  # fmt: skip
    return pa.Table.from_pylist(made, schema=schema)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "tables"))


def table_of(folder: Folder, *, schema: pa.Schema = SCHEMA, epoch: int = 1) -> DurableTable:
    table = DurableTable(folder, "ads", "examples", schema=schema, partitions=2, retention_hours=168)
    table.open(epoch=epoch)
    return table


@pytest.fixture
def table(folder: Folder) -> DurableTable:
    return table_of(folder)


def at(seq: int, *, epoch: int = 1) -> dict[int, Position]:
    return {0: Position(epoch=epoch, seq=seq), 1: Position(epoch=epoch, seq=seq)}


def ids(folder: Folder) -> list[str]:
    found = DeltaTable(folder.uri_of("ads/examples")).to_pyarrow_table()
    return sorted(pa.table(found)["example_id"].to_pylist(), key=lambda name: int(name[1:]))


def names(first: int, last: int) -> list[str]:
    return [f"e{i}" for i in range(first, last)]


def path_of(table: DurableTable) -> Path:
    assert table.place.path is not None
    return table.place.path


def test_a_table_that_is_opened_again_says_what_was_committed(folder: Folder, table: DurableTable) -> None:
    table.commit(rows(0, 10), at(0))
    table.commit(rows(10, 20, days=3), at(4), duplicates=3, conflicting=2)
    again = table_of(folder)
    assert again.state == table.state == read_mark(folder, "ads", "examples")
    assert (again.state.rows, again.state.duplicates, again.state.conflicting) == (20, 3, 2)
    assert again.state.positions == at(4)
    assert again.days == table.days


def test_a_commit_without_rows_moves_positions_alone(folder: Folder, table: DurableTable) -> None:
    table.commit(rows(0, 10), at(0))
    table.commit(SCHEMA.empty_table(), {1: Position(epoch=1, seq=5)}, duplicates=9)
    again = table_of(folder)
    assert again.state.positions == {0: Position(epoch=1, seq=0), 1: Position(epoch=1, seq=5)}
    assert (again.state.rows, again.state.duplicates) == (10, 9)


def test_the_position_of_the_latest_epoch_counts(folder: Folder, table: DurableTable) -> None:
    table.commit(rows(0, 10), at(7))
    table.commit(rows(10, 20), {0: Position(epoch=2, seq=0)})
    again = table_of(folder, epoch=3)
    assert again.state.positions == {0: Position(epoch=2, seq=0), 1: Position(epoch=1, seq=7)}


def test_files_of_a_commit_that_finds_the_disk_full_are_removed(
    table: DurableTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = offline_store.fsync_path, iter(range(100))

    def full(path: Path) -> None:
        if next(calls) == 3:  # of the second event day's file
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path)

    table.commit(rows(0, 9, days=3), at(0))
    before = sorted(path_of(table).glob("event_day=*/*"))
    monkeypatch.setattr(offline_store, "fsync_path", full)
    with pytest.raises(OSError, match="No space left"):
        table.commit(rows(9, 18, days=3), at(1))
    assert sorted(path_of(table).glob("event_day=*/*")) == before


def test_a_copy_that_compaction_could_not_finish_is_removed(
    table: DurableTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        table.commit(rows(10 * i, 10 * i + 10), at(i))
    before = sorted(path_of(table).glob("event_day=*/*"))

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compaction, "fsync_path", full)
    with pytest.raises(OSError, match="No space left"):
        compact_step(table, most_small_files=2, target_bytes=1 << 20)
    assert sorted(path_of(table).glob("event_day=*/*")) == before


def test_a_process_that_knows_an_older_epoch_than_the_mark_can_not_open_the_table(
    folder: Folder, table: DurableTable
) -> None:
    table.commit(rows(0, 10), at(7, epoch=2))
    with pytest.raises(LostOwnershipError, match="epoch 2"):
        table.open(epoch=1)
    assert table_of(folder, epoch=2).state.positions == at(7, epoch=2)


@pytest.mark.parametrize("moved", [at(0), {}], ids=["same positions", "no positions"])
def test_a_table_object_that_is_stale_can_not_commit(
    folder: Folder, table: DurableTable, moved: dict[int, Position]
) -> None:
    stale = table_of(folder)
    for i in range(20):
        table.commit(rows(10 * i, 10 * i + 10), at(i))
    with pytest.raises(LostOwnershipError):
        stale.commit(rows(0, 10), moved)
    assert compact_step(table, most_small_files=2, target_bytes=1 << 20)
    table.delta.create_checkpoint()
    with pytest.raises(LostOwnershipError):
        stale.commit(rows(0, 10), moved)
    assert (ids(folder), table_of(folder).state.positions) == (names(0, 200), at(19))


def test_a_mark_does_not_go_back_when_a_stopped_owner_goes_on(
    folder: Folder, table: DurableTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = durable_table.fsync_commits

    def stopped(*args: Any) -> None:
        monkeypatch.setattr(durable_table, "fsync_commits", whole)
        heir = table_of(folder)
        heir.commit(rows(10, 20), at(1))
        whole(*args)

    monkeypatch.setattr(durable_table, "fsync_commits", stopped)
    with pytest.raises(LostOwnershipError, match="is marked"):
        table.commit(rows(0, 10), at(0))
    mark = read_mark(folder, "ads", "examples")
    assert mark is not None
    assert (mark.positions, mark.rows, ids(folder)) == (at(1), 20, names(0, 20))


def test_a_stale_table_object_can_not_compact(folder: Folder, table: DurableTable) -> None:
    for i in range(4):
        table.commit(rows(10 * i, 10 * i + 10), at(i))
    stale = table_of(folder)
    assert compact_step(table, most_small_files=2, target_bytes=1 << 20) == 4
    with pytest.raises(LostOwnershipError):
        compact_step(stale, most_small_files=2, target_bytes=1 << 20)
    assert ids(folder) == names(0, 40)


def test_an_owner_notices_that_another_one_committed(folder: Folder, table: DurableTable) -> None:
    other = table_of(folder)
    other.commit(rows(0, 10), at(0))
    with pytest.raises(LostOwnershipError):
        table.commit(SCHEMA.empty_table(), {}, duplicates=1)


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


TEARS: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: cut(path, 0),
    "cut": lambda path: cut(path, 100),
    "last byte": lambda path: cut(path, path.stat().st_size - 2),
    "line": lambda path: path.write_bytes(b"\n".join(path.read_bytes().splitlines()[:-1]) + b"\n"),
    "zeros": zero,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_commit_is_set_aside(folder: Folder, table: DurableTable, tear: str) -> None:
    table.commit(rows(0, 10), at(0))
    mark = table.state
    table.commit(rows(10, 20), at(1))
    table.commit(rows(20, 30), at(2))
    write_mark(folder, "ads", "examples", mark)
    TEARS[tear](path_of(table) / "_delta_log" / f"{mark.version + 1:020d}.json")
    again = table_of(folder)
    assert (again.state, ids(folder)) == (mark, names(0, 10))
    again.commit(rows(10, 30), at(2))
    assert (table_of(folder).state.positions, ids(folder)) == (at(2), names(0, 30))


@pytest.mark.parametrize("tear", [name for name in TEARS if name != "line"])
def test_a_commit_whose_file_is_torn_is_set_aside(folder: Folder, table: DurableTable, tear: str) -> None:
    table.commit(rows(0, 10), at(0))
    mark = table.state
    table.commit(rows(10, 20), at(1))
    write_mark(folder, "ads", "examples", mark)
    commit = json.loads((path_of(table) / "_delta_log" / f"{mark.version + 1:020d}.json").read_text().splitlines()[1])
    TEARS[tear](path_of(table) / commit["add"]["path"])
    assert (table_of(folder).state, ids(folder)) == (mark, names(0, 10))
    assert list(Path(folder.uri).glob("ads/_das/torn/examples/*.json"))


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_compaction_gives_the_files_back(folder: Folder, table: DurableTable, tear: str) -> None:
    for i in range(4):
        table.commit(rows(10 * i, 10 * i + 10), at(i))
    mark = table.state
    compact_step(table, most_small_files=2, target_bytes=1 << 20)
    write_mark(folder, "ads", "examples", mark)
    TEARS[tear](path_of(table) / "_delta_log" / f"{mark.version + 1:020d}.json")
    assert (table_of(folder).state, ids(folder)) == (mark, names(0, 40))


@pytest.mark.parametrize("tear", [name for name in TEARS if name != "line"])
@pytest.mark.parametrize("name", ["*.checkpoint.parquet", "_last_checkpoint"])
def test_a_torn_checkpoint_is_set_aside(folder: Folder, table: DurableTable, tear: str, name: str) -> None:
    table.commit(rows(0, 10), at(0))
    mark = table.state
    table.commit(rows(10, 20), at(1))
    table.delta.create_checkpoint()
    write_mark(folder, "ads", "examples", mark)
    (found,) = (path_of(table) / "_delta_log").glob(name)
    TEARS[tear](found)
    again = table_of(folder)
    assert (again.state.positions, ids(folder)) == (at(1), names(0, 20))


@pytest.mark.parametrize("tear", TEARS)
def test_a_table_that_was_torn_when_it_was_made_is_made_again(folder: Folder, table: DurableTable, tear: str) -> None:
    (Path(folder.uri) / "ads/_das/examples.durable").unlink()
    TEARS[tear](path_of(table) / "_delta_log" / f"{0:020d}.json")
    again = table_of(folder)
    again.commit(rows(0, 10), at(0))
    assert ids(folder) == names(0, 10)


def test_whole_commits_above_the_mark_are_kept_and_marked(folder: Folder, table: DurableTable) -> None:
    table.commit(rows(0, 10), at(0))
    mark = table.state
    table.commit(rows(10, 20), at(1))
    write_mark(folder, "ads", "examples", mark)
    again = table_of(folder)
    assert again.state == table.state == read_mark(folder, "ads", "examples")


def test_everything_is_fsynced_before_the_mark(
    folder: Folder, table: DurableTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    whole = os.fsync

    def note(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        whole(handle)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(durable_table, "write_mark", stop)
    with pytest.raises(KeyboardInterrupt):
        table.commit(rows(0, 10, days=2), at(0))
    files = {path.name for path in path_of(table).glob("event_day=*/*")}
    wanted = files | {"event_day=2026-03-01", "event_day=2026-03-02", "examples", "_delta_log", f"{1:020d}.json"}
    assert (len(files), wanted - set(synced)) == (2, set())


def test_a_table_behind_its_mark_is_refused(folder: Folder, table: DurableTable) -> None:
    table.commit(rows(0, 10), at(0))
    (path_of(table) / "_delta_log" / f"{1:020d}.json").unlink()
    with pytest.raises(TableBehindMarkError, match="version 0, its mark at 1"):
        table_of(folder)


def test_checkpoints_are_made_and_the_table_opens_from_them(
    folder: Folder, table: DurableTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_table, "CHECKPOINT_COMMITS", 5)
    for i in range(12):
        table.commit(rows(i, i + 1), at(i))
    found = sorted(int(path.name[:20]) for path in (path_of(table) / "_delta_log").glob("*.checkpoint.parquet"))
    assert (found, CHECKPOINT_COMMITS) == ([5, 10], 25)
    assert (table_of(folder).state, ids(folder)) == (table.state, names(0, 12))


def test_compaction_keeps_rows_positions_and_days(folder: Folder, table: DurableTable) -> None:
    for i in range(10):
        table.commit(rows(12 * i, 12 * i + 12, days=2), at(i), duplicates=1)
    before = table.state
    steps = [compact_step(table, most_small_files=3, target_bytes=1 << 20) for _ in range(3)]
    assert steps == [10, 10, 0]
    again = table_of(folder)
    assert (again.state.positions, again.state.rows, again.state.duplicates) == (before.positions, 120, 10)
    assert {day: len(files) for day, files in again.days.items()} == {DAY: 1, DAY + dt.timedelta(1): 1}
    assert ids(folder) == names(0, 120)
    found = pa.table(DeltaTable(folder.uri_of("ads/examples")).to_pyarrow_table()).select(SCHEMA.names)
    assert found.sort_by("log_position").to_pylist() == rows(0, 120, days=2).to_pylist()
    table.commit(rows(120, 121), at(10))


def test_compaction_works_through_a_day_in_bounded_steps(table: DurableTable) -> None:
    for i in range(10):
        table.commit(rows(10 * i, 10 * i + 10), at(i))
    size = max(file.size_bytes for file in table.days[DAY])
    steps = [compact_step(table, most_small_files=3, target_bytes=3 * size) for _ in range(4)]
    assert (steps[0], sum(file.num_rows for file in table.days[DAY])) == (3, 100)


def test_replaced_files_stay_readable_for_the_retention(folder: Folder, table: DurableTable) -> None:
    for i in range(4):
        table.commit(rows(10 * i, 10 * i + 10), at(i))
    reader = TableReader(table_place(folder, "ads", "examples"))
    reader.refresh()
    compact_step(table, most_small_files=2, target_bytes=1 << 20)
    table.vacuum()
    assert all(Path(path).exists() for path in reader.files_of_days())
    table.commit(rows(40, 50), at(4))
    assert (table_of(folder).state, ids(folder)) == (table.state, names(0, 50))


def test_a_new_column_is_null_in_older_files_also_after_compaction(folder: Folder, table: DurableTable) -> None:
    table.commit(rows(0, 4), at(0))
    grown = SCHEMA.append(pa.field("brand", pa.string()))
    larger = table_of(folder, schema=grown)
    larger.commit(rows(4, 8, schema=grown, brand="x"), at(1))
    with pytest.raises(LostOwnershipError):
        table.commit(rows(4, 8), at(1))

    def brands() -> dict[str, str | None]:
        found = pa.table(DeltaTable(folder.uri_of("ads/examples")).to_pyarrow_table()).to_pylist()
        return {row["example_id"]: row["brand"] for row in found}

    expected = dict.fromkeys(names(0, 4)) | dict.fromkeys(names(4, 8), "x")
    assert brands() == expected
    compact_step(larger, most_small_files=1, target_bytes=1 << 20)
    assert brands() == expected
    assert DeltaTable(folder.uri_of("ads/examples")).schema().to_arrow().field("image").metadata_str == {
        "codec": "float32", "size": "1",
    }  # fmt: skip


def test_a_reader_lists_the_files_of_event_days(folder: Folder, table: DurableTable) -> None:
    reader = TableReader(table_place(folder, "ads", "examples"))
    assert (reader.refresh(), reader.files_of_days()) == (0, [])
    table.commit(rows(0, 9, days=3), at(0))
    table.commit(rows(9, 12, days=3), at(1))
    assert reader.refresh() == 2
    second = DAY + dt.timedelta(1)
    assert [Path(path).parent.name for path in reader.files_of_days([second])] == [f"event_day={second}"] * 2
    assert (len(reader.files_of_days()), reader.files_of_days([dt.date(2030, 1, 1)])) == (6, [])
    assert [(f.num_rows, f.first_position, f.last_position) for f in reader.days[DAY]] == [(3, 0, 6), (1, 9, 9)]


def test_off_this_machine_a_table_is_written_and_read_through_its_file_system(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store without fsync or renames: here a local file system that the table takes for a remote one."""

    def remote(folder: Folder, dataset: str, table: str) -> TablePlace:
        root = folder.uri_of(f"{dataset}/{table}")
        Path(root).mkdir(parents=True, exist_ok=True)
        filesystem = fs.SubTreeFileSystem("/", fs.LocalFileSystem())
        return TablePlace(uri=root, path=None, filesystem=filesystem, root=root, storage_options={})

    monkeypatch.setattr(durable_table, "table_place", remote)
    for day in range(2):
        (Path(folder.uri) / f"ads/examples/event_day={DAY + dt.timedelta(day)}").mkdir(parents=True)
    table = table_of(folder)
    for i in range(4):
        table.commit(rows(10 * i, 10 * i + 10, days=2), at(i))
    assert compact_step(table, most_small_files=2, target_bytes=1 << 20) == 4
    assert ids(folder) == names(0, 40)
    known = table.known_rows([DAY])
    assert not isinstance(known, Sequence)
    assert known.count_rows() == 20
