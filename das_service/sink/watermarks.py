"""Watermarks: up to which event time no more examples are expected, partition by partition.

A partition's watermark is the latest event_time that its log brought, less the dataset's allowed lateness. The commit
that brings the rows remembers that time, so that a restart knows it. A partition that gets nothing follows the others;
when none gets anything, event time runs on with the clock, so that the last examples of a stream close too. It never
moves back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from schemas.entries import Entry

IDLE_SECONDS = 5.0
IS_LATE = "is_late"


def latest_name(partition: int) -> str:
    """Name under which `examples` remembers the latest event_time of a partition, in microseconds."""
    return f"latest_event_time/{partition}"


def mark_late(
    rows: pa.Table, taken: Sequence[tuple[int, Entry]], numbers: Mapping[str, int], *, lateness_us: int
) -> tuple[pa.Table, dict[str, int]]:
    """Give the rows with is_late set, and the latest event_time of each partition by name.

    rows: of the entries, in their order. A row is late if its event_time lies before the watermark that the entries
    before its own had made.
    """
    times = rows["event_time"].cast(pa.int64()).to_numpy()
    late = np.zeros(len(times), np.bool_)
    latest: dict[str, int] = {}
    start = 0
    for partition, entry in taken:
        name, part = latest_name(partition), times[start : start + entry.num_rows]
        seen = latest.get(name, numbers.get(name))
        if seen is not None:
            late[start : start + entry.num_rows] = part < seen - lateness_us
        newest = int(part.max()) if len(part) else seen
        if newest is not None:
            latest[name] = newest if seen is None else max(seen, newest)
        start += entry.num_rows
    place = rows.column_names.index(IS_LATE)
    return rows.set_column(place, rows.schema.field(place), pa.array(late)), latest


@dataclass(slots=True)
class Watermarks:
    """The watermarks of a dataset, as its sink sees them. Microseconds; monotonic seconds for `now`."""

    reached: dict[int, int] = field(default_factory=dict)
    _latest: dict[int, int | None] = field(default_factory=dict)
    _moved_at: dict[int, float] = field(default_factory=dict)
    _quiet_before_us: int | None = None

    def look(
        self, latest: Mapping[int, int | None], waiting: Mapping[int, int], *, lateness_us: int, now: float
    ) -> Mapping[int, int]:
        """Give the watermark of each partition that has one.

        latest: event_time per partition, None before the first row; waiting: entries that its log holds uncommitted.
        """
        for partition, time in latest.items():
            if waiting.get(partition, 0) or self._latest.get(partition, -1) != time:
                self._moved_at[partition] = now
                if partition in self._latest:
                    self._quiet_before_us = 0
            self._latest[partition] = time
        own = {partition: time - lateness_us for partition, time in latest.items() if time is not None}
        if own:
            if self._quiet_before_us is None:  # a restart: for so long nothing had come when `reached` was written down
                self._quiet_before_us = max(0, max(self.reached.values(), default=0) - max(own.values()))
            idle = {partition for partition in latest if now - self._moved_at[partition] >= IDLE_SECONDS}
            others = [own[partition] for partition in own if partition not in idle]
            follow = min(others) if others else max(own.values()) + self._quiet_us(now)
            for partition in latest:
                wanted = max(own.get(partition, follow), follow) if partition in idle else own.get(partition)
                if wanted is not None:
                    self.reached[partition] = max(wanted, self.reached.get(partition, wanted))
        return self.reached

    def _quiet_us(self, now: float) -> int:
        """Give for how long nothing has come at all, less the time after which that counts."""
        here_us = int((now - max(self._moved_at.values()) - IDLE_SECONDS) * 1_000_000)
        return here_us + (self._quiet_before_us or 0)
