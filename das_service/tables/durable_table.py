"""A Delta table that one process owns: rows and log positions in one commit, on disk before anybody relies on them.

The rule that makes rows enter once: positions are read from the loaded table object, the log is read strictly after
them, and the commit goes through that same object, naming the new positions as app transactions. If anybody else has
committed since, the commit is refused (every commit names `total/rows`). After any error the table is opened again.

On a folder the order is: data files, fsync; commit; fsync of the commit; durable mark, fsync. Only then may the log be
freed. On an object store a PUT is durable, and the mark is written for those who compare positions with the log.
"""

import datetime as dt
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as pads
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from das_service.folder import Folder
from das_service.logs.records import Mark, read_mark, write_mark
from das_service.tables.commit_log import NUM_ACTIONS, fsync_checkpoint, fsync_commits, set_torn_tail_aside
from das_service.tables.offline_store import (
    CHECKPOINT_COMMITS,
    NO_HOOKS,
    OUTCOME,
    DayFiles,
    TablePlace,
    create_table,
    files_by_day,
    known_rows,
    open_table,
    table_place,
    with_added,
    write_files,
)
from schemas.entries import Position
from schemas.tables import EVENT_DAY

log = logging.getLogger("das.offline_store")
TOTALS = ("rows", "duplicates", "conflicting", "mended", "diverted")


class LostOwnershipError(Exception):
    """Somebody else has committed to the table: open it again and read the log from its positions."""


class TableBehindMarkError(Exception):
    """The table has less than its durable mark says: files were removed or an older copy was put in its place."""


