"""The Delta tables: where they lie, how they are made, which files hold an event day. durable_table.py commits to them.

A table is `{tables_uri}/{dataset}/{table}`, partitioned by event_day. Data files are written here, not by deltalake: a
day at a time (memory does not grow with the days of a commit), and fsynced before the commit names them. Tables are
opened and written through one DeltaTable object, never by path: a write by path reloads the table, and so would
commit what another owner has committed already.
"""

import contextlib
import datetime as dt
import json
import math
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.transaction import AddAction, PostCommitHookProperties
from numpy.typing import NDArray
from pyarrow import fs

from das_service.folder import Folder, fsync_path, make_directory
from schemas.tables import EVENT_DAY, EXAMPLE_HASH, IS_BACKFILL, IS_SHADOW

NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
CHECKPOINT_COMMITS = 25  # reading 100 commits again at each one takes twice as long as a checkpoint does
PARQUET = {"compression": "zstd", "compression_level": 1}
ROW_GROUP_ROWS = 65_536  # what is read of a file at least: a page of training batches wants some 100,000 rows
_MOST_RUNS = 200
OUTCOME, BACKFILLED, SHADOWED = "part", "backfill", "shadow"
SERVED = (OUTCOME, BACKFILLED)
ALL_KINDS = (*SERVED, SHADOWED)
_DISTINCT = frozenset({"example_id", "event_time", "content_hash", EXAMPLE_HASH})
WITH_BOUNDS = (
    "event_time", "label_time", "received_at", "available_at", "closed_at", "log_position", "ready_seq",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePlace:
    """Where a table lies. path: on this machine, None on an object store; root: within filesystem."""

    uri: str
    path: Path | None
    filesystem: fs.FileSystem
    root: str
    storage_options: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """An active file of a table; path is relative to the table.

    Positions: of its rows in the log, or in the ready order of `closed`; both inclusive, None if not known.
    """

    path: str
    size_bytes: int
    num_rows: int
    first_position: int | None = None
    last_position: int | None = None

    @property
    def kind(self) -> str:
        """What its rows are, all of them: outcomes, what backfills said, or what shadows said.

        Readers leave shadows' files out unless they ask for them; whoever counts outcomes leaves out backfills' too.
        """
        first = self.path.rpartition("/")[2].partition("-")[0]
        return first if first in {BACKFILLED, SHADOWED} else OUTCOME


DayFiles = Mapping[dt.date, list[DataFile]]


def table_place(folder: Folder, dataset: str, table: str) -> TablePlace:
    """Give where a dataset's table lies."""
    local = folder.path
    filesystem, root = folder.remote() if local is None else (fs.LocalFileSystem(), str(local))
    return TablePlace(
        uri=folder.uri_of(f"{dataset}/{table}"),
        path=None if local is None else local / dataset / table,
        filesystem=filesystem,
        root=f"{root}/{dataset}/{table}",
        storage_options=folder.storage_options,
    )


def open_table(place: TablePlace) -> DeltaTable | None:
    """Give the table as it is now, None if there is none."""
    if not DeltaTable.is_deltatable(place.uri, storage_options=place.storage_options):
        return None
    return DeltaTable(place.uri, storage_options=place.storage_options)


def create_table(place: TablePlace, schema: pa.Schema, *, retention_hours: int) -> DeltaTable:
    """Make an empty table, partitioned by event_day, and give it.

    Checkpoints and the clean-up of the log are the owner's work: deltalake would do both before anything is fsynced.
    """
    if place.path is not None:
        make_directory(place.path / "_delta_log")
    return DeltaTable.create(
        place.uri,
        schema=schema,
        partition_by=[EVENT_DAY],
        storage_options=place.storage_options,
        configuration={
            "delta.checkpointInterval": str(CHECKPOINT_COMMITS),
            "delta.enableExpiredLogCleanup": "false",
            "delta.logRetentionDuration": f"interval {math.ceil(retention_hours / 24) + 1} days",
            "delta.deletedFileRetentionDuration": f"interval {retention_hours} hours",
        },
    )


def files_by_day(table: DeltaTable) -> dict[dt.date, list[DataFile]]:
    """Give the active files of each event day. 4 ms at 3,000 files."""
    actions = pa.table(table.get_add_actions(flatten=True))
    days: dict[dt.date, list[DataFile]] = {}
    if actions.num_rows == 0:
        return days
    unknown = [None] * actions.num_rows
    position = _position_of(name.partition(".")[2] for name in actions.column_names)
    names = ("path", "size_bytes", "num_records", f"min.{position}", f"max.{position}")
    columns = [actions[name].to_pylist() if name in actions.column_names else unknown for name in names]
    event_days = actions[f"partition.{EVENT_DAY}"].to_pylist()
    for day, path, size_bytes, num_rows, first, last in zip(event_days, *columns, strict=True):
        file = DataFile(
            path=path, size_bytes=size_bytes, num_rows=num_rows or 0, first_position=first, last_position=last
        )  # fmt: skip
        days.setdefault(day, []).append(file)
    return {day: in_log_order(files) for day, files in days.items()}


def with_added(days: DayFiles, added: Iterable[AddAction]) -> dict[dt.date, list[DataFile]]:
    """Give the files by event day once these are added too."""
    grown = dict(days)
    for action in added:
        day = dt.date.fromisoformat(action.partition_values[EVENT_DAY] or "")
        stats = json.loads(action.stats)
        file = DataFile(
            path=action.path,
            size_bytes=action.size,
            num_rows=stats["numRecords"],
            first_position=stats["minValues"].get(_position_of(stats["minValues"])),
            last_position=stats["maxValues"].get(_position_of(stats["maxValues"])),
        )
        grown[day] = in_log_order([*grown.get(day, []), file])
    return grown


def _position_of(names: Iterable[str]) -> str:
    """Give the column that says where in its log, or in the ready order, a row lies."""
    return "ready_seq" if "ready_seq" in names else "log_position"


def in_log_order(files: Iterable[DataFile]) -> list[DataFile]:
    """Give files by their first log position, so that every process lists them alike."""
    return sorted(files, key=lambda file: (file.first_position or 0, file.path))


class TableReader:
    """A table as readers see it: refreshed when asked, one owner thread."""

    def __init__(self, place: TablePlace) -> None:
        self._place = place
        self._table: DeltaTable | None = None
        self._version = -1
        self._days: dict[dt.date, list[DataFile]] = {}

    def refresh(self) -> int:
        """Bring the list of files up to date and give the table's version, -1 while there is no table."""
        if self._table is None:
            self._table = open_table(self._place)
        else:
            self._table.update_incremental()
        if self._table is not None and self._table.version() != self._version:
            self._days = files_by_day(self._table)
            self._version = self._table.version()
        return self._version

    @property
    def days(self) -> DayFiles:
        """Files by event day, as of the last refresh."""
        return self._days

    def schema(self) -> pa.Schema:
        """Give the table's Arrow schema; empty while there is no table."""
        return pa.schema([]) if self._table is None else pa.schema(self._table.schema().to_arrow())

    def files_of_days(
        self, event_days: Iterable[dt.date] | None = None, *, kinds: Collection[str] = SERVED
    ) -> list[str]:
        """Give the full paths (on an object store: paths within its file system) of these event days, default all."""
        return file_paths(self._place, self._days, event_days, kinds=kinds)

    def rows_of(self, files: Iterable[DataFile]) -> list[str] | pads.Dataset:
        """Give what DuckDB reads these files from, as known_rows does; a column that a file lacks is null."""
        paths = [f"{self._place.root}/{file.path}" for file in files]
        return _readable(self._place, paths, self.schema())


def file_paths(
    place: TablePlace, days: DayFiles, event_days: Iterable[dt.date] | None = None, *, kinds: Collection[str] = SERVED
) -> list[str]:
    """Give the full paths of the files of these event days, default all, that are of one of these kinds."""
    wanted = sorted(days) if event_days is None else sorted(set(event_days))
    found = (file for day in wanted for file in days.get(day, []))
    return [f"{place.root}/{file.path}" for file in found if file.kind in kinds]


def known_rows(
    place: TablePlace, days: DayFiles, event_days: Iterable[dt.date], *, kinds: Collection[str] = SERVED
) -> list[str] | pads.Dataset:
    """Give what DuckDB reads these event days from: file paths, or off this machine a dataset that pyarrow reads."""
    return _readable(place, file_paths(place, days, event_days, kinds=kinds), None)


def _readable(place: TablePlace, paths: list[str], schema: pa.Schema | None) -> list[str] | pads.Dataset:
    if place.path is not None or not paths:
        return paths
    partitioning = pads.HivePartitioning(pa.schema([pa.field(EVENT_DAY, pa.date32())]))
    return pads.dataset(
        paths,
        schema=schema,
        filesystem=place.filesystem,
        format="parquet",
        partitioning=partitioning,
        partition_base_dir=place.root,
    )


def write_files(place: TablePlace, rows: pa.Table) -> list[AddAction]:
    """Write rows into one new file per event day, fsynced on a folder, and give the actions that add them.

    What shadows and backfills said goes to files of its own, so that nobody reads it who does not ask for it.
    """
    added: list[AddAction] = []
    names: list[str] = []
    with removed_on_failure(place, names):
        for kind, some in _iter_kinds_apart(rows):
            for day, part in _iter_days(some):
                names.append(new_name(day, kind=kind))
                added.append(_write_file(place, names[-1], day, part))
    return added


def _iter_kinds_apart(rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Give the outcomes, then what backfills said, then what shadows said; none of what there is not."""
    if IS_SHADOW not in rows.column_names:
        yield OUTCOME, rows
        return
    is_shadow, is_backfill = (
        pc.fill_null(rows[name], False).to_numpy()  # noqa: FBT003 - what null is
        for name in (IS_SHADOW, IS_BACKFILL)
    )
    chosen = {OUTCOME: ~(is_shadow | is_backfill), BACKFILLED: is_backfill, SHADOWED: is_shadow}
    for kind, is_one in chosen.items():
        numbers = np.flatnonzero(is_one)
        if len(numbers):
            yield kind, rows_at(rows, numbers)


@contextlib.contextmanager
def removed_on_failure(place: TablePlace, names: Sequence[str]) -> Iterator[None]:
    """Delete these new files of a table if what follows fails: on a full disk the next try needs their room."""
    try:
        yield
    except Exception:
        for name in names:
            with contextlib.suppress(OSError):
                place.filesystem.delete_file(f"{place.root}/{name}")
        raise


def new_name(day: dt.date, *, kind: str = OUTCOME) -> str:
    """Give the name of a new file of an event day."""
    return f"{EVENT_DAY}={day.isoformat()}/{kind}-{uuid.uuid4()}.parquet"


def _iter_days(rows: pa.Table) -> Iterator[tuple[dt.date, pa.Table]]:
    """Give the rows of each event day, without that column, in their order."""
    numbers = rows[EVENT_DAY].cast(pa.int32()).to_numpy()
    data = rows.drop_columns([EVENT_DAY])
    for day in np.unique(numbers):
        yield dt.date.fromordinal(_EPOCH + int(day)), rows_at(data, np.flatnonzero(numbers == day))


def rows_at(rows: pa.Table, numbers: NDArray[np.int64]) -> pa.Table:
    """Give the rows of these numbers, which ascend; without a copy where they lie in few runs."""
    if len(numbers) == rows.num_rows:
        return rows
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    if len(breaks) > _MOST_RUNS:
        return rows.take(pa.array(numbers))
    starts = numbers[np.concatenate([[0], breaks])] if len(numbers) else []
    sizes = np.diff(np.concatenate([[0], breaks, [len(numbers)]]))
    runs = [rows.slice(int(start), int(size)) for start, size in zip(starts, sizes, strict=False)]
    return pa.concat_tables(runs) if runs else rows.slice(0, 0)


_EPOCH = dt.date(1970, 1, 1).toordinal()


def _write_file(place: TablePlace, name: str, day: dt.date, rows: pa.Table) -> AddAction:
    options = fresh_options(rows.schema)
    if place.path is not None:
        path = place.path / name
        make_directory(path.parent)
        pq.write_table(rows, path, row_group_size=ROW_GROUP_ROWS, **options)
        fsync_path(path)
        fsync_path(path.parent)
        size = path.stat().st_size
    else:
        buffer = pa.BufferOutputStream()
        pq.write_table(rows, buffer, row_group_size=ROW_GROUP_ROWS, **options)
        data = buffer.getvalue()
        size = data.size
        with place.filesystem.open_output_stream(f"{place.root}/{name}") as stream:
            stream.write(data)
    return add_action(name, day, size, stats=file_stats(rows))


def add_action(name: str, day: dt.date, size_bytes: int, *, stats: str, data_change: bool = True) -> AddAction:
    """Give the action that adds a file of an event day."""
    return AddAction(
        path=name,
        size=size_bytes,
        partition_values={EVENT_DAY: day.isoformat()},
        modification_time=int(dt.datetime.now(dt.UTC).timestamp() * 1000),
        data_change=data_change,
        stats=stats,
    )


def fresh_options(schema: pa.Schema) -> dict[str, Any]:
    """Give how new files are written: cheaply, since compaction writes their rows again, smaller.

    13 float, 13 int64 and 13 string columns: 1.1 us of CPU a row instead of 3.5 with what PARQUET and
    dictionary_columns say, for 188 instead of 158 bytes.
    """
    strings = [
        name for name in dictionary_columns(schema) if not pa.types.is_integer(schema.field(name.split(".")[0]).type)
    ]
    bounded = [name for name in WITH_BOUNDS if name in schema.names]
    return {"compression": "snappy", "use_dictionary": strings, "write_statistics": bounded}


def dictionary_columns(schema: pa.Schema) -> list[str]:
    """Give the columns that Parquet shall dictionary-encode: those whose values repeat.

    Ids, hashes, floats and vectors do not; trying costs them half of the time of a write.
    """
    names = []
    for field in schema:
        if pa.types.is_list(field.type):
            names.append(f"{field.name}.list.element")
        elif field.name not in _DISTINCT and not (pa.types.is_floating(field.type) or pa.types.is_binary(field.type)):
            names.append(field.name)
    return names


def file_stats(rows: pa.Table) -> str:
    """Give Delta's statistics of a file: its rows, and the bounds of times and log positions.

    Delta keeps milliseconds: bounds of times are rounded outwards.
    """
    lowest: dict[str, int | str] = {}
    highest: dict[str, int | str] = {}
    for name in WITH_BOUNDS:
        if name in rows.column_names:
            column = rows[name].cast(pa.int64())
            bounds = pc.min_max(column).as_py()
            is_time = pa.types.is_timestamp(rows.schema.field(name).type)
            lowest[name] = _millisecond(bounds["min"] // 1000) if is_time else bounds["min"]
            highest[name] = _millisecond(-(-bounds["max"] // 1000)) if is_time else bounds["max"]
    nulls = dict.fromkeys(lowest, 0)
    return json.dumps(
        {"numRecords": rows.num_rows, "minValues": lowest, "maxValues": highest, "nullCount": nulls},
        separators=(",", ":"),
    )


def _millisecond(milliseconds: int) -> str:
    moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(milliseconds=milliseconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
