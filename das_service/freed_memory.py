"""What a process does with memory that it has freed."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 32 * 1024 * 1024


def keep_freed_memory() -> None:
    """Let malloc keep a little of what was freed, for the next body and the next piece of an answer.

    glibc would give megabytes back at once, and fetching fresh pages costs as much as copying what goes into them.
    Other C libraries have no such setting and are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES // 2)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
