"""AugmentedDataset: training batches as tensors, for one or many ranks and loader workers, that go on exactly.

Every reader (a loader worker of a rank) reads its part of one start cursor, in a thread that decodes ahead. What has
been handed out decides the state, not what was read ahead.
"""

import os
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Unpack

import pyarrow as pa
import torch
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from das_service.client import BatchOptions, BatchReader, Client, Clock, TableSource
from vm_training.layout import Layout, read_layout
from vm_training.prefetch import StoppedError, prefetched
from vm_training.streams import ReaderState, Stream, deal_out, first_streams, latest_of, parse_states
from vm_training.tensors import Batch, Buckets, build_batch

_DAY_ONE = datetime(1970, 1, 1, tzinfo=UTC)
_NEVER = -(1 << 63)
_SLOTS = 256
_NO_SEED = -1


@dataclass(frozen=True, slots=True)
class _Step:
    """What a reader has read: a stream as it is behind it, and the rows, None at the stream's end."""

    place: int
    stream: Stream
    batch: Batch | None
    last_us: int = _NEVER


class AugmentedDataset(IterableDataset[Batch]):
    """Closed rows of a dataset, with features, labels and supervision, as tensors; a batch is one item.

    So a loader around it takes batch_size=None. `layout` names the columns of the tensors, `start` is the cursor before
    the first row. Iterating again begins a new epoch, of the same rows; with `extend` it goes on behind them.
    """

    def __init__(  # noqa: PLR0913 - what a trainer may ask for
        self,
        source: Client | TableSource | str | None,
        dataset: str,
        *,
        cursor: str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        device: torch.device | str | None = None,
        buckets: Buckets = None,
        with_ids: bool = False,
        extend: bool = False,
        follow: bool = False,
        prefetch: int = 2,
        **options: Unpack[BatchOptions],
    ) -> None:
        """Fix which rows are read: those that are closed now, or those behind `cursor`.

        source: a client, the service's url (default: DAS_API_URL), or a TableSource beside the tables.
        rank, world_size: default those of torch.distributed where it is initialised, and then all ranks must do this
        together, since rank 0 tells them its start; else 0 of 1. Ranks that are given by hand need the same `cursor`:
        the `start` of one of them.
        device: where the batches shall lie; with loader workers leave it out and call batch.to(device).
        buckets: of hashed categories, one number or by feature (vm_training.tensors says what it gives).
        extend: go on behind the rows that were closed at the start, up to what is closed when they are read; follow:
        and wait for more, without an end. prefetch: batches that are decoded ahead. options: BatchOptions.

        Raises:
            ValueError: An option can't be, or an FM has no outputs yet.
            DasClientError: The service refuses, or gives no answer.
        """
        _refuse_options(options, prefetch=prefetch, is_going_on=extend or follow)
        self.dataset = dataset
        self._source = Client(source) if source is None or isinstance(source, str) else source
        self._options = options
        self._going = "follow" if follow else "extend" if extend else "no"
        self._device = None if device is None else _with_index(torch.device(device))
        self._tensors = {"buckets": buckets, "with_ids": with_ids}
        self._prefetch = prefetch
        self._rank, self._world_size = _ranks(rank, world_size, cursor)
        self.start, self._schema = self._shared_start(cursor)
        self.layout: Layout = read_layout(self._schema)
        self._loaded: tuple[ReaderState, ...] | None = None
        self._loaded_by = 0
        self._streams: list[Stream] | None = None
        self._last_us = _NEVER
        # What loader workers tell this process: the seed of the first epoch, and by worker the latest event_time.
        self._shared = torch.full((1 + _SLOTS,), _NEVER).share_memory_()  # type: ignore[no-untyped-call]
        self._shared[0] = _NO_SEED

    def __iter__(self) -> Generator[Batch, None, None]:
        """Begin an epoch, or go on from the state that was loaded."""
        info = get_worker_info()
        if info is not None and self._device is not None and self._device.type != "cpu":
            raise RuntimeError("a loader worker can't put batches on a device: leave device out, call batch.to(device)")
        self._streams = list(self._planned())
        return self._iterate(self._streams)

    @property
    def trained_through(self) -> datetime | None:
        """The latest event_time delivered + 1 microsecond, None before any: no label of a later row has been seen.

        What loader workers have made ahead counts as delivered, so it may say a little too much, and never too little.
        It is this rank's: a model that several ranks train takes the latest of theirs.
        """
        last_us = max(self._last_us, int(self._shared[1:].max()))
        return None if last_us == _NEVER else _DAY_ONE + timedelta(microseconds=last_us + 1)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Give where this reader is, behind the last batch that it handed out, as plain JSON.

        Raises:
            RuntimeError: The batches came from loader workers, which this process knows nothing of.
        """
        reader, readers = self._reader()
        if self._streams is None and get_worker_info() is None and int(self._shared[0]) != _NO_SEED:
            raise RuntimeError(
                "the batches come from loader workers, which keep their own states: ask torchdata's "
                "StatefulDataLoader, or read with num_workers=0"
            )
        streams = self._planned_streams() if self._streams is None else self._streams
        return ReaderState(
            reader=reader,
            readers=readers,
            start=self.start,
            streams=tuple(streams if self._going != "no" else [s for s in streams if not s.done]),
            last_us=None if self._last_us == _NEVER else self._last_us,
        ).to_json()

    def load_state_dict(self, state: Any) -> None:  # noqa: ANN401 - whatever holds states
        """Go on from there, at the next iteration.

        state: of this reader, or those of all readers of the former run (a list, or what StatefulDataLoaders gave, of
        all ranks): then the number of readers may be another now, and each gets its part of what is left.

        Raises:
            ValueError: It is no state, or some are missing.
        """
        self._loaded = parse_states(state)
        self._loaded_by = os.getpid()
        self.start = self._loaded[0].start
        self._streams = None
        self._last_us = max(self._last_us, _NEVER if (last := latest_of(self._loaded)) is None else last)
        if get_worker_info() is None:
            self._shared[0] = _NO_SEED

    def _reader(self) -> tuple[int, int]:
        """Give this reader's number among all workers of all ranks, and how many there are."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return self._rank * workers + worker, self._world_size * workers

    def _planned(self) -> Sequence[Stream]:
        """Give the streams of the epoch that begins, which a loaded state is used up by.

        Raises:
            RuntimeError: A worker that was started for a later epoch can't know where the former one ended.
        """
        is_first = self._is_first_epoch()
        if self._going != "no" and not is_first and self._streams is None:
            raise RuntimeError("a later epoch that goes on needs the workers of the first: persistent_workers=True")
        if not is_first:
            self._loaded = None
        streams = self._planned_streams()
        self._loaded = None
        return streams

    def _planned_streams(self) -> Sequence[Stream]:
        reader, readers = self._reader()
        if self._loaded is not None:
            return deal_out(self._loaded, reader, readers)
        if self._going != "no" and self._streams is not None:
            return [replace(stream, done=False) for stream in self._streams]
        return first_streams(self.start, reader, readers)

    def _is_first_epoch(self) -> bool:
        """Give whether no epoch's workers came before this one's.

        A worker is started with what the dataset held in the process of the loader, which does not learn that a loaded
        state is used up. But all workers of an epoch have one seed, which the first of them writes down.
        """
        info = get_worker_info()
        if info is None:
            return True
        seed = (info.seed - info.id) % (1 << 62)
        if int(self._shared[0]) == _NO_SEED:
            self._shared[0] = seed
        return self._loaded_by == os.getpid() or int(self._shared[0]) == seed

    # ---- reading

    def _iterate(self, streams: list[Stream]) -> Generator[Batch, None, None]:
        info = get_worker_info()
        slot = None if info is None else 1 + info.id % _SLOTS
        self._share(slot)  # what a loaded state was trained on counts, also if nothing is left
        steps = prefetched(partial(self._iter_steps, tuple(streams)), size=self._prefetch)
        with closing(steps):
            for step in steps:
                streams[step.place] = step.stream
                if step.batch is None:
                    continue
                self._last_us = max(self._last_us, step.last_us)
                self._share(slot)
                yield step.batch

    def _share(self, slot: int | None) -> None:
        """Tell the loader's process the latest event_time that this worker knows of."""
        if slot is not None:
            self._shared[slot] = max(int(self._shared[slot]), self._last_us)

    def _iter_steps(self, streams: Sequence[Stream], stopped: threading.Event) -> Iterator[_Step]:
        """Read one stream after the other; while following, round after round. Runs in the prefetching thread."""
        held = list(streams)
        with self._source.clone(clock=Clock(sleep=partial(_sleep, stopped))) as client:
            is_over = False
            while not is_over:
                for place, stream in enumerate(held):
                    if not stream.done:
                        for step in self._read(client, place, stream):
                            held[place] = step.stream
                            yield step
                is_over = self._going != "follow"
                if not is_over:
                    _sleep(stopped, client.FOLLOW_SECONDS)
                    held = [replace(stream, done=False) for stream in held]

    def _read(self, client: Client | TableSource, place: int, stream: Stream) -> Iterator[_Step]:
        cursor = stream.cursor
        for split in stream.splits[:-1]:
            cursor = client.batches(self.dataset, cursor=cursor, split=split).start()
        last = stream.splits[-1] if stream.splits else None
        reader = client.batches(self.dataset, cursor=cursor, split=last, extend=self._going != "no")
        with closing(reader):
            for read in reader:
                yield self._step(place, Stream(read.cursor), read.rows)
        yield _Step(place, _at_end(stream, reader), None)

    def _step(self, place: int, stream: Stream, rows: pa.RecordBatch) -> _Step:
        if rows.schema.names != self._schema.names:
            raise ValueError("the state was made with other columns, FMs or outputs than this dataset asks for")
        batch = build_batch(rows, self.layout, **self._tensors)  # type: ignore[arg-type]
        return _Step(place, stream, self._placed(batch), int(batch.event_time_B.max()))

    def _placed(self, batch: Batch) -> Batch:
        if self._device is None:
            return batch
        return (batch.pin_memory() if self._device.type == "cuda" else batch).to(self._device)

    # ---- where a run begins

    def _shared_start(self, cursor: str | None) -> tuple[str, pa.Schema]:
        """Give the start cursor of all ranks and the columns behind it."""
        if not _is_distributed(self._world_size) or cursor is not None:
            return self._ask_start(cursor)
        told: list[str | None] = [None]
        try:
            if torch.distributed.get_rank() == 0:
                told[0] = self._ask_start(None)[0]
        finally:
            torch.distributed.broadcast_object_list(told, src=0)
        if told[0] is None:
            raise RuntimeError("rank 0 got no start cursor, and says why")
        return self._ask_start(told[0])

    def _ask_start(self, cursor: str | None) -> tuple[str, pa.Schema]:
        with self._source.clone() as client:
            options: BatchOptions = {**self._options, "embedding_format": "encoded"}
            reader = client.batches(self.dataset, cursor=cursor, **options)
            return reader.start(), reader.schema()


