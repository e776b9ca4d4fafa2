"""Items made ahead by a thread: a bounded queue between it and whoever takes them."""

import atexit
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

_CLOSE_SECONDS = 10.0
_T = TypeVar("_T")


class StoppedError(Exception):
    """Nobody waits for the items any more."""


@dataclass(frozen=True, slots=True)
class _Made(Generic[_T]):
    item: _T


class _Filler(Generic[_T]):
    """A thread that fills a queue until its items end or it is stopped."""

    def __init__(self, make: Callable[[threading.Event], Iterator[_T]], *, size: int) -> None:
        self._make = make
        self._stopped = threading.Event()
        self._queue: queue.Queue[_Made[_T] | BaseException] = queue.Queue(maxsize=size)
        self._thread = threading.Thread(target=self._fill, name="das loader", daemon=True)
        self._thread.start()

    def take(self) -> _Made[_T] | BaseException:
        return self._queue.get()

    def stop(self) -> None:
        """End the thread, and wait for that: what it is about to put finds room."""
        self._stopped.set()
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            while not self._queue.empty():
                self._queue.get_nowait()
            self._thread.join(0.02)

    def _fill(self) -> None:
        ending: BaseException = StopIteration()
        try:
            for item in self._make(self._stopped):
                self._queue.put(_Made(item))
                if self._stopped.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - whoever takes the items raises it
            ending = error
        if not self._stopped.is_set():
            self._queue.put(ending)


def prefetched(make: Callable[[threading.Event], Iterator[_T]], *, size: int) -> Generator[_T, None, None]:
    """Give the items of an iterator that a thread makes, and at most `size` of them ahead, as they are taken.

    make: is called in the thread, with an event that is set once nobody takes items any more. What it raises is raised
    here, after the items before it. Closing the generator, or leaving the process, ends the thread.
    """
    filler = _Filler(make, size=size)
    atexit.register(filler.stop)
    try:
        while isinstance(made := filler.take(), _Made):
            yield made.item
        if not isinstance(made, StopIteration):
            raise made
    finally:
        atexit.unregister(filler.stop)
        filler.stop()
