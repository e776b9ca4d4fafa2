"""Examples that an FM gets by its rescore log: those it skipped when it left the examples log, lost and failed ones.

They are read from the `examples` table and appended in the format that they came in with. What is still to be fed lies
beside the tables (`_das/rescore.<fm>.json`, fsynced) and shrinks after each append, so that a crash feeds an example
twice rather than never; the sink drops a second supervision row. The sink feeds while the rescore log has room.
"""

import datetime as dt
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import redis
from numpy.typing import NDArray

from das_service.folder import Folder
from das_service.ingest import encode_chunks
from das_service.logs.records import EXAMPLES, rescore_log
from das_service.logs.streams import AppendLimits, append_chunks, read_counters, read_groups
from das_service.redis_client import run_script
from das_service.settings import MIB
from das_service.sink.table_rows import example_chunk
from das_service.tables.duck import Duck
from das_service.tables.offline_store import DataFile, TableReader, table_place
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.entries import Position, parse_position
from schemas.tables import EXAMPLE_HASH, dead_letters_table, supervision_table

RESCORE_BYTES = 256 * MIB
_FORMAT = 1
_ANY_BYTES = 1 << 40
_BATCH_ROWS = 20_000
_MOST_POSITIONS = 16
Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Entries of the examples log that an FM did not get there: log positions (numbers), both inclusive."""

    partition: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LostDay:
    """An event day on which supervision may be missing: what is neither scored nor dead-lettered is to be fed.

    The day is worked off in slices of the hash space; their number is a power of two.
    """

    day: dt.date
    num_slices: int
    next_slice: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What of one partition of `examples` lost days are about: log positions in [start, end), less those in the log.

    start: where the FM began; end: where the epoch after the loss begins. pending: first and last position, inclusive,
    that the FM still gets by the examples log.
    """

    start: int
    end: int
    pending: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What an FM has still to be fed. reaches: by partition, for the days."""

    gaps: tuple[Gap, ...] = ()
    days: tuple[LostDay, ...] = ()
    reaches: tuple[Reach, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to feed."""
        return not self.gaps and not self.days


def plan_name(dataset: str, fm: str) -> str:
    """Give the name of the file that holds an FM's plan."""
    return f"{dataset}/_das/rescore.{fm}.json"


def read_plan(folder: Folder, dataset: str, fm: str) -> Plan:
    """Give what an FM has still to be fed."""
    data = folder.read(plan_name(dataset, fm))
    if data is None:
        return Plan()
    record = json.loads(data)
    return Plan(
        gaps=tuple(Gap(**gap) for gap in record["gaps"]),
        days=tuple(LostDay(**{**lost, "day": dt.date.fromisoformat(lost["day"])}) for lost in record["days"]),
        reaches=tuple(
            Reach(
                start=reach["start"],
                end=reach["end"],
                pending=None if reach["pending"] is None else (*reach["pending"],),
            )
            for reach in record["reaches"]
        ),
    )


def write_plan(folder: Folder, dataset: str, fm: str, plan: Plan) -> None:
    """Record durably what an FM has still to be fed."""
    record = {
        "format": _FORMAT,
        "gaps": [asdict(gap) for gap in merge_gaps(plan.gaps)],
        "days": [{**asdict(lost), "day": lost.day.isoformat()} for lost in plan.days],
        "reaches": [asdict(reach) for reach in plan.reaches],
    }
    folder.write(plan_name(dataset, fm), json.dumps(record).encode())


def merge_gaps(gaps: Sequence[Gap]) -> list[Gap]:
    """Give the same positions as gaps that neither overlap nor touch, by partition and position."""
    merged: list[Gap] = []
    for gap in sorted(gaps, key=lambda g: (g.partition, g.first)):
        before = merged[-1] if merged else None
        if before is not None and before.partition == gap.partition and gap.first <= before.last + 1:
            merged[-1] = replace(before, last=max(before.last, gap.last))
        else:
            merged.append(gap)
    return merged


def first_needed(client: redis.Redis, dataset: str, partitions: Sequence[int], fm: str) -> dict[int, Position]:
    """Give the first entry of the examples log that an FM has not finished; absent where it has no group."""
    group = keys.group(fm)
    found = {}
    for partition, groups in read_groups(client, dataset, partitions, EXAMPLES).items():
        state = groups.get(group)
        if state is None:
            continue
        last = state.last_delivered
        found[partition] = Position(epoch=max(1, last.epoch), seq=last.seq + 1 if last.epoch else 0)
        if state.pending:
            lowest = client.xpending(keys.log(dataset, partition, EXAMPLES), group)["min"]
            found[partition] = parse_position(lowest) if lowest else found[partition]
    return found


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
        record = {"format": _FORMAT, "start": {str(p): at.entry_id for p, at in starts.items()}}
        folder.write(name, json.dumps(record).encode())
    return starts


