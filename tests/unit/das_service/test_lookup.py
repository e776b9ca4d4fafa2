"""Which status a row has: the policy of contract 5 against a loop, and the parts that a server is not needed for."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from das_service.supervision.answer import STATUSES, judge
from das_service.supervision.online_store import KEYS_PER_COMMAND, KEYS_PER_ROUND, _iter_slices, _pack_command, _rounds
from schemas.snapshot import OutputColumns
from schemas.supervision import FAILED, SCORED, online_layout

LAYOUT = online_layout(OutputColumns(tasks=("click",), embeddings={}))
SECOND = 1_000_000


def records(rows: list[dict[str, int]]) -> Any:
    made = np.zeros(len(rows), LAYOUT.record)
    for name in ("_state", "_snapshot", "_event_time"):
        made[name] = [row[name] for row in rows]
    return made


def status_by_hand(row: dict[str, int], *, found: bool, waits: bool, through: list[int], gap: float | None) -> str:
    """The table of contract 5, line by line."""
    if found and row["_state"] == FAILED:
        return "failed"
    if found and through[row["_snapshot"]] > row["_event_time"]:
        return "leaky"
    if found and gap is not None and row["_event_time"] - through[row["_snapshot"]] > gap * SECOND:
        return "stale"
    if found:
        return "present"
    return "pending" if waits else "missing"


TIME = st.one_of(st.integers(-5, 5).map(lambda s: s * SECOND), st.integers(-(2**55), 2**55))
ROW = st.fixed_dictionaries(
    {"_state": st.sampled_from([SCORED, FAILED]), "_snapshot": st.integers(0, 1), "_event_time": TIME}
)


@given(
    st.lists(st.tuples(ROW, st.booleans(), st.booleans()), min_size=1, max_size=20),
    st.lists(TIME, min_size=2, max_size=2),
    st.one_of(st.none(), st.integers(0, 5), st.just(1e12)),
)
def test_the_status_is_the_first_line_of_the_table_that_applies(
    rows: list[tuple[dict[str, int], bool, bool]], through: list[int], gap: float | None
) -> None:
    status = judge(
        records([row for row, _, _ in rows]),
        np.array([found for _, found, _ in rows]),
        np.array([waits for _, _, waits in rows]),
        np.array(through, np.int64),
        gap,
    )

    expected = [status_by_hand(row, found=found, waits=waits, through=through, gap=gap) for row, found, waits in rows]
    assert [STATUSES[code] for code in status] == expected


def test_a_snapshot_that_does_not_say_what_it_saw_is_leaky() -> None:
    row = {"_state": SCORED, "_snapshot": 0, "_event_time": 2**60}

    status = judge(records([row]), np.array([True]), np.array([False]), np.array([2**63 - 1], np.int64), 10.0)

    assert [STATUSES[code] for code in status] == ["leaky"]


def test_a_command_is_spelled_as_redis_reads_it() -> None:
    digests = np.arange(32, dtype=np.uint8).reshape(2, 16)

    packed = _pack_command(b"EXISTS", b"{ads.0}=f:", digests)

    key = b"$26\r\n{ads.0}=f:%b\r\n"
    assert packed == b"*3\r\n$6\r\nEXISTS\r\n" + key % bytes(range(16)) + key % bytes(range(16, 32))


@given(st.lists(st.integers(0, 3), max_size=300))
def test_slices_hold_every_row_once_and_one_partition_each(partitions: list[int]) -> None:
    of_row = np.array(partitions, np.int64)
    slices = [part for part in _iter_slices(np.argsort(of_row, kind="stable"), of_row) if len(part)]

    assert sorted(row for part in slices for row in part.tolist()) == list(range(len(partitions)))
    assert all(len(set(of_row[part].tolist())) == 1 for part in slices)


@given(st.lists(st.integers(1, KEYS_PER_COMMAND), max_size=30))
def test_rounds_take_all_commands_in_order_and_few_keys_at_once(sizes: list[int]) -> None:
    rounds = _rounds(sizes)

    assert [place for first, last in rounds for place in range(first, last)] == list(range(len(sizes)))
    assert all(sum(sizes[first:last]) <= KEYS_PER_ROUND for first, last in rounds)


@pytest.mark.parametrize("status", STATUSES)
def test_statuses_are_those_of_the_contract(status: str) -> None:
    assert status in {"failed", "leaky", "stale", "present", "pending", "missing"}
