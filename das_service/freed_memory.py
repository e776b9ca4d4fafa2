"""What a process does with memory that it has freed."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
KEPT_BYTES = 32 * 1024 * 1024
_ARENAS = 2


def keep_freed_memory() -> None:
    """Let malloc keep a little of what was freed, for the next body and the next piece of an answer, in few places.

    glibc would give megabytes back at once, and fetching fresh pages costs as much as copying what goes into them. And
    it would let each thread free into an arena of its own, which others do not take from: memory would grow with every
    pool of threads that DuckDB starts. Other C libraries have no such settings and are left as they are. To be called
    before there are threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_ARENA_MAX, _ARENAS)
