"""The logs: Redis Streams, one per dataset, kind and partition; positions, epochs, and agreement with the tables.

What may be lost is decided here. The epoch lives in the server and, fsynced, beside the tables; so do the committed
positions (the sink's durable marks). A server that knows another epoch, lacks a log, or stands behind a committed
position has lost data, and nothing is appended until a human runs `das recover`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from das_service.errors import DasError, DiskReserveError, OverloadedError, UnavailableError
from das_service.folder import Folder
from das_service.logs.records import (
    EXAMPLES,
    LogsFile,
    read_logs_file,
    read_mark,
    rescore_log,
    table_of_log,
    write_logs_file,
)
from das_service.redis_client import Argument, ScriptCall, execute, run_script, run_scripts, script
from schemas import keys
from schemas.entries import Entry, Position, parse_entry, parse_position


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProblem:
    """Why a log can't be trusted: code is log_lost or log_rewound."""

    code: str
    dataset: str
    partition: int
    log: str
    detail: str


def create_logs(
    client: redis.Redis, folder: Folder, dataset: str, *, partitions: int, kinds: Sequence[str]
) -> LogsFile:
    """Make the logs that are not recorded yet, then record them. Safe to repeat and to be cut anywhere.

    Raises:
        DasError: A recorded log is gone (log_lost); this never papers over a loss.
    """
    with folder.locked(f"{dataset}/_das/logs.json"):  # two FMs may be declared at once, and each adds its own
        return _create_logs(client, folder, dataset, partitions=partitions, kinds=kinds)


def _create_logs(
    client: redis.Redis, folder: Folder, dataset: str, *, partitions: int, kinds: Sequence[str]
) -> LogsFile:
    recorded = read_logs_file(folder, dataset)
    known = recorded or LogsFile(epoch=1, partitions=partitions, logs=())
    new = [kind for kind in kinds if kind not in known.logs]
    if not new:
        return known
    if known.logs:
        refuse_problems(check_logs(client, folder, dataset))
    for partition in range(partitions):
        for kind in new:
            names = [keys.counters(dataset, partition), keys.log(dataset, partition, kind)]
            run_script(client, "create_log", names, [kind, known.epoch])
    logs = LogsFile(epoch=known.epoch, partitions=partitions, logs=(*known.logs, *new))
    write_logs_file(folder, dataset, logs)
    return logs


def create_groups(client: redis.Redis, dataset: str, *, partitions: int, fm: str) -> None:
    """Give an FM its consumer groups, generations and recorded start positions, once."""
    for partition in range(partitions):
        for kind, after in ((EXAMPLES, "$"), (rescore_log(fm), "0")):
            names = [
                keys.counters(dataset, partition),
                keys.log(dataset, partition, kind),
                keys.generation(dataset, partition, fm),
            ]
            run_script(client, "create_group", names, [keys.group(fm), fm, kind, after, ""])


def raise_generation(client: redis.Redis, dataset: str, *, partitions: int, fm: str, generation: int) -> None:
    """Let nobody publish for an FM who knows an older generation than the registry's; a later one stays."""
    for partition in range(partitions):
        run_script(client, "raise_generation", [keys.generation(dataset, partition, fm)], [generation])


def check_logs(client: redis.Redis, folder: Folder, dataset: str) -> list[LogProblem]:
    """Compare the server with what is recorded beside the tables; empty when they agree."""
    recorded = read_logs_file(folder, dataset)
    if recorded is None:
        return []
    marks = {
        kind: mark
        for kind in recorded.logs
        if (table := table_of_log(kind)) is not None and (mark := read_mark(folder, dataset, table)) is not None
    }
    pipeline = client.pipeline(transaction=False)
    for partition in range(recorded.partitions):
        pipeline.hmget(keys.counters(dataset, partition), "epoch", *[f"{kind}/last" for kind in recorded.logs])
        for kind in recorded.logs:
            pipeline.exists(keys.log(dataset, partition, kind))
    replies = iter(pipeline.execute())
    problems = []
    for partition in range(recorded.partitions):
        epoch, *last = next(replies)
        for kind, seq in zip(recorded.logs, last, strict=True):
            exists = bool(next(replies))
            floor = marks[kind].positions.get(partition) if kind in marks else None
            found = _compare(recorded.epoch, epoch, seq, floor, exists=exists)
            if found is not None:
                code, detail = found
                problems.append(LogProblem(code=code, dataset=dataset, partition=partition, log=kind, detail=detail))
    return problems


