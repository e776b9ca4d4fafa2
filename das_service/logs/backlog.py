"""How much lies in the logs, and who has not worked it off: what admission, gauges and status are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import redis

from das_service.logs.log_guard import Floor
from das_service.logs.records import EXAMPLES, fm_logs, rescore_log
from das_service.logs.streams import LogCounters, read_counters, read_groups
from das_service.redis_client import ScriptCall, run_scripts, script
from das_service.registry import Catalog
from schemas import keys

SINK = "sink"


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
    return (EXAMPLES, *[kind for fm in catalog.fms.get(dataset, {}) for kind in fm_logs(fm)])


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
        unfinished[EXAMPLES, SINK] = sum(
            max(0, counters[p, EXAMPLES].last - floor.committed.get(p, -1))
            for p in partitions
            if (p, EXAMPLES) in counters
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
            at = state.last_delivered
            delivered = at.seq if at.epoch == counted.epoch else -1
            number = max(0, counted.last - delivered) + state.pending
            unfinished[kind, group] = unfinished.get((kind, group), 0) + number
    return unfinished


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