def leave_log(
    client: redis.Redis, folder: Folder, dataset: str, fm: str, positions: Mapping[int, Position | None]
) -> list[Gap]:
    """Take an FM past all that the examples table has, and write down what it thereby skips; give that.

    The gaps are durable before the group moves, so that a crash in between feeds examples twice, never not at all.
    """
    needed = first_needed(client, dataset, sorted(positions), fm)
    gaps = []
    for partition, position in positions.items():
        first = needed.get(partition)
        if position is not None and first is not None and first.number <= position.number:
            gaps.append(Gap(partition=partition, first=first.number, last=position.number))
    if gaps:
        plan = read_plan(folder, dataset, fm)
        write_plan(folder, dataset, fm, replace(plan, gaps=(*plan.gaps, *gaps)))
    for gap in gaps:
        at = positions[gap.partition]
        if at is not None:
            name = keys.log(dataset, gap.partition, EXAMPLES)
            run_script(client, "leave", [name], [keys.group(fm), at.epoch, at.seq])
    return gaps


class Rescorer:
    """Feeds the FMs of one dataset from its examples table. One thread."""

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

    def has_room(self, fm: str) -> bool:
        """Give whether an FM's rescore log is short enough to be fed."""
        kind = rescore_log(fm)
        found = read_counters(self._client, self._dataset, range(self._spec.partitions), [kind])
        return sum(counters.kept_bytes for counters in found.values()) < RESCORE_BYTES

    def feed(self, fm: str) -> int | None:
        """Append the next part of what an FM has to be fed; give how many examples that were, None when all is done.

        A part is a few log positions, or a slice of a day. The caller sees to it that the rescore log has room.
        """
        plan = read_plan(self._folder, self._dataset, fm)
        if plan.is_done:
            return None
        self._examples.refresh()
        num_rows, left = self._feed_gaps(fm, plan) if plan.gaps else self._feed_slice(fm, plan)
        write_plan(self._folder, self._dataset, fm, left)
        return num_rows

    def replay_dead_letters(self, fm: str, *, example_ids: Collection[str] | None = None) -> int:
        """Append the examples (these ids, default all) that an FM failed on and has not scored since; give how many.

        Raises:
            OverloadedError: The rescore log is full; what was appended stays.
        """
        self._examples.refresh()
        dead, scored = self._reader(dead_letters_table(fm)), self._reader(supervision_table(fm))
        wanted = None if example_ids is None else pa.array(sorted(example_ids), pa.string())
        condition = f"{_exists('dead')} AND NOT {_exists('scored')}"
        num_rows = 0
        for day in sorted(dead.days):
            sources = {"dead": dead.files_of_days([day]), "scored": scored.files_of_days([day])}
            for rows in self._iter_rows(self._examples.files_of_days([day]), condition, sources=sources):
                chosen = rows if wanted is None else rows.filter(pc.is_in(rows["example_id"], wanted))
                num_rows += self._append(fm, chosen, max_bytes=RESCORE_BYTES)
        return num_rows

    def _feed_gaps(self, fm: str, plan: Plan) -> tuple[int, Plan]:
        """Feed the lowest positions of all gaps at once: entries of one position lie side by side in the table."""
        first = self._next_position(min(gap.first for gap in plan.gaps))
        if first is None:
            return 0, replace(plan, gaps=())
        last = first + max(1, _MOST_POSITIONS // self._spec.partitions) - 1
        files = self._examples.paths(
            file for files in self._examples.days.values() for file in files if _overlaps(file, first, last)
        )
        condition = "e.log_position BETWEEN $first AND $last"
        num_rows = 0
        for rows in self._iter_rows(files, condition, values={"first": first, "last": last}):
            inside = in_gaps(rows["log_position"].to_numpy(), self._partitions(rows), plan.gaps)
            num_rows += self._append(fm, rows.filter(pa.array(inside)))
        left = [replace(gap, first=max(gap.first, last + 1)) for gap in plan.gaps if gap.last > last]
        return num_rows, replace(plan, gaps=tuple(left))

    def _next_position(self, first: int) -> int | None:
        """Give the lowest log position in the table from `first` on, None past its end: epochs lie far apart."""
        files = self._examples.paths(
            file for files in self._examples.days.values() for file in files if _overlaps(file, first, None)
        )
        if not files:
            return None
        query = "SELECT min(log_position) AS first FROM read_parquet($files) WHERE log_position >= $first"
        with self._duck.cursor() as cursor:
            ((found,),) = cursor.execute(query, {"files": files, "first": first}).fetchall()
        return None if found is None else int(found)

    def _feed_slice(self, fm: str, plan: Plan) -> tuple[int, Plan]:
        """Feed what one slice of a day lacks."""
        lost = plan.days[0]
        dead, scored = self._reader(dead_letters_table(fm)), self._reader(supervision_table(fm))
        condition = f"(e.{EXAMPLE_HASH} & $mask) = $slice AND NOT {_exists('dead')} AND NOT {_exists('scored')}"
        values = {"mask": lost.num_slices - 1, "slice": lost.next_slice}
        sources = {"dead": dead.files_of_days([lost.day]), "scored": scored.files_of_days([lost.day])}
        files = self._examples.files_of_days([lost.day])
        num_rows = 0
        for rows in self._iter_rows(files, condition, values=values, sources=sources):
            inside = is_lost(rows["log_position"].to_numpy(), self._partitions(rows), plan.reaches)
            num_rows += self._append(fm, rows.filter(pa.array(inside)))
        following = replace(lost, next_slice=lost.next_slice + 1)
        left = () if following.next_slice == lost.num_slices else (following,)
        return num_rows, replace(plan, days=(*left, *plan.days[1:]))

    def _reader(self, table: str) -> TableReader:
        reader = TableReader(table_place(self._folder, self._dataset, table))
        reader.refresh()
        return reader

    def _iter_rows(
        self,
        files: Sequence[str],
        condition: str,
        *,
        values: Mapping[str, int] | None = None,
        sources: Mapping[str, Sequence[str]] | None = None,
    ) -> Iterator[pa.Table]:
        """Give the rows of examples files that fulfil a condition, some thousands at a time.

        sources: Parquet files of the tables that the condition names; a table without files is empty.
        """
        if not files:
            return
        named = {name: list(paths) for name, paths in (sources or {}).items() if paths}
        empty = f"SELECT NULL::VARCHAR AS example_id, NULL::BIGINT AS {EXAMPLE_HASH} LIMIT 0"
        tables = [
            f"{name} AS ({f'SELECT example_id, {EXAMPLE_HASH} FROM read_parquet(${name})' if name in named else empty})"  # noqa: S608 - our own names
            for name in sources or {}
        ]
        known = f"WITH {', '.join(tables)} " if tables else ""
        query = f"{known}SELECT e.* FROM read_parquet($files, union_by_name = true) e WHERE {condition}"  # noqa: S608
        with self._duck.cursor() as cursor:
            relation = cursor.sql(query, params={"files": list(files), **named, **(values or {})})
            for batch in relation.to_arrow_reader(_BATCH_ROWS):
                yield pa.Table.from_batches([batch])

    def _partitions(self, rows: pa.Table) -> Int64s:
        return keys.partitions_of(keys.digest_array(rows["example_id"].combine_chunks()), self._spec.partitions)

    def _append(self, fm: str, rows: pa.Table, *, max_bytes: int = _ANY_BYTES) -> int:
        if rows.num_rows == 0:
            return 0
        chunks = encode_chunks(self._dataset, self._spec, example_chunk(rows, self._spec))
        limits = AppendLimits(epoch=self._epoch, floors={}, max_bytes=max_bytes, dedup_seconds=1)
        append_chunks(self._client, [replace(chunk, kind=rescore_log(fm)) for chunk in chunks], limits)
        return rows.num_rows


def in_gaps(positions: Int64s, partitions: Int64s, gaps: Sequence[Gap]) -> NDArray[np.bool_]:
    """Give which rows lie in a gap."""
    inside = np.zeros(len(positions), bool)
    for gap in gaps:
        inside |= (partitions == gap.partition) & (positions >= gap.first) & (positions <= gap.last)
    return inside


def is_lost(positions: Int64s, partitions: Int64s, reaches: Sequence[Reach]) -> NDArray[np.bool_]:
    """Give which rows no log brings to the FM any more."""
    lost = np.zeros(len(positions), bool)
    for partition, reach in enumerate(reaches):
        inside = (positions >= reach.start) & (positions < reach.end)
        if reach.pending is not None:
            inside &= (positions < reach.pending[0]) | (positions > reach.pending[1])
        lost |= (partitions == partition) & inside
    return lost


def _exists(table: str) -> str:
    same = f"t.{EXAMPLE_HASH} = e.{EXAMPLE_HASH} AND t.example_id = e.example_id"
    return f"EXISTS (SELECT 1 FROM {table} t WHERE {same})"  # noqa: S608 - our own names


def _overlaps(file: DataFile, first: int, last: int | None) -> bool:
    if file.first_position is None or file.last_position is None:
        return True
    return file.last_position >= first and (last is None or file.first_position <= last)
