"""States of readers: as JSON, found wherever they lie, complete or refused, and dealt out so that nothing is lost."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_training.streams import ReaderState, Stream, deal_out, first_streams, latest_of, parse_states


def state(reader: int, readers: int, *cursors: str, last_us: int | None = None, start: str = "s") -> ReaderState:
    streams = tuple(Stream(cursor) for cursor in cursors)
    return ReaderState(reader=reader, readers=readers, start=start, streams=streams, last_us=last_us)


def saved(*states: ReaderState) -> list[dict[str, Any]]:
    return [json.loads(json.dumps(each.to_json())) for each in states]


def test_a_run_begins_with_a_part_of_its_start_each() -> None:
    assert first_streams("s", 0, 1) == (Stream("s"),)
    assert first_streams("s", 1, 3) == (Stream("s", ("1/3",)),)


def test_a_state_is_json_and_comes_back() -> None:
    given_state = ReaderState(reader=1, readers=2, start="s", streams=(Stream("c", ("0/2", "1/3")),), last_us=7)
    assert parse_states(saved(given_state)) == (given_state,)


def test_states_are_found_in_what_loaders_of_several_ranks_saved() -> None:
    states = [state(number, 4, f"c{number}") for number in range(4)]
    ranks = [
        {"_snapshot": {"_worker_snapshots": {f"worker_{w}": {"dataset_state": states[2 * rank + w].to_json()}
                                             for w in range(2)}}, "_steps_since_snapshot": 0}
        for rank in (1, 0)
    ]  # fmt: skip
    assert parse_states(ranks) == tuple(states)


def test_as_many_readers_take_each_its_own() -> None:
    states = [state(0, 2, "a"), state(1, 2, "b", "c")]
    assert deal_out(states, 1, 2) == (Stream("b"), Stream("c"))
    assert deal_out(states[1:], 1, 2) == (Stream("b"), Stream("c"))


@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_other_numbers_of_readers_share_every_stream(sizes: list[int]) -> None:
    states = [ReaderState(reader=j, readers=sizes[0], start="s", streams=first_streams("s", j, sizes[0]))
              for j in range(sizes[0])]  # fmt: skip
    for size in sizes[1:]:
        dealt = [deal_out(states, reader, size) for reader in range(size)]
        states = [ReaderState(reader=j, readers=size, start="s", streams=part) for j, part in enumerate(dealt)]
    assert sum(share(stream) for each in states for stream in each.streams) == pytest.approx(1.0)
    assert len({stream for each in states for stream in each.streams}) == sum(len(each.streams) for each in states)


def share(stream: Stream) -> float:
    part = 1.0
    for split in stream.splits:
        part /= int(split.partition("/")[2])
    return part


def test_the_latest_event_time_is_that_of_all_readers() -> None:
    assert latest_of([state(0, 2, last_us=5), state(1, 2, last_us=9)]) == 9
    assert latest_of([state(0, 2), state(1, 2, last_us=-4)]) == -4
    assert latest_of([state(0, 1)]) is None


@pytest.mark.parametrize(
    ("given_states", "message"),
    [
        ([], "no state of an AugmentedDataset"),
        ({"x": 1}, "no state of an AugmentedDataset"),
        (saved(state(0, 3), state(2, 3)), r"readers \[1\] of 3 are missing"),
        (saved(state(0, 2), state(0, 2)), "there twice"),
        (saved(state(0, 2), state(1, 2, start="other")), "several runs"),
        ([{**saved(state(0, 1))[0], "format": 2}], "has format 2, this version reads 1"),
        ([{**saved(state(0, 1))[0], "streams": [{}]}], "damaged"),
        ({"_steps_since_snapshot": 3, "s": saved(state(0, 1))}, "snapshot_every_n_steps=1"),
    ],
)
def test_states_that_would_lose_rows_are_refused(given_states: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_states(given_states)


def test_one_state_of_several_is_no_start_for_another_reader() -> None:
    with pytest.raises(ValueError, match="reader 0 of 1 can't go on from reader 1 of 2 alone"):
        deal_out([state(1, 2, "c")], 0, 1)
