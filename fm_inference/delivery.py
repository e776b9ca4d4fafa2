"""Entries on their way through one FM's worker: read, taken over from dead peers, and not yet finished.

Every (re)connect reads what this consumer already holds; what is in hand here is not taken twice. A peer is dead when
its beat stands still on our monotonic clock (das_service.beats); its entries are taken over by one script, and
are suspect: one of them may have ended it. So is what this consumer holds when it starts: where DAS_INSTANCE names it,
a former process of that name left it.

An entry that can't be read is counted and passed by: the sink, which meets it too before it may leave the log, keeps it
whole in `dead_chunks` (one of a rescore log is a copy of rows that are in `examples`). One of a later format stays
pending for a worker of that version.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from das_service.beats import Peer
from das_service.logs.records import EXAMPLES, rescore_log
from das_service.redis_client import run_script
from schemas import keys
from schemas.entries import Entry, EntryError, NewerFormatError, parse_entry, parse_position

log = logging.getLogger("das.worker")
_CLAIM_ENTRIES = 16
_MOST_ENTRIES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One entry in this worker's hands. suspect: a process died while it held it, or a model raised on it."""

    partition: int
    kind: str
    entry: Entry
    suspect: bool = False

    @property
    def key(self) -> tuple[int, str, str]:
        """Names the entry in this dataset."""
        return self.partition, self.kind, self.entry.position.entry_id


class Intake:
    """Reads one FM's entries as one consumer. The reader thread owns it; `finished` may be called from another.

    count_unreadable is called for each entry that is passed by because it can't be read.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        dataset: str,
        fm: str,
        partitions: int,
        consumer: str,
        batch_rows: int,
        count_unreadable: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._count_unreadable = count_unreadable
        self._unreadable: set[tuple[str, str]] = set()
        self._group = keys.group(fm)
        self._consumer = consumer
        self._batch_rows = batch_rows
        self._rows_per_entry = float(batch_rows)
        self._streams = {
            keys.log(dataset, partition, kind): (partition, kind)
            for partition in range(partitions)
            for kind in (EXAMPLES, rescore_log(fm))
        }
        self._in_hand: set[tuple[int, str, str]] = set()
        self._lock = threading.Lock()
        self._own_from: dict[str, str] = {}
        self._recheck = threading.Event()
        self._recheck.set()
        self._has_begun = False

    def recheck(self) -> None:
        """Read our own unfinished entries again before new ones: after a lost connection or a refused publish."""
        self._recheck.set()

    def finished(self, deliveries: Iterable[Delivery]) -> None:
        """Let go of entries, published or not."""
        with self._lock:
            self._in_hand.difference_update(delivery.key for delivery in deliveries)

    def pass_by(self, delivery: Delivery) -> None:
        """Let go for good of an entry that can't be read; the next read says so to the server."""
        stream = next(name for name, key in self._streams.items() if key == (delivery.partition, delivery.kind))
        self._unreadable.add((stream, delivery.entry.position.entry_id))
        self.finished([delivery])

    def read(self, *, block_ms: int) -> list[Delivery]:
        """Give what waits, at once; wait up to block_ms when nothing does.

        Raises:
            redis.exceptions.ConnectionError: The server is gone; call recheck() before the next read.
        """
        self._pass_by_unreadable()
        if self._recheck.is_set():
            self._recheck.clear()
            self._own_from = dict.fromkeys(self._streams, "0")
        while self._own_from:  # what is in hand already is passed by, so an empty answer is not yet the end
            own = self._read(self._own_from, block_ms=None, suspect=not self._has_begun)
            if own:
                return own
        self._has_begun = True
        return self._read(dict.fromkeys(self._streams, ">"), block_ms=block_ms)

    def take_over(self, peers: Mapping[str, Peer], *, trust_absence: bool) -> list[Delivery]:
        """Give entries of consumers whose process is dead.

        trust_absence: a consumer that no beat tells of is dead too; false until the observer has watched for a while.
        """
        pipeline = self._client.pipeline(transaction=False)
        for stream in self._streams:
            pipeline.xinfo_consumers(stream, self._group)
        taken: list[Delivery] = []
        for stream, consumers in zip(self._streams, pipeline.execute(), strict=True):
            for consumer in [record["name"].decode() for record in consumers]:
                peer = peers.get(consumer)
                is_dead = trust_absence if peer is None else not peer.alive
                if consumer != self._consumer and is_dead:
                    taken += self._claim(stream, consumer, holding=taken)
        return taken

    def _claim(self, stream: str, dead: str, *, holding: Sequence[Delivery]) -> list[Delivery]:
        """Give what a dead consumer had of a stream; let go of what is held already if the server goes away."""
        try:
            reply = run_script(self._client, "claim", [stream], [self._group, dead, self._consumer, _CLAIM_ENTRIES])
        except redis.exceptions.RedisError:
            self.finished(holding)
            raise
        return self._deliveries(stream, [(entry_id, _pairs(fields)) for entry_id, fields in reply], suspect=True)

    def _pass_by_unreadable(self) -> None:
        """Acknowledge what can't be read, before anything new is in hand."""
        for stream, entry_id in sorted(self._unreadable):
            if self._client.xack(stream, self._group, entry_id):
                self._count_unreadable()
        self._unreadable.clear()

    def _read(self, positions: Mapping[str, str], *, block_ms: int | None, suspect: bool = False) -> list[Delivery]:
        count = int(self._batch_rows / max(self._rows_per_entry, 1.0) / max(len(positions) / 2, 1))
        reply = self._client.xreadgroup(
            self._group, self._consumer, dict(positions), count=min(max(count, 1), _MOST_ENTRIES), block=block_ms
        )
        deliveries: list[Delivery] = []
        for name, pairs in reply or []:
            stream = name.decode()
            deliveries += self._deliveries(stream, pairs, suspect=suspect)
            if stream in self._own_from:
                self._go_on(stream, pairs)
        if deliveries:
            rows = sum(d.entry.num_rows for d in deliveries) / len(deliveries)
            self._rows_per_entry = max(rows, 0.5 * self._rows_per_entry)  # the count grows slowly and falls at once
        return deliveries

    def _go_on(self, stream: str, pairs: Sequence[tuple[bytes, Any]]) -> None:
        """Remember how far our own unfinished entries of a stream are read; an empty answer ends them."""
        if pairs:
            self._own_from[stream] = pairs[-1][0].decode()
        else:
            del self._own_from[stream]

    def _deliveries(
        self, stream: str, pairs: Sequence[tuple[bytes, Mapping[bytes, bytes] | None]], *, suspect: bool
    ) -> list[Delivery]:
        partition, kind = self._streams[stream]
        deliveries = []
        for entry_id, fields in pairs:
            key = (partition, kind, parse_position(entry_id).entry_id)
            with self._lock:
                if key in self._in_hand:
                    continue
            try:
                entry = parse_entry(entry_id, fields or {})
            except NewerFormatError as error:
                log.warning("%s: %s", stream, error)
                continue
            except EntryError:
                log.exception("entry %s of %s can't be read and is passed by", entry_id.decode(), stream)
                self._unreadable.add((stream, entry_id.decode()))
                continue
            with self._lock:
                self._in_hand.add(key)
            deliveries.append(Delivery(partition=partition, kind=kind, entry=entry, suspect=suspect))
        return deliveries


def _pairs(flat: Sequence[Any]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