def _compare(
    epoch: int, server_epoch: bytes | None, last: bytes | None, floor: Position | None, *, exists: bool
) -> tuple[str, str] | None:
    if server_epoch is None or last is None or not exists:
        return "log_lost", "the server does not have it"
    if int(server_epoch) != epoch:
        return "log_rewound", f"the server is in epoch {int(server_epoch)}, the tables in {epoch}"
    if floor is not None and floor.epoch > epoch:
        return "log_rewound", f"the server is in epoch {epoch}, the table has {floor.entry_id}"
    if floor is not None and floor.epoch == epoch and int(last) < floor.seq:
        return "log_rewound", f"the server ends at {int(last)}, the table has {floor.seq}"
    return None


def refuse_problems(problems: Sequence[LogProblem]) -> None:
    """Raise for the first problem.

    Raises:
        UnavailableError: log_lost or log_rewound.
    """
    if problems:
        first = problems[0]
        where = f"log {first.log} of dataset {first.dataset}, partition {first.partition}"
        raise UnavailableError(
            f"{where}: {first.detail}. Nothing is accepted until `das recover` was run", code=first.code
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A chunk on its way into a log."""

    dataset: str
    partition: int
    kind: str
    data: bytes | memoryview
    head: Sequence[bytes | str]
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendLimits:
    """What an append is checked against, in the same script that makes it."""

    epoch: int
    floors: Mapping[int, int]
    max_bytes: int
    dedup_seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """Where a chunk lies; repeated: it was already there."""

    position: Position
    repeated: bool


def append_chunks(client: redis.Redis, chunks: Sequence[Chunk], limits: AppendLimits) -> list[Appended]:
    """Append each chunk once and give where it lies, after the server's fsync, in one round trip.

    Raises:
        DasError: A chunk was refused; others may have been appended, and a retry finds them.
    """
    calls = []
    for chunk in chunks:
        names: list[str | bytes] = [
            keys.counters(chunk.dataset, chunk.partition),
            keys.log(chunk.dataset, chunk.partition, chunk.kind),
            keys.chunk(chunk.dataset, chunk.partition, chunk.kind, chunk.data),
        ]
        floor = limits.floors.get(chunk.partition, -1)
        args: list[Argument] = [
            chunk.kind,
            limits.epoch,
            floor,
            limits.max_bytes,
            limits.dedup_seconds,
            chunk.data,
            chunk.num_rows,
        ]
        calls.append(ScriptCall(script("append"), names, [*args, *chunk.head]))
    appended = []
    for chunk, reply in zip(chunks, run_scripts(client, calls, at_once=True), strict=True):
        what, detail = _append_reply(reply)
        if what not in {"OK", "SEEN"}:
            raise _append_refusal(what, detail, chunk)
        position = Position(epoch=limits.epoch, seq=int(detail))
        appended.append(Appended(position=position, repeated=what == "SEEN"))
    return appended


def _append_reply(reply: Any) -> tuple[str, str]:  # noqa: ANN401 - what redis-py gives
    if isinstance(reply, redis.exceptions.OutOfMemoryError):
        return "MEMORY", str(reply)
    if isinstance(reply, Exception):
        raise reply
    return reply[0].decode(), reply[1].decode()


def _append_refusal(what: str, detail: str, chunk: Chunk) -> DasError:
    where = f"log {chunk.kind} of dataset {chunk.dataset}, partition {chunk.partition}"
    if what == "BACKLOG":
        return OverloadedError(f"{where} holds {detail} bytes that are not worked off yet")
    if what == "MEMORY":
        return OverloadedError("the online store is at its maxmemory", code="memory", retry_after_seconds=5)
    if what == "DISK":
        return DiskReserveError(detail)
    code = {"LOST": "log_lost"}.get(what, "log_rewound")
    return UnavailableError(
        f"{where} does not agree with the tables ({what.lower()} {detail}): run `das recover`", code=code
    )


def read_after(
    client: redis.Redis, dataset: str, kind: str, after: Mapping[int, Position | None], *, count: int
) -> dict[int, list[Entry]]:
    """Give up to count entries of each partition that lie strictly after its position, oldest first.

    Raises:
        EntryError: One of them can't be read.
    """
    return {
        partition: [parse_entry(entry_id, fields) for entry_id, fields in reply]
        for partition, reply in read_raw_after(client, dataset, kind, after, count=count).items()
    }


def read_raw_after(
    client: redis.Redis, dataset: str, kind: str, after: Mapping[int, Position | None], *, count: int
) -> dict[int, list[tuple[bytes, dict[bytes, bytes]]]]:
    """Give the same entries as they lie in the log, (id, fields), readable or not."""
    partitions = sorted(after)
    pipeline = client.pipeline(transaction=False)
    for partition in partitions:
        at = after[partition]
        start = "-" if at is None else f"({at.entry_id}"
        pipeline.xrange(keys.log(dataset, partition, kind), min=start, max="+", count=count)
    return dict(zip(partitions, pipeline.execute(), strict=True))


def follows(previous: Position | None, position: Position) -> bool:
    """Give whether an entry is the very next one: positions are dense, and a later epoch begins at 0."""
    if previous is None:
        return position.seq == 0
    if position.epoch == previous.epoch:
        return position.seq == previous.seq + 1
    return position.epoch > previous.epoch and position.seq == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogCounters:
    """One partition's counters of one log. last: -1 before the first entry of the epoch.

    older: the last entry of earlier epochs that survived a loss. planned: rows of the examples table that are to be
    fed into this log (a rescore log) and are not in it yet; NOT_COUNTED where that is not known yet.
    """

    epoch: int
    last: int
    rows: int
    bytes: int
    first_rows: int
    first_bytes: int
    repeated_rows: int
    older: Position | None = None
    planned: int = 0

    @property
    def kept_rows(self) -> int:
        """Rows that lie in the log."""
        return self.rows - self.first_rows

    @property
    def kept_bytes(self) -> int:
        """Bytes that lie in the log."""
        return self.bytes - self.first_bytes


_COUNTER_FIELDS = ("last", "rows", "bytes", "first_rows", "first_bytes", "repeated_rows")
_NUM_FIELDS = len(_COUNTER_FIELDS) + 2
NOT_COUNTED = -1


def read_counters(
    client: redis.Redis, dataset: str, partitions: Iterable[int], kinds: Sequence[str]
) -> dict[tuple[int, str], LogCounters]:
    """Give the counters of logs by partition and kind; those of logs that do not exist are absent."""
    numbers = list(partitions)
    pipeline = client.pipeline(transaction=False)
    fields = ["epoch", *[f"{kind}/{field}" for kind in kinds for field in (*_COUNTER_FIELDS, "older", "planned")]]
    for partition in numbers:
        pipeline.hmget(keys.counters(dataset, partition), *fields)
    counters = {}
    for partition, (epoch, *values) in zip(numbers, pipeline.execute(), strict=True):
        for i, kind in enumerate(kinds):
            *part, older, planned = values[i * _NUM_FIELDS : (i + 1) * _NUM_FIELDS]
            if epoch is None or None in part:
                continue
            named = dict(zip(_COUNTER_FIELDS, map(int, part), strict=True))
            counters[partition, kind] = LogCounters(
                epoch=int(epoch), older=parse_position(older) if older else None, planned=int(planned or 0), **named
            )
    return counters


def show_planned(client: redis.Redis, dataset: str, fm: str, rows: Sequence[int]) -> None:
    """Let counters say per partition how many rows an FM has still to be fed: for those who can't wait for a file."""
    for partition, number in enumerate(rows):
        field = f"{rescore_log(fm)}/planned"
        run_script(client, "put_field", [keys.counters(dataset, partition)], [field, number])


def entries_after(place: Position | None, counted: LogCounters) -> int:
    """Give how many entries of a log lie after a place, None for its beginning.

    Exact as long as at most one older epoch survives and, for a place before that, nothing of it was freed; otherwise
    more or fewer of the older ones, never none where there are some.
    """
    if place is not None and place.epoch == counted.epoch:
        return max(0, counted.last - place.seq)
    older, survived = counted.older, 0
    if older is not None and (place is None or place.number < older.number):
        survived = older.seq - place.seq if place is not None and place.epoch == older.epoch else older.seq + 1
    return counted.last + 1 + survived


def trim_log(
    client: redis.Redis, dataset: str, partition: int, kind: str, *, committed: Position, groups: Sequence[str]
) -> tuple[int, str]:
    """Free the entries up to `committed` that all groups have finished; give how many, and who holds the rest."""
    names = [keys.counters(dataset, partition), keys.log(dataset, partition, kind)]
    freed, holder = run_script(client, "trim", names, [kind, committed.epoch, committed.seq + 1, *groups])
    return int(freed), holder.decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupState:
    """How far a consumer group is in one partition: entries delivered and not finished, and the last delivered."""

    pending: int
    last_delivered: Position


def read_groups(
    client: redis.Redis, dataset: str, partitions: Iterable[int], kind: str
) -> dict[int, dict[str, GroupState]]:
    """Give the state of each consumer group of each partition, by the group's name."""
    numbers = list(partitions)
    pipeline = client.pipeline(transaction=False)
    for partition in numbers:
        pipeline.xinfo_groups(keys.log(dataset, partition, kind))
    states: dict[int, dict[str, GroupState]] = {}
    for partition, reply in zip(numbers, execute(pipeline), strict=True):
        if isinstance(reply, redis.exceptions.ResponseError):
            continue
        if isinstance(reply, Exception):
            raise reply
        states[partition] = {
            group["name"].decode(): GroupState(
                pending=group["pending"], last_delivered=parse_position(group["last-delivered-id"])
            )
            for group in reply
        }
    return states