class DurableTable:
    """Owns one table of a dataset; one thread. Open it before use, and again after any error."""

    def __init__(
        self,
        folder: Folder,
        dataset: str,
        table: str,
        *,
        schema: pa.Schema,
        partitions: int,
        retention_hours: int,
        numbers: Sequence[str] = (),
    ) -> None:
        """Name the table; nothing is read. numbers: names of what its commits remember besides rows and positions."""
        self.dataset = dataset
        self.table = table
        self.place: TablePlace = table_place(folder, dataset, table)
        self._folder = folder
        self._schema = schema
        self._partitions = partitions
        self._retention_hours = retention_hours
        self._numbers = tuple(numbers)
        self._delta: DeltaTable | None = None
        self._days: DayFiles = {}
        self.state = Mark(version=-1, positions={})

    @property
    def delta(self) -> DeltaTable:
        """The loaded table object, the only one that is written through."""
        if self._delta is None:
            raise LostOwnershipError(f"table {self.table} of dataset {self.dataset} is not open")
        return self._delta

    @property
    def days(self) -> DayFiles:
        """Active files by event day at the version that the next commit builds on."""
        return self._days

    def open(self, *, epoch: int) -> None:
        """Load the table, or make it; set a torn tail aside; make durable what is there.

        Raises:
            TableBehindMarkError: The table lacks what its mark promises.
            LostOwnershipError: The mark knows a later epoch than this process does.
        """
        self._delta = None
        mark = read_mark(self._folder, self.dataset, self.table)
        if mark is not None and mark.epoch > epoch:
            raise LostOwnershipError(f"table {self.table} of dataset {self.dataset} is in epoch {mark.epoch} already")
        if self.place.path is not None:
            marked = -1 if mark is None else mark.version
            set_torn_tail_aside(self.place.path, marked_version=marked, aside=self._aside())
        delta = open_table(self.place)
        if mark is not None and (delta is None or delta.version() < mark.version):
            raise TableBehindMarkError(
                f"table {self.table} of dataset {self.dataset} is at version "
                f"{'none' if delta is None else delta.version()}, its mark at {mark.version}: put its files back"
            )
        delta = delta or create_table(self.place, self._schema, retention_hours=self._retention_hours)
        self._delta = delta
        self._load(_read_state(delta, self.table, self._partitions, epoch, self._numbers))
        if mark is None or mark.version < delta.version():
            self._make_durable(-1 if mark is None else mark.version)
        self._grow()

    def declare(self, schema: pa.Schema) -> None:
        """Say what columns the table shall have; the next open adds those that it lacks."""
        self._schema = schema

    def _grow(self) -> None:
        """Add the columns that the table lacks, in a commit of their own.

        Raises:
            LostOwnershipError: Somebody else has committed.
        """
        present = pa.schema(self.delta.schema().to_arrow()).names
        missing = [field for field in self._schema if field.name not in present]
        if not missing:
            return
        properties = CommitProperties(app_transactions=[self._fence()])
        with _fenced(self.table, self.dataset):
            self.delta.alter.add_columns(
                Schema.from_arrow(pa.schema(missing)).fields,
                commit_properties=properties,
                post_commithook_properties=NO_HOOKS,
            )
            self.delta.update_incremental()
        self._load(replace(self.state, version=self.delta.version()))
        self._make_durable(self.state.version - 1)

    def known_rows(
        self, event_days: Iterable[dt.date], *, kinds: Collection[str] = (OUTCOME,)
    ) -> Sequence[str] | pads.Dataset:
        """Give what the rows of these event days are read from, at the version that the next commit builds on.

        What was said besides outcomes is left out unless asked for: the owner settles and counts outcomes.
        """
        return known_rows(self.place, self._days, event_days, kinds=kinds)

    def commit(
        self,
        rows: pa.Table,
        moved: Mapping[int, Position],
        *,
        duplicates: int = 0,
        conflicting: int = 0,
        mended: int = 0,
        diverted: int = 0,
        numbers: Mapping[str, int] | None = None,
    ) -> None:
        """Add rows (none: only positions move) and move the positions of the partitions in `moved`, durably.

        duplicates and conflicting: rows of the same entries that were dropped; mended: rows of these whose example has
        the FM's other outcome too; diverted: rows of entries that are passed because the table does not take them; all
        are added to the totals.

        Raises:
            LostOwnershipError: Somebody else has committed; nothing was.
            OSError, deltalake.exceptions.DeltaError: Whether it is committed is unknown until the table is opened.
        """
        before = self.state
        wanted = replace(
            before,
            positions={**before.positions, **moved},
            rows=before.rows + rows.num_rows,
            duplicates=before.duplicates + duplicates,
            conflicting=before.conflicting + conflicting,
            mended=before.mended + mended,
            diverted=before.diverted + diverted,
            numbers={**before.numbers, **(numbers or {})},
        )
        added = write_files(self.place, rows) if rows.num_rows else []
        self._write(added, _transactions(self.table, moved, wanted))
        self.state = replace(wanted, version=self.delta.version())
        self._days = with_added(self._days, added)
        self._make_durable(before.version)

    def replace_files(self, added: Sequence[AddAction], removed: Sequence[RemoveAction]) -> None:
        """Put files in the place of others that hold the same rows, durably.

        Raises:
            LostOwnershipError: Somebody else has committed; nothing was.
        """
        before = self.state.version
        self._write([*added, *removed], [self._fence()])
        self._load(replace(self.state, version=self.delta.version()))
        self._make_durable(before)

    def vacuum(self) -> int:
        """Delete files that were replaced longer ago than the retention; give how many."""
        with _fenced(self.table, self.dataset):
            gone = self.delta.vacuum(
                retention_hours=self._retention_hours, dry_run=False, post_commithook_properties=NO_HOOKS
            )
            self.delta.update_incremental()
        before = self.state.version
        self._load(replace(self.state, version=self.delta.version()))
        self._make_durable(before)
        return len(gone)

    def _aside(self) -> Path:
        root = self._folder.path or Path()
        return root / self.dataset / "_das" / "torn" / self.table.replace("/", ".")

    def _fence(self) -> Transaction:
        return Transaction("total/rows", self.state.rows)

    def _write(self, actions: Sequence[AddAction | RemoveAction], transactions: list[Transaction]) -> None:
        count = len(actions) + len(transactions)
        properties = CommitProperties(custom_metadata={NUM_ACTIONS: str(count)}, app_transactions=transactions)
        with _fenced(self.table, self.dataset):
            self.delta.create_write_transaction(
                list(actions),
                mode="append",
                schema=self.delta.schema(),
                partition_by=[EVENT_DAY],
                commit_properties=properties,
                post_commithook_properties=NO_HOOKS,
            )
            self.delta.update_incremental()
        first = transactions[0]
        written = self.delta.transaction_version(first.app_id)
        if self.delta.version() != self.state.version + 1 or written != first.version:
            raise LostOwnershipError(f"table {self.table} of dataset {self.dataset}: others commit to it too")

    def _load(self, state: Mark) -> None:
        self.state = state
        self._days = files_by_day(self.delta)

    def _make_durable(self, from_version: int) -> None:
        """Put the commits after from_version on disk, then the mark; clean up the log every CHECKPOINT_COMMITS."""
        version = self.state.version
        path = self.place.path
        if path is not None:
            fsync_commits(path, range(from_version + 1, version + 1))
        is_checkpoint = version // CHECKPOINT_COMMITS > from_version // CHECKPOINT_COMMITS and version > 0
        if is_checkpoint:
            self.delta.create_checkpoint()
            if path is not None:
                fsync_checkpoint(path, version)
        mark = read_mark(self._folder, self.dataset, self.table)
        if mark is not None and mark.version > version:  # this process was taken for dead since its commit
            raise LostOwnershipError(f"table {self.table} of dataset {self.dataset}: version {mark.version} is marked")
        write_mark(self._folder, self.dataset, self.table, self.state)
        if is_checkpoint:
            self.delta.cleanup_metadata()
            self._reload(version)

    def _reload(self, version: int) -> None:
        """Load the table from its checkpoint: an object that was loaded before it reads every commit since."""
        delta = open_table(self.place)
        if delta is None or delta.version() != version:
            raise LostOwnershipError(f"table {self.table} of dataset {self.dataset}: others commit to it too")
        self._delta = delta


