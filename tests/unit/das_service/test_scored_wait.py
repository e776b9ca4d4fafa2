"""Waiting for scores: what is asked, when it ends, against a store that is a set."""

import asyncio
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from das_service.scored_wait import ROWS_PER_LOOK, Awaited, first_rows, wait_until_scored


def digests(first: int, last: int) -> bytes:
    return b"".join(number.to_bytes(16, "big") for number in range(first, last))


def rows_of(items: list[Awaited]) -> list[tuple[str, int, int]]:
    return [
        (item.fm, item.partition, int.from_bytes(item.digests[at : at + 16], "big"))
        for item in items
        for at in range(0, len(item.digests), 16)
    ]


@dataclass
class Store:
    """Rows that are settled, and what was asked; `then` is settled after each look."""

    scored: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    then: list[set[int]] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    async def look(self, items: list[Awaited]) -> tuple[list[Awaited], int]:
        rows = rows_of(items)
        self.asked.append(len(rows))
        left = [
            Awaited(fm, partition, row.to_bytes(16, "big"))
            for fm, partition, row in rows
            if row not in self.scored | self.failed
        ]
        num_failed = sum(row in self.failed for _, _, row in rows)
        if self.then:
            self.scored |= self.then.pop(0)
        return left, num_failed

    def wait(self, awaited: list[Awaited], timeout_seconds: float = 30.0) -> bool:
        return asyncio.run(wait_until_scored(self.look, awaited, timeout_seconds=timeout_seconds))


def test_nothing_awaited_is_scored_without_a_look() -> None:
    store = Store()
    assert store.wait([])
    assert store.asked == []


def test_rows_that_are_scored_already_take_no_time_at_all() -> None:
    store = Store(scored=set(range(2_500)))
    assert store.wait([Awaited("f", 0, digests(0, 2_500))], timeout_seconds=0)
    assert store.asked == [ROWS_PER_LOOK, ROWS_PER_LOOK, 500]


def test_while_the_first_rows_wait_no_other_is_asked_for() -> None:
    store = Store()
    assert not store.wait([Awaited("f", 0, digests(0, 100_000))], timeout_seconds=0.03)
    assert set(store.asked) == {ROWS_PER_LOOK}


def test_rows_that_failed_are_settled_and_the_answer_is_no() -> None:
    store = Store(scored={0, 2}, failed={1, 3})
    assert not store.wait([Awaited("f", 0, digests(0, 4))])
    assert store.asked == [4]


def test_only_what_is_not_settled_is_asked_for_again() -> None:
    store = Store(scored={0}, then=[{1}, {2}])
    assert store.wait([Awaited("f", 0, digests(0, 2)), Awaited("f", 1, digests(2, 3))])
    assert store.asked == [3, 2, 1]


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(1, 12))
def test_the_first_rows_and_the_others_are_all_rows_in_order(sizes: list[int], num_rows: int) -> None:
    bounds = [sum(sizes[:place]) for place in range(len(sizes) + 1)]
    awaited = [
        Awaited("f", place, digests(bounds[place], bounds[place + 1])) for place, size in enumerate(sizes) if size
    ]

    first, rest = first_rows(awaited, num_rows)

    assert rows_of(first) + rows_of(rest) == rows_of(awaited)
    assert len(rows_of(first)) == min(num_rows, bounds[-1])
    assert all(item.digests for item in [*first, *rest])
