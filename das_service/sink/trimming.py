"""Freeing the logs: what is durable in a table, and that no FM still has to read, leaves its log.

Nobody else deletes. The positions are those of the durable mark, so trimming by a process that lost its role is
harmless. An FM that is not required and falls behind its bound leaves the examples log; rescore.py feeds it later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import redis

from das_service.logs.records import DATASET_LOGS, EXAMPLES, fm_logs, rescore_log
from das_service.logs.streams import LogCounters, read_groups, trim_log
from das_service.registry import FmRecord
from schemas import keys
from schemas.entries import Position

Positions = Mapping[int, Position | None]


@dataclass(slots=True)
class Trimmer:
    """Trims the logs of one dataset; remembers what there is nothing more to do about."""

    client: redis.Redis
    dataset: str
    _done: dict[tuple[int, str], Position] = field(default_factory=dict)
    holders: dict[int, str] = field(default_factory=dict)

    def trim(self, kind: str, positions: Positions, *, groups: Sequence[str] = ()) -> None:
        """Free the entries of a log up to the durable positions that all groups have finished.

        groups: those that must exist; any other that the log has is waited for as well, so that an FM which was
        declared a moment ago misses nothing. The positions are older than the look at the groups: a group that comes
        after it starts behind them. For the examples log, `holders` then says which group holds up which partition.
        """
        due = {p: at for p, at in positions.items() if at is not None and self._done.get((p, kind)) != at}
        if not due:
            return
        present = read_groups(self.client, self.dataset, sorted(due), kind)
        for partition, position in due.items():
            needed = sorted({*groups, *present.get(partition, {})})
            _, holder = trim_log(
                self.client, self.dataset, partition, kind, committed=position, groups=needed
            )  # fmt: skip
            if holder:
                self._done.pop((partition, kind), None)
            else:
                self._done[partition, kind] = position
            if kind == EXAMPLES:
                self.holders[partition] = holder

    def trim_rescore(self, fm: str, counters: Mapping[tuple[int, str], LogCounters]) -> None:
        """Free what an FM has finished of its rescore log; no table is made of it."""
        kind = rescore_log(fm)
        ends = {
            partition: Position(epoch=found.epoch, seq=found.last)
            for (partition, name), found in counters.items()
            if name == kind
        }
        self.trim(kind, ends, groups=[keys.group(fm)])

    def leavers(
        self, fms: Mapping[str, FmRecord], counters: Mapping[tuple[int, str], LogCounters], *, catch_up_bytes: int
    ) -> list[str]:
        """Give the optional FMs that hold more of the examples log than they may, by the last trim."""
        held: dict[str, int] = {}
        for partition, holder in self.holders.items():
            found = counters.get((partition, EXAMPLES))
            if holder and found is not None:
                held[holder] = held.get(holder, 0) + found.kept_bytes
        return [
            fm
            for fm, record in fms.items()
            if not record.required and held.get(keys.group(fm), 0) > catch_up_bytes
        ]  # fmt: skip


def kinds_of(fms: Mapping[str, FmRecord]) -> list[str]:
    """Give the kinds of all logs of a dataset with these FMs."""
    return [*DATASET_LOGS, *(kind for fm in fms for kind in fm_logs(fm))]