@contextmanager
def _fenced(table: str, dataset: str) -> Iterator[None]:
    try:
        yield
    except CommitFailedError as error:
        raise LostOwnershipError(f"table {table} of dataset {dataset}: {error}") from error


def _app_id(table: str, partition: int, epoch: int) -> str:
    return f"{table}/{partition}/{epoch}"


def _transactions(table: str, moved: Mapping[int, Position], wanted: Mark) -> list[Transaction]:
    """Give what a commit names: positions, and totals, which stand in every commit and so fence all of them."""
    positions = [Transaction(_app_id(table, partition, at.epoch), at.seq) for partition, at in moved.items()]
    totals = [Transaction(f"total/{name}", getattr(wanted, name)) for name in TOTALS]
    return [*positions, *totals, *(Transaction(f"number/{name}", value) for name, value in wanted.numbers.items())]


def _read_state(delta: DeltaTable, table: str, partitions: int, epoch: int, names: Sequence[str]) -> Mark:
    """Give what the table itself says: per partition the position in the latest epoch that has one."""
    totals = {name: delta.transaction_version(f"total/{name}") or 0 for name in TOTALS}
    positions = {partition: _position(delta, table, partition, epoch) for partition in range(partitions)}
    found = {name: delta.transaction_version(f"number/{name}") for name in names}
    numbers = {name: value for name, value in found.items() if value is not None}
    return Mark(version=delta.version(), positions=positions, numbers=numbers, **totals)


def _position(delta: DeltaTable, table: str, partition: int, epoch: int) -> Position | None:
    for number in range(epoch, 0, -1):
        seq = delta.transaction_version(_app_id(table, partition, number))
        if seq is not None:
            return Position(epoch=number, seq=seq)
    return None
