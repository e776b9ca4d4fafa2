"""An FM's tables as a join finds them when it is made, and what of them counts."""

import datetime as dt
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import duckdb
import numpy as np
import pyarrow.dataset as pads
import redis
from numpy.typing import NDArray

from das_service.folder import Folder
from das_service.logs.records import dead_log, read_mark, scored_log, table_of_log
from das_service.logs.streams import read_counters
from das_service.registry import Catalog, FmRecord
from das_service.supervision.answer import (
    LookupQuery,
    trained_through_by_number,
)
from das_service.supervision.lookup import unfinished_partitions
from das_service.tables.duck import quoted_path
from das_service.tables.offline_store import BACKFILLED, SERVED, TablePlace, TableReader, known_rows, table_place
from schemas.tables import dead_letters_table, supervision_table

Int64s: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What of an FM's tables counts, for joins that must give the same tomorrow.

    num_snapshots: the first so many that were registered. supervision, dead_letters: log positions per partition,
    inclusive. as_of_us: what was available then, None for all; snapshot: the only one that counts, as a shadow too,
    None for all.
    """

    num_snapshots: int
    supervision: Int64s
    dead_letters: Int64s
    as_of_us: int | None = None
    snapshot: str | None = None

    def known(self, record: FmRecord) -> FmRecord:
        """Give the FM's record as it was."""
        outputs = record.outputs if self.num_snapshots else None
        return record.model_copy(update={"snapshots": record.snapshots[: self.num_snapshots], "outputs": outputs})

    def reach(self, partition: Int64s) -> dict[str, Int64s]:
        """Give the last log positions that count, per row."""
        return {"reach": self.supervision[partition], "dead_reach": self.dead_letters[partition]}

    def condition(self, available_at: str) -> str:
        """Give the condition on a table's rows; available_at: its column of that."""
        parts = [f"log_position <= {int(max(self.supervision.max(), self.dead_letters.max()))}"]
        if self.as_of_us is not None:
            parts.append(f"epoch_us({available_at}) <= {self.as_of_us}")
        if self.snapshot is not None:
            parts.append(f"snapshot_id = '{self.snapshot}'")
        return " AND ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class FmTables:
    """One FM's tables at one moment.

    on_the_way: partitions whose rows may be online and not yet in the tables; unfinished: those of them with examples
    that the FM has yet to score. Both were asked before the tables.
    """

    client: redis.Redis | None
    dataset: str
    record: FmRecord
    trained_through_us: Int64s
    supervision: "Table"
    dead_letters: "Table"
    unfinished: frozenset[int]
    on_the_way: frozenset[int]

    @classmethod
    def open(
        cls, folder: Folder, catalog: Catalog, dataset: str, record: FmRecord, client: redis.Redis | None
    ) -> "FmTables":
        """Look at the tables, after the logs were asked."""
        partitions = range(catalog.spec(dataset).partitions)
        unfinished: set[int] = set()
        uncommitted: set[int] = set()
        if client is not None:
            unfinished = unfinished_partitions(client, dataset, record.fm, partitions)
            uncommitted = uncommitted_partitions(client, folder, dataset, record.fm, partitions)
        return cls(
            client=client,
            dataset=dataset,
            record=record,
            trained_through_us=trained_through_by_number(catalog, dataset, record),
            supervision=Table.open(table_place(folder, dataset, supervision_table(record.fm))),
            dead_letters=Table.open(table_place(folder, dataset, dead_letters_table(record.fm))),
            unfinished=frozenset(unfinished),
            on_the_way=frozenset(unfinished | uncommitted),
        )

    def layout(self, query: LookupQuery) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...]]]:
        """Give (name, type, shape of a row) of the values that the query wants."""
        yield "_state", np.dtype(np.uint8), ()
        yield "_snapshot", np.dtype(np.int32), ()
        yield "_event_time", np.dtype(np.int64), ()
        yield "_scored_at", np.dtype(np.int64), ()
        if self.record.outputs is None:
            return
        for task in self.record.outputs.tasks:
            if query.wants(task):
                yield f"{task}__logit", np.dtype(np.float32), ()
        for name, width in self.record.outputs.widths().items():
            if query.wants(name):
                yield name, np.dtype(np.uint8), (width,)


@dataclass(frozen=True, slots=True)
class Table:
    """A table as it was when it was opened."""

    place: TablePlace
    reader: TableReader

    @classmethod
    def open(cls, place: TablePlace) -> "Table":
        """Read the table's log up to now."""
        reader = TableReader(place)
        reader.refresh()
        return cls(place, reader)

    def source(
        self, cursor: duckdb.DuckDBPyConnection, event_days: Sequence[dt.date], *, kinds: Collection[str] = SERVED
    ) -> str | None:
        """Give what a query reads these event days from, None where the table has nothing of them."""
        rows = known_rows(self.place, self.reader.days, event_days, kinds=kinds)
        if isinstance(rows, pads.Dataset):
            cursor.register("stored", rows)
            return "stored"
        if not rows:
            return None
        return f"read_parquet([{', '.join(map(quoted_path, rows))}], hive_partitioning = false)"

    def has_backfilled(self, event_days: Iterable[dt.date]) -> bool:
        """Give whether a backfill said something of these event days."""
        return any(file.kind == BACKFILLED for day in event_days for file in self.reader.days.get(day, []))


def uncommitted_partitions(
    client: redis.Redis, folder: Folder, dataset: str, fm: str, partitions: Sequence[int]
) -> set[int]:
    """Give the partitions in which an FM's outcomes lie in its logs and not yet in its tables."""
    found = set()
    kinds = (scored_log(fm), dead_log(fm))
    counters = read_counters(client, dataset, partitions, kinds)
    for kind in kinds:
        table = table_of_log(kind)
        mark = None if table is None else read_mark(folder, dataset, table)
        for partition in partitions:
            counted = counters.get((partition, kind))
            if counted is None or counted.last < 0:
                continue
            at = None if mark is None else mark.positions.get(partition)
            if at is None or (at.epoch, at.seq) < (counted.epoch, counted.last):
                found.add(partition)
    return found
