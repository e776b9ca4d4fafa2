"""Memory for the columns of windows, used again: fresh pages for each window cost as much as the scatter.

A buffer is a mapping in huge pages, where there are any. It goes back to its pool when nothing refers to its memory any
more, whoever read it and in whatever thread.
"""

import ctypes
import mmap
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HUGE_BYTES = 2 * 1024 * 1024


class BufferPool:
    """Gives arrays for as long as they are referred to. Threads may share it."""

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> NDArray[Any]:
        """Give an array that holds whatever its memory held last."""
        num_items = int(np.prod(shape, dtype=np.int64))
        num_bytes = num_items * kind.itemsize
        if num_bytes < _HUGE_BYTES:
            return np.empty(shape, kind)
        pages = self._take(num_bytes)
        lease = (ctypes.c_char * num_bytes).from_buffer(pages)
        weakref.finalize(lease, self._free.append, pages).atexit = False
        return np.frombuffer(memoryview(lease), kind, num_items).reshape(shape)

    def _take(self, num_bytes: int) -> mmap.mmap:
        """Give a free mapping of about that size, or a new one in the place of a free one of another size."""
        with self._lock:
            fits = [pages for pages in self._free if num_bytes <= len(pages) <= 2 * num_bytes + _HUGE_BYTES]
            taken = fits[:1] or self._free[:1]
            if taken:
                self._free.remove(taken[0])
            if fits:
                return fits[0]
        pages = mmap.mmap(-1, -(-num_bytes // _HUGE_BYTES) * _HUGE_BYTES, flags=mmap.MAP_PRIVATE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        return pages