def _refuse_options(options: BatchOptions, *, prefetch: int, is_going_on: bool) -> None:
    if "embedding_format" in options:
        raise ValueError("embeddings come encoded and are decoded where the batch lies: leave embedding_format out")
    if is_going_on and (options.get("as_of") or options.get("until")):
        raise ValueError("extend and follow go on with what closes later: leave out as_of and until")
    if prefetch < 1:
        raise ValueError(f"prefetch={prefetch}: at least one batch is read ahead")


def _ranks(rank: int | None, world_size: int | None, cursor: str | None) -> tuple[int, int]:
    if rank is None and world_size is None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0, 1
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} and world_size={world_size}: give both, rank from 0 to world_size - 1")
    if world_size > 1 and cursor is None and not _is_distributed(world_size):
        raise ValueError("ranks that read one dataset share a start: give all of them the cursor `start` of one")
    return rank, world_size


def _is_distributed(world_size: int) -> bool:
    """Give whether the ranks can tell each other where they start."""
    return (
        world_size > 1
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() == world_size
    )


def _with_index(device: torch.device) -> torch.device:
    """Give the device that this thread means: another thread may mean another CUDA device."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _at_end(stream: Stream, reader: BatchReader) -> Stream:
    """Give a stream that has been read, from which extend goes on."""
    if reader.cursor is None or reader.cursor == stream.cursor:
        return replace(stream, done=True)
    return Stream(reader.cursor, done=True)


def _sleep(stopped: threading.Event, seconds: float) -> None:
    if stopped.wait(seconds):
        raise StoppedError
