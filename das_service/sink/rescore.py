"""Examples that an FM gets by its rescore log: those it skipped when it left the examples log, lost and failed ones.

They are read from the `examples` table and appended in the format that they came in with. What is still to be fed is
the plan (rescore_plan.py), which shrinks after each append, so that a crash feeds an example twice rather than never;
the sink drops a second supervision row. The sink feeds while the log has room. Lost examples that have a score in the
online store are not scored again: it is published as it stands (online_scores.py).
"""

import datetime as dt
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import redis

from das_service.errors import UnavailableError
from das_service.folder import Folder
from das_service.ingest import encode_chunks
from das_service.logs.backlog import Reader, read_ranges, read_unfinished
from das_service.logs.records import EXAMPLES, rescore_log, scored_log
from das_service.logs.streams import AppendLimits, Chunk, append_chunks, read_counters, show_planned
from das_service.redis_client import run_script
from das_service.registry import Catalog, read_catalog
from das_service.settings import MIB
from das_service.sink.identity import Known
from das_service.sink.online_scores import scores_in_store
from das_service.sink.rescore_plan import (
    Gap,
    Int64s,
    Loss,
    LostDay,
    Plan,
    add_rows,
    count_by_partition,
    files_between,
    in_gaps,
    is_lost,
    plan_name,
    plan_with_loss,
    read_loss,
    read_plan,
    with_counted_slice,
    with_fed_gaps,
    with_fed_slice,
    with_gaps,
    write_plan,
)
from das_service.sink.table_rows import example_chunk
from das_service.tables.duck import Duck, quoted_path
from das_service.tables.offline_store import OUTCOME, TableReader, table_place
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.entries import Position, parse_position
from schemas.tables import EXAMPLE_HASH, dead_letters_table, supervision_table

RESCORE_BYTES = 256 * MIB
_START_FORMAT = 1
_ANY_BYTES = 1 << 40
_BATCH_ROWS = 20_000
_MOST_POSITIONS = 16
_SLICE = f"({EXAMPLE_HASH} & $mask) = $slice"
_OUTCOMES = f"SELECT example_id, {EXAMPLE_HASH} FROM {{source}} WHERE {_SLICE}"  # noqa: S608 - our own names
_NONE = f"SELECT NULL::VARCHAR AS example_id, NULL::BIGINT AS {EXAMPLE_HASH} LIMIT 0"


def keep_starts(client: redis.Redis, folder: Folder, dataset: str, partitions: int, fm: str) -> dict[int, Position]:
    """Give where an FM began in the examples log, and keep it beside the tables: a lost server does not know it."""
    name = f"{dataset}/_das/start.{fm}.json"
    data = folder.read(name)
    if data is not None:
        return {int(p): parse_position(entry_id) for p, entry_id in json.loads(data)["start"].items()}
    pipeline = client.pipeline(transaction=False)
    for partition in range(partitions):
        pipeline.hget(keys.counters(dataset, partition), f"start:{fm}:{EXAMPLES}")
    starts = {p: parse_position(entry_id) for p, entry_id in enumerate(pipeline.execute()) if entry_id is not None}
    if len(starts) == partitions:
        record = {"format": _START_FORMAT, "start": {str(p): at.entry_id for p, at in starts.items()}}
        folder.write(name, json.dumps(record).encode())
    return starts


def leave_log(
    client: redis.Redis, folder: Folder, dataset: str, fm: str, positions: Mapping[int, Position | None]
) -> list[Gap]:
    """Take an FM past all that the examples table has, and write down what it thereby skips; give that.

    The gaps are durable before the group moves, so that a crash in between feeds examples twice, never not at all.
    """
    group, reached = keys.group(fm), {partition: at for partition, at in positions.items() if at is not None}
    gaps, rows = [], [0] * len(positions)
    for partition, at in reached.items():
        ranges = read_ranges(client, dataset, partition, EXAMPLES, group, last=at.number) or []
        gaps += [Gap(partition=partition, first=first, last=last) for first, last in ranges]
        asked = Reader(partition=partition, kind=EXAMPLES, group=group, up_to=at)
        rows[partition] = read_unfinished(client, dataset, [asked])[0].rows
    if gaps:
        plan = with_gaps(read_plan(folder, dataset, fm), gaps, rows)
        save_plan(client, folder, dataset, fm, plan, partitions=len(positions))
    for partition in sorted({gap.partition for gap in gaps}):
        at = reached[partition]
        run_script(client, "leave", [keys.log(dataset, partition, EXAMPLES)], [group, at.epoch, at.seq])
    return gaps


