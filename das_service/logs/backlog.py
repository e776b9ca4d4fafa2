"""How much lies in the logs, and who has not worked it off: what admission, gauges and status are made of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import redis

from das_service.logs.log_guard import Floor
from das_service.logs.records import DATASET_LOGS, EXAMPLES, fm_logs, rescore_log
from das_service.logs.streams import LogCounters, entries_after, follows, read_counters, read_groups
from das_service.redis_client import ScriptCall, run_scripts, script
from das_service.registry import Catalog
from schemas import keys
from schemas.entries import Position, parse_position

SINK = "sink"
_HELD_ENTRIES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetBacklog:
    """A dataset's logs at one moment. unfinished: entries by (kind, reader); readers are fm:<fm> and sink."""

    kept_bytes: Mapping[str, int]
    unfinished: Mapping[tuple[str, str], int]
    oldest_us: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes kept in all logs of the dataset."""
        return sum(self.kept_bytes.values())

    def holder(self) -> str:
        """Give in words who holds up the examples log: whoever has the most entries before it."""
        waiting = {reader: n for (kind, reader), n in self.unfinished.items() if kind == EXAMPLES and n}
        if not waiting:
            return "nobody holds it up: the sink is about to free it"
        most = max(waiting.values())
        last = sorted(reader for reader, n in waiting.items() if n == most)
        who = ["the sink" if reader == SINK else f"FM {reader.removeprefix('fm:')!r}" for reader in last]
        return f"{' and '.join(who)} {'has' if len(who) == 1 else 'have'} {most} entries to finish"


def log_kinds(catalog: Catalog, dataset: str) -> tuple[str, ...]:
    """Give the kinds of logs that a dataset has."""
    return (*DATASET_LOGS, *[kind for fm in catalog.fms.get(dataset, {}) for kind in fm_logs(fm)])


def read_backlog(client: redis.Redis, catalog: Catalog, dataset: str, floor: Floor | None) -> DatasetBacklog:
    """Give how much lies in a dataset's logs now."""
    kinds = log_kinds(catalog, dataset)
    partitions = range(catalog.spec(dataset).partitions)
    counters = read_counters(client, dataset, partitions, kinds)
    kept: dict[str, int] = dict.fromkeys(kinds, 0)
    for (_, kind), counted in counters.items():
        kept[kind] += counted.kept_bytes
    unfinished: dict[tuple[str, str], int] = {}
    if floor is not None:
        for kind in DATASET_LOGS:
            unfinished[kind, SINK] = sum(
                entries_after(floor.positions[kind].get(p), counters[p, kind])
                for p in partitions
                if (p, kind) in counters
            )
    fms = list(catalog.fms.get(dataset, {}))
    for kind in (EXAMPLES, *[rescore_log(fm) for fm in fms]):
        unfinished |= _unfinished_by_group(client, dataset, partitions, kind, counters)
    return DatasetBacklog(kept_bytes=kept, unfinished=unfinished)


