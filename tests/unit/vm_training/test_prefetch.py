"""Items that a thread makes ahead: in order, not too many, with their errors, and no thread is left."""

import threading
from collections.abc import Iterator
from itertools import count, islice

import pytest

from vm_training.prefetch import prefetched


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name == "das loader"]


def test_items_come_in_order_and_the_thread_ends() -> None:
    assert list(prefetched(lambda _: iter(range(50)), size=2)) == list(range(50))
    assert no_thread_is_left()


def test_at_most_so_many_items_are_made_ahead() -> None:
    made: list[int] = []
    third = threading.Event()

    def make(_: threading.Event) -> Iterator[int]:
        for number in count():
            made.append(number)
            if number == 3:
                third.set()
            yield number

    items = prefetched(make, size=2)
    assert next(items) == 0
    assert third.wait(10)  # one taken, two in the queue, and one in hand
    assert made == [0, 1, 2, 3]
    items.close()
    assert no_thread_is_left()


def test_an_error_is_raised_behind_the_items_before_it() -> None:
    def make(_: threading.Event) -> Iterator[int]:
        yield 1
        raise LookupError("gone")

    items = prefetched(make, size=2)
    assert next(items) == 1
    with pytest.raises(LookupError, match="gone"):
        next(items)
    assert no_thread_is_left()


def test_leaving_a_loop_ends_the_thread_that_waits() -> None:
    def make(stopped: threading.Event) -> Iterator[int]:
        yield from range(3)
        assert stopped.wait(10)

    for _ in islice(prefetched(make, size=1), 2):
        pass
    assert no_thread_is_left()