def save_plan(
    client: redis.Redis, folder: Folder, dataset: str, fm: str, plan: Plan, *, partitions: int
) -> None:  # fmt: skip
    """Record durably what an FM has still to be fed, and then show it."""
    write_plan(folder, dataset, fm, plan)
    show_planned(client, dataset, fm, plan.rows_by_partition(partitions))


class Rescorer:
    """Feeds the FMs of one dataset from its examples table. One thread, which owns the plans."""

    def __init__(
        self, client: redis.Redis, folder: Folder, duck: Duck, *, dataset: str, spec: DatasetSpec, epoch: int
    ) -> None:
        self._client = client
        self._folder = folder
        self._duck = duck
        self._dataset = dataset
        self._spec = spec
        self._epoch = epoch
        self._examples = TableReader(table_place(folder, dataset, EXAMPLES))
        self._losses: dict[str, Loss | None] = {}
        self._shown: set[str] = set()

    def has_room(self, fm: str) -> bool:
        """Give whether the logs that an FM is fed by are short enough."""
        kinds = [rescore_log(fm), scored_log(fm)]
        found = read_counters(self._client, self._dataset, range(self._spec.partitions), kinds)
        return sum(counters.kept_bytes for counters in found.values()) < RESCORE_BYTES

    def feed(self, fm: str) -> int | None:
        """Append the next part of what an FM has to be fed; give how many examples that were, None when all is done.

        A part is a few log positions, or a slice of a day that is counted or fed; all days are counted first. The
        caller sees to it that the logs have room, and that what survived a loss is in the tables. A plan that another
        sink has changed meanwhile, which took this one for dead, is left to it: None too.
        """
        plan, loss = read_plan(self._folder, self._dataset, fm), self._loss(fm)
        is_new = loss is not None and loss.epoch > plan.epoch
        if plan.is_done and not is_new:
            self._show(fm, plan)
            return None
        self._examples.refresh()
        num_rows, left = self._next_part(fm, plan, loss)
        if read_plan(self._folder, self._dataset, fm) != plan:
            return None
        save_plan(self._client, self._folder, self._dataset, fm, left, partitions=self._spec.partitions)
        return num_rows

    def _next_part(self, fm: str, plan: Plan, loss: Loss | None) -> tuple[int, Plan]:
        """Do the next part of a plan; give how many examples were fed, and what is left."""
        if loss is not None and loss.epoch > plan.epoch:
            return 0, plan_with_loss(plan, loss, self._examples.days)
        uncounted = next((lost for lost in plan.days if not lost.is_counted), None)
        if loss is not None and uncounted is not None:
            return 0, with_counted_slice(plan, self._count_slice(fm, uncounted, loss))
        if plan.gaps:
            return self._feed_gaps(fm, plan)
        if loss is None:
            raise ValueError(f"{plan_name(self._dataset, fm)} names event days, and no recovery said of which rows")
        return self._feed_slice(fm, plan, loss)

    def _loss(self, fm: str) -> Loss | None:
        """Give what the last recovery says, None if there was none.

        Raises:
            UnavailableError: A recovery is under way: what it writes down is not to be used yet.
        """
        if self._epoch > 1 and fm not in self._losses:
            self._losses[fm] = read_loss(self._folder, self._dataset, fm)
        loss = self._losses.get(fm)
        if loss is not None and loss.epoch > self._epoch:
            raise UnavailableError(f"`das recover` is at work on dataset {self._dataset}", code="log_rewound")
        return loss

    def _show(self, fm: str, plan: Plan) -> None:
        """Show a plan, once: who wrote it may have died before."""
        if fm not in self._shown:
            show_planned(self._client, self._dataset, fm, plan.rows_by_partition(self._spec.partitions))
            self._shown.add(fm)

    def replay_dead_letters(self, fm: str, *, example_ids: Collection[str] | None = None) -> int:
        """Append the examples (these ids, default all) that an FM failed on and has not scored since; give how many.

        A score that only the online store has is appended as it stands: a worker would not score such an example again.

        Raises:
            OverloadedError: The rescore log is full; what was appended stays.
        """
        self._examples.refresh()
        dead, scored = self._reader(dead_letters_table(fm)), self._reader(supervision_table(fm))
        wanted = None if example_ids is None else pa.array(sorted(example_ids), pa.string())
        condition = f"{_exists('dead')} AND NOT {_exists('scored')}"
        num_rows, catalog = 0, read_catalog(self._client)
        for day in sorted(dead.days):
            sources = {"dead": _of_day(dead, day), "scored": _of_day(scored, day)}
            examples, values = _of_day(self._examples, day), {"mask": 0, "slice": 0}
            for rows in self._iter_rows(examples, condition, values=values, sources=sources):
                chosen = rows if wanted is None else rows.filter(pc.is_in(rows["example_id"], wanted))
                self._append_unscored(fm, chosen, catalog, max_bytes=RESCORE_BYTES)
                num_rows += chosen.num_rows
        return num_rows

    def _feed_gaps(self, fm: str, plan: Plan) -> tuple[int, Plan]:
        """Feed the lowest positions of all gaps at once: entries of one position lie side by side in the table."""
        first = self._next_position(min(gap.first for gap in plan.gaps))
        if first is None:
            return 0, replace(plan, gaps=(), gap_rows=())
        last = first + max(1, _MOST_POSITIONS // self._spec.partitions) - 1
        condition = "e.log_position BETWEEN $first AND $last"
        values = {"first": first, "last": last}
        fed = [0] * self._spec.partitions
        for rows in self._iter_rows(self._rows_between(first, last), condition, values=values):
            partitions = self._partitions(rows)
            inside = in_gaps(rows["log_position"].to_numpy(), partitions, plan.gaps)
            self._append_examples(fm, rows.filter(pa.array(inside)))
            fed = add_rows(fed, count_by_partition(partitions[inside], len(fed)))
        return sum(fed), with_fed_gaps(plan, last, fed)

    def _next_position(self, first: int) -> int | None:
        """Give the lowest log position in the table from `first` on, None past its end: epochs lie far apart."""
        condition, found = "e.log_position >= $first", None
        for rows in self._iter_rows(
            self._rows_between(first, None), condition, values={"first": first}, columns="min(e.log_position) AS first"
        ):
            found = rows["first"][0].as_py()
        return found

    def _rows_between(self, first: int, last: int | None) -> Known:
        each = (file for files in self._examples.days.values() for file in files_between(files, first, last))
        return self._examples.rows_of(each)

    def _count_slice(self, fm: str, lost: LostDay, loss: Loss) -> list[int]:
        """Give how many rows of the next slice of an event day are lost, by partition."""
        rows = [0] * self._spec.partitions
        for found in self._iter_lost(fm, lost, loss, columns="e.example_id, e.log_position"):
            rows = add_rows(rows, count_by_partition(self._partitions(found), len(rows)))
        return rows

    def _feed_slice(self, fm: str, plan: Plan, loss: Loss) -> tuple[int, Plan]:
        """Feed what the next slice of the first day lacks: scores that stand online as they are, the rest to score."""
        fed, catalog = [0] * self._spec.partitions, read_catalog(self._client)
        for rows in self._iter_lost(fm, plan.days[0], loss, columns="e.*"):
            self._append_unscored(fm, rows, catalog)
            fed = add_rows(fed, count_by_partition(self._partitions(rows), len(fed)))
        return sum(fed), with_fed_slice(plan, fed)

    def _iter_lost(self, fm: str, lost: LostDay, loss: Loss, *, columns: str) -> Iterator[pa.Table]:
        """Give what the next slice of a day lacks: rows that the loss is about and that have no outcome in a table."""
        dead, scored = self._reader(dead_letters_table(fm)), self._reader(supervision_table(fm))
        condition = (
            f"{_SLICE} AND e.log_position BETWEEN $first AND $last "
            f"AND NOT {_exists('dead')} AND NOT {_exists('scored')}"
        )
        values = {
            "mask": lost.num_slices - 1, "slice": lost.next_slice, "first": loss.first, "last": loss.last,
        }  # fmt: skip
        sources = {"dead": _of_day(dead, lost.day), "scored": _of_day(scored, lost.day)}
        files = files_between(self._examples.days.get(lost.day, []), loss.first, loss.last)
        examples = self._examples.rows_of(files)
        for rows in self._iter_rows(examples, condition, values=values, sources=sources, columns=columns):
            inside = is_lost(rows["log_position"].to_numpy(), self._partitions(rows), loss.reaches)
            yield rows.filter(pa.array(inside))

    def _reader(self, table: str) -> TableReader:
        reader = TableReader(table_place(self._folder, self._dataset, table))
        reader.refresh()
        return reader

    def _iter_rows(
        self,
        examples: Known,
        condition: str,
        *,
        values: Mapping[str, int],
        sources: Mapping[str, Known] | None = None,
        columns: str = "e.*",
    ) -> Iterator[pa.Table]:
        """Give the rows of examples files that fulfil a condition, some thousands at a time.

        sources: files of the tables that the condition names, of which the slice of `values` is read; a table without
        files is empty.
        """
        if not _has_files(examples):
            return
        with self._duck.cursor() as cursor:
            named = {
                name: _OUTCOMES.format(source=_source(cursor, name, files)) if _has_files(files) else _NONE
                for name, files in (sources or {}).items()
            }
            known = f"WITH {', '.join(f'{name} AS ({query})' for name, query in named.items())} " if named else ""
            query = f"{known}SELECT {columns} FROM {_source(cursor, 'examples', examples)} e WHERE {condition}"  # noqa: S608 - our own names
            for batch in cursor.sql(query, params=dict(values)).to_arrow_reader(_BATCH_ROWS):
                yield pa.Table.from_batches([batch])

    def _partitions(self, rows: pa.Table) -> Int64s:
        return keys.partitions_of(keys.digest_array(rows["example_id"].combine_chunks()), self._spec.partitions)

    def _append_unscored(self, fm: str, rows: pa.Table, catalog: Catalog, *, max_bytes: int = _ANY_BYTES) -> None:
        """Append rows of the examples table that lack supervision: scores that stand online, the rest to be scored."""
        is_scored, chunks = scores_in_store(self._client, catalog, self._dataset, fm, rows)
        self._append(chunks, max_bytes=max_bytes)
        self._append_examples(fm, rows.filter(pa.array(~is_scored)), max_bytes=max_bytes)

    def _append_examples(self, fm: str, rows: pa.Table, *, max_bytes: int = _ANY_BYTES) -> None:
        """Append rows of the examples table to the rescore log."""
        if rows.num_rows:
            chunks = encode_chunks(self._dataset, self._spec, example_chunk(rows, self._spec))
            self._append([replace(chunk, kind=rescore_log(fm)) for chunk in chunks], max_bytes=max_bytes)

    def _append(self, chunks: Sequence[Chunk], *, max_bytes: int = _ANY_BYTES) -> None:
        limits = AppendLimits(epoch=self._epoch, floors={}, max_bytes=max_bytes, dedup_seconds=1)
        append_chunks(self._client, chunks, limits)


def _of_day(reader: TableReader, day: dt.date) -> Known:
    return reader.rows_of(file for file in reader.days.get(day, []) if file.kind == OUTCOME)


def _has_files(files: Known) -> bool:
    return isinstance(files, pads.Dataset) or bool(files)


def _source(cursor: duckdb.DuckDBPyConnection, name: str, files: Known) -> str:
    """Give what a query reads these files from."""
    if isinstance(files, pads.Dataset):
        cursor.register(f"{name}_files", files)
        return f"{name}_files"
    return f"read_parquet([{', '.join(map(quoted_path, files))}], union_by_name = true)"


def _exists(table: str) -> str:
    same = f"t.{EXAMPLE_HASH} = e.{EXAMPLE_HASH} AND t.example_id = e.example_id"
    return f"EXISTS (SELECT 1 FROM {table} t WHERE {same})"  # noqa: S608 - our own names
