"""What each reader of a run has still to read: its streams, their states, and how they are dealt out anew. No I/O.

A run has `readers` readers, the workers of all ranks, numbered from 0. All of them share the cursor `start`; reader j
reads part j of it. Each says where it is by a state: plain JSON, one cursor for each stream that it has left. States
go on exactly:

- with as many readers, each takes the state of its own number: the same rows in the same batches;
- with another number, each of m new readers takes part j/m of what every stream of every former reader has left, one
  stream after the other: each row once, in other batches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

KIND, FORMAT = "das_loader", 1
_OF_LOADER = "_steps_since_snapshot"  # of torchdata's StatefulDataLoader


@dataclass(frozen=True, slots=True)
class Stream:
    """Rows from a cursor on; splits: which part of them, part by part, as "j/m". done: it has come to its end."""

    cursor: str
    splits: tuple[str, ...] = ()
    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderState:
    """Where one reader is. last_us: the latest event_time that it has delivered, None before any."""

    reader: int
    readers: int
    start: str
    streams: tuple[Stream, ...]
    last_us: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the state as JSON has it."""
        streams = [{"cursor": stream.cursor, "splits": list(stream.splits)} for stream in self.streams]
        return {
            "kind": KIND, "format": FORMAT, "reader": self.reader, "readers": self.readers, "start": self.start,
            "streams": streams, "max_event_time_us": self.last_us,
        }  # fmt: skip


def first_streams(start: str, reader: int, readers: int) -> tuple[Stream, ...]:
    """Give what a reader reads in a run that begins."""
    return (Stream(start, () if readers == 1 else (f"{reader}/{readers}",)),)


def parse_states(given: Any) -> tuple[ReaderState, ...]:  # noqa: ANN401 - a state, or whatever holds some
    """Give the states in a state, in a list of them, or in what StatefulDataLoaders of one or several ranks saved.

    Raises:
        ValueError: There is none, one is of another format, one is missing or there twice, or they are of several runs.
    """
    states = tuple(_iter_states(given))
    if not states:
        raise ValueError("there is no state of an AugmentedDataset in it")
    if len({(state.readers, state.start) for state in states}) != 1:
        raise ValueError("these states are of several runs: give those that one run saved at one moment")
    numbers, readers = sorted(state.reader for state in states), states[0].readers
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"a reader's state is there twice: {numbers}")
    if len(states) not in {1, readers}:
        missing = sorted(set(range(readers)) - set(numbers))
        raise ValueError(f"the states of readers {missing} of {readers} are missing: their rows would be lost")
    return tuple(sorted(states, key=lambda state: state.reader))


def _iter_states(given: Any) -> Iterator[ReaderState]:  # noqa: ANN401
    if isinstance(given, Mapping):
        if given.get("kind") == KIND:
            yield _parse(given)
            return
        if given.get(_OF_LOADER):
            raise ValueError("the loader's state lies some batches back: make it with snapshot_every_n_steps=1")
        given = list(given.values())
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        for item in given:
            yield from _iter_states(item)


def _parse(state: Mapping[str, Any]) -> ReaderState:
    if state.get("format") != FORMAT:
        raise ValueError(f"the state has format {state.get('format')}, this version reads {FORMAT}")
    try:
        return ReaderState(
            reader=state["reader"],
            readers=state["readers"],
            start=state["start"],
            streams=tuple(Stream(stream["cursor"], tuple(stream["splits"])) for stream in state["streams"]),
            last_us=state["max_event_time_us"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"the state of an AugmentedDataset is damaged: {error!r}") from error


def deal_out(states: Sequence[ReaderState], reader: int, readers: int) -> tuple[Stream, ...]:
    """Give what one of so many readers reads of what the readers of these states have left.

    Raises:
        ValueError: It is one state of several, and another reader's.
    """
    own = [state for state in states if (state.reader, state.readers) == (reader, readers)]
    if own:
        return own[0].streams
    if len(states) != states[0].readers:
        former = states[0]
        raise ValueError(
            f"reader {reader} of {readers} can't go on from reader {former.reader} of {former.readers} alone: "
            f"give the states of all {former.readers}"
        )
    left = [stream for state in states for stream in state.streams]
    return tuple(left) if readers == 1 else tuple(replace(s, splits=(*s.splits, f"{reader}/{readers}")) for s in left)


def latest_of(states: Sequence[ReaderState]) -> int | None:
    """Give the latest event_time that any of them has delivered, in microseconds."""
    return max((state.last_us for state in states if state.last_us is not None), default=None)
