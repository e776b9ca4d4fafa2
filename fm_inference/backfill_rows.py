"""The stored examples that a backfill has still to score, from the tables, a slice of an event day at a time.

Left out are examples that the snapshot has a served row of already, and those that the FM's workers have still to
score: they lie at or after the FM's start in the examples log and have no outcome in a table yet.
"""

import datetime as dt
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from das_service.folder import Folder
from das_service.tables.duck import Duck, quoted_path
from das_service.tables.offline_store import OUTCOME, SERVED, DataFile, TableReader, table_place
from fm_inference.backfill_spans import Span
from schemas import keys
from schemas.dataset import TIMESTAMP, DatasetSpec
from schemas.entries import Position
from schemas.tables import EXAMPLE_HASH, EXAMPLES, dead_letters_table, event_days, supervision_table

_SLICE_ROWS = 500_000
_BATCH_ROWS = 8192
_SLICE = f"({EXAMPLE_HASH} & $mask) = $slice"
_IN_SPAN = "epoch_us(e.event_time) >= $first AND epoch_us(e.event_time) < $end"
_IDS = "e.example_id, e.event_time, e.log_position"
_Source: TypeAlias = list[str] | pads.Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A span's examples on one event day: the files that they lie in, and how many they are."""

    span: Span
    day: dt.date
    files: tuple[DataFile, ...]
    num_rows: int


class StoredExamples:
    """The examples table of a dataset beside what one FM has said; one thread. starts: by partition in the log."""

    def __init__(
        self,
        folder: Folder,
        duck: Duck,
        *,
        dataset: str,
        spec: DatasetSpec,
        fm: str,
        starts: Mapping[int, Position],
    ) -> None:
        self._duck = duck
        self._spec = spec
        self._starts = np.array([starts[partition].number for partition in range(spec.partitions)])
        names = (EXAMPLES, supervision_table(fm), dead_letters_table(fm))
        self._examples, self._said, self._failed = (TableReader(table_place(folder, dataset, name)) for name in names)

    def parts(self, spans: Sequence[Span]) -> list[Part]:
        """Give what lies in these spans now, snapshot by snapshot; days without such examples are left out."""
        self._examples.refresh()
        found = []
        for span in spans:
            days = self._event_days(span.first_us, span.end_us)
            for day in sorted(day for day in self._examples.days if days[0] <= day <= days[1]):
                files = tuple(self._examples.days[day])
                num_rows = self._count(span, files)
                if num_rows:
                    found.append(Part(span=span, day=day, files=files, num_rows=num_rows))
        return found

    def iter_unscored(self, part: Part, *, only_ids: bool = False) -> Iterator[tuple[pa.Table, int]]:
        """Give the examples to be scored, some thousands at a time, and how many beside them are left to the workers.

        only_ids: without their features.

        Raises:
            duckdb.IOException: A file is gone: the run has taken longer than the tables keep what was replaced.
        """
        self._said.refresh()
        self._failed.refresh()
        num_slices = 1
        while num_slices * _SLICE_ROWS < part.num_rows:
            num_slices *= 2
        for number in range(num_slices):
            for rows in self._slice(part, number, num_slices, _IDS if only_ids else "e.*"):
                is_left = self._is_pending(rows)
                yield rows.filter(pa.array(~is_left)).drop_columns(["_has_outcome"]), int(is_left.sum())

    def _slice(self, part: Part, number: int, num_slices: int, columns: str) -> Iterator[pa.Table]:
        values: dict[str, int | str] = {
            "first": part.span.first_us, "end": part.span.end_us, "mask": num_slices - 1, "slice": number,
            "snapshot": "" if part.span.snapshot is None else part.span.snapshot.snapshot_id,
        }  # fmt: skip
        with self._duck.cursor() as cursor:
            mine = _known(cursor, "mine", _of_day(self._said, part.day, SERVED), "snapshot_id = $snapshot")
            scored = _known(cursor, "scored", _of_day(self._said, part.day, (OUTCOME,)))
            failed = _known(cursor, "failed", _of_day(self._failed, part.day, (OUTCOME,)))
            query = (
                f"WITH mine AS ({mine}), outcomes AS ({scored} UNION ALL {failed}) "  # noqa: S608 - our own names
                f"SELECT {columns}, {_exists('outcomes')} AS _has_outcome "
                f"FROM {_source(cursor, 'examples', self._examples.rows_of(part.files))} e "
                f"WHERE {_SLICE} AND {_IN_SPAN} AND NOT {_exists('mine')} AND $snapshot <> ''"
            )
            for batch in cursor.sql(query, params=values).to_arrow_reader(_BATCH_ROWS):
                yield pa.Table.from_batches([batch])

    def _is_pending(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Mark the rows that the FM's workers have still to score."""
        partitions = keys.partitions_of(keys.digest_array(rows["example_id"].combine_chunks()), self._spec.partitions)
        is_after = rows["log_position"].to_numpy() >= self._starts[partitions]
        return np.asarray(is_after & ~rows["_has_outcome"].to_numpy(zero_copy_only=False), np.bool_)

    def _count(self, span: Span, files: Sequence[DataFile]) -> int:
        values = {"first": span.first_us, "end": span.end_us}
        with self._duck.cursor() as cursor:
            source = _source(cursor, "examples", self._examples.rows_of(files))
            query = f"SELECT count(*) FROM {source} e WHERE {_IN_SPAN}"  # noqa: S608 - our own names
            found = cursor.execute(query, values).fetchone()
        return int(found[0]) if found else 0

    def _event_days(self, first_us: int, end_us: int) -> tuple[dt.date, dt.date]:
        """Give the event days of the first and the last microsecond."""
        times = pa.array([first_us, end_us - 1], pa.int64()).cast(TIMESTAMP)
        first, last = event_days(times, self._spec.table_granularity).to_pylist()
        return first, last


def _of_day(reader: TableReader, day: dt.date, kinds: Collection[str]) -> _Source:
    return reader.rows_of(file for file in reader.days.get(day, []) if file.kind in kinds)


def _known(cursor: duckdb.DuckDBPyConnection, name: str, files: _Source, condition: str = "true") -> str:
    """Give the query for the ids that a table has of a slice; of a table without files for none."""
    if not isinstance(files, pads.Dataset) and not files:
        return f"SELECT NULL::VARCHAR AS example_id, NULL::BIGINT AS {EXAMPLE_HASH} WHERE false"
    source = _source(cursor, name, files)
    return f"SELECT example_id, {EXAMPLE_HASH} FROM {source} WHERE {_SLICE} AND {condition}"  # noqa: S608 - our own names


def _source(cursor: duckdb.DuckDBPyConnection, name: str, files: _Source) -> str:
    if isinstance(files, pads.Dataset):
        cursor.register(f"{name}_files", files)
        return f"{name}_files"
    return f"read_parquet([{', '.join(map(quoted_path, files))}], union_by_name = true)"


def _exists(table: str) -> str:
    same = f"t.{EXAMPLE_HASH} = e.{EXAMPLE_HASH} AND t.example_id = e.example_id"
    return f"EXISTS (SELECT 1 FROM {table} t WHERE {same})"  # noqa: S608 - our own names
