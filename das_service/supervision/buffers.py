"""Memory for the columns of windows, used again: fresh pages for each window cost as much as the scatter.

A buffer is a mapping of its own. It goes back to its pool when nothing refers to its memory any more, whoever read it
and in whatever thread. Huge pages are not asked for.

Source: docs/adr/0007-the-offline-join.md
"""

import ctypes
import mmap
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEP_BYTES = 2 * 1024 * 1024
MOST_FREE_BYTES = 256 * 1024 * 1024


class BufferPool:
    """Gives arrays for as long as they are referred to; keeps most_free_bytes for the next. Threads may share it."""

    def __init__(self, most_free_bytes: int = MOST_FREE_BYTES) -> None:
        self._most_free_bytes = most_free_bytes
        self._free: list[mmap.mmap] = []
        self._keeps = True
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """What is kept for the next arrays."""
        return sum(map(len, self._free))

    def clear(self) -> None:
        """Keep nothing of what is free now or, after an error that still refers to it, soon; until the next array."""
        with self._lock:
            self._keeps = False
            self._free.clear()

    def empty(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> NDArray[Any]:
        """Give an array that holds whatever its memory held last."""
        num_items = int(np.prod(shape, dtype=np.int64))
        num_bytes = num_items * kind.itemsize
        if num_bytes < _STEP_BYTES:
            return np.empty(shape, kind)
        self._keeps = True
        pages = self._take(num_bytes)
        lease = (ctypes.c_char * num_bytes).from_buffer(pages)
        weakref.finalize(lease, self._take_back, pages).atexit = False
        return np.frombuffer(memoryview(lease), kind, num_items).reshape(shape)

    def _take_back(self, pages: mmap.mmap) -> None:
        """Keep a mapping that nobody refers to. Called wherever the last reference goes, so it may wait for no lock."""
        if self._keeps and self.free_bytes + len(pages) <= self._most_free_bytes:
            self._free.append(pages)

    def _take(self, num_bytes: int) -> mmap.mmap:
        """Give a free mapping of about that size, or a new one in the place of a free one of another size."""
        with self._lock:
            fits = [pages for pages in self._free if num_bytes <= len(pages) <= 2 * num_bytes + _STEP_BYTES]
            taken = fits[:1] or self._free[:1]
            if taken:
                self._free.remove(taken[0])
            if fits:
                return fits[0]
        return mmap.mmap(-1, -(-num_bytes // _STEP_BYTES) * _STEP_BYTES, flags=mmap.MAP_PRIVATE)