def _unfinished_by_group(
    client: redis.Redis,
    dataset: str,
    partitions: range,
    kind: str,
    counters: Mapping[tuple[int, str], LogCounters],
) -> dict[tuple[str, str], int]:
    unfinished: dict[tuple[str, str], int] = {}
    for partition, groups in read_groups(client, dataset, partitions, kind).items():
        counted = counters.get((partition, kind))
        if counted is None:
            continue
        for group, state in groups.items():
            number = entries_after(state.last_delivered, counted) + state.pending
            unfinished[kind, group] = unfinished.get((kind, group), 0) + number
    return unfinished


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Who reads one partition of a log: a group, or without one whoever goes on after a position.

    up_to: the last position that is asked about, default all.
    """

    partition: int
    kind: str
    group: str = ""
    after: Position | None = None
    up_to: Position | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """What a reader has yet to finish. oldest_us: None if nothing.

    follows: the next entry is the one after the reader's position; if not, entries were freed meanwhile, and so the
    position is not the reader's newest.
    """

    entries: int = 0
    rows: int = 0
    num_bytes: int = 0
    oldest_us: int | None = None
    follows: bool = True


def read_unfinished(client: redis.Redis, dataset: str, readers: Sequence[Reader]) -> list[Unfinished]:
    """Give what each reader has yet to finish, asked in their order; nothing where a log is not made yet."""
    calls = [
        ScriptCall(
            script("unfinished"),
            [keys.counters(dataset, reader.partition), keys.log(dataset, reader.partition, reader.kind)],
            [
                reader.kind,
                reader.group,
                reader.after.entry_id if reader.after else "",
                reader.up_to.entry_id if reader.up_to else "+",
            ],
        )
        for reader in readers
    ]
    found = []
    for reader, reply in zip(readers, run_scripts(client, calls) if calls else [], strict=True):
        if isinstance(reply, redis.exceptions.ResponseError):
            found.append(Unfinished())
            continue
        if isinstance(reply, Exception):
            raise reply
        entries, rows, num_bytes = (int(part) for part in reply[:3])
        taken, following = reply[3:]
        found.append(
            Unfinished(
                entries=entries,
                rows=rows,
                num_bytes=num_bytes,
                oldest_us=int(taken) if taken else None,
                follows=bool(reader.group) or not following or follows(reader.after, parse_position(following)),
            )
        )
    return found


def read_ranges(
    client: redis.Redis, dataset: str, partition: int, kind: str, group: str, *, last: int
) -> list[tuple[int, int]] | None:
    """Give which log positions up to `last` a group has yet to finish: ranges, first and last inclusive, ascending.

    None where there is no such group.
    """
    state = read_groups(client, dataset, [partition], kind).get(partition, {}).get(group)
    if state is None:
        return None
    name, start, held = keys.log(dataset, partition, kind), "-", []
    while entries := client.xpending_range(name, group, start, "+", _HELD_ENTRIES) if state.pending else []:
        held += [parse_position(entry["message_id"]).number for entry in entries]
        start = f"({entries[-1]['message_id'].decode()}"
    ranges = merge_positions(position for position in held if position <= last)
    undelivered = max(0, state.last_delivered.number + 1)
    return [*ranges, (undelivered, last)] if undelivered <= last else ranges


def merge_positions(positions: Iterable[int]) -> list[tuple[int, int]]:
    """Give ascending positions as ranges, first and last inclusive, that do not touch."""
    ranges: list[tuple[int, int]] = []
    for position in positions:
        if ranges and ranges[-1][1] + 1 == position:
            ranges[-1] = (ranges[-1][0], position)
        else:
            ranges.append((position, position))
    return ranges


def sum_unfinished(parts: Iterable[Unfinished]) -> Unfinished:
    """Give what several readers have yet to finish together."""
    each = list(parts)
    times = [part.oldest_us for part in each if part.oldest_us is not None]
    return Unfinished(
        entries=sum(part.entries for part in each),
        rows=sum(part.rows for part in each),
        num_bytes=sum(part.num_bytes for part in each),
        oldest_us=min(times) if times else None,
        follows=all(part.follows for part in each),
    )


def read_oldest(client: redis.Redis, dataset: str, partitions: int, kinds: Sequence[str]) -> dict[str, int]:
    """Give when the oldest kept entry of each kind was taken, in microseconds; kinds without entries are absent."""
    calls = [
        ScriptCall(script("oldest"), [keys.log(dataset, partition, kind)], [])
        for kind in kinds
        for partition in range(partitions)
    ]
    replies = iter(run_scripts(client, calls))
    oldest: dict[str, int] = {}
    for kind in kinds:
        times = [int(reply) for _ in range(partitions) if isinstance(reply := next(replies), bytes) and reply]
        if times:
            oldest[kind] = min(times)
    return oldest
