"""Signals that end a process, as an event for its threads.

A handler runs in the middle of whatever the main thread does, so it may not wait for a lock: with the event's own, held
by the code that it interrupted, it would wait for ever. It leaves a note, and a thread sets the event.
"""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType

_NO_MORE = 0


@contextmanager
def set_by_signals(
    stopping: threading.Event,
    numbers: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
    *,
    also: Callable[[int], object] = lambda _: None,
) -> Iterator[None]:
    """Set the event when one of the signals comes, within the block. For the main thread.

    also: is called with each signal's number, in the handler: it takes no lock.
    """
    came: SimpleQueue[int] = SimpleQueue()  # its put() may interrupt itself

    def hear(number: int, _: FrameType | None) -> None:
        also(number)
        came.put(number)

    def tell() -> None:
        while came.get() != _NO_MORE:
            stopping.set()

    former = {number: signal.signal(number, hear) for number in numbers}
    try:
        threading.Thread(target=tell, name="signals", daemon=True).start()
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        came.put(_NO_MORE)
