"""Memory that was freed: what the API's bodies and answers are made in, again and again."""

import ctypes
import subprocess
import sys

import pytest

_FAULTS = """
import resource
from das_service.freed_memory import keep_freed_memory

def body():
    return [b"x" * 4_000_000 for _ in range(3)]

{before}
body(), body()
first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    body()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone gives memory back at once")
def test_memory_that_was_freed_is_not_fetched_from_the_kernel_again() -> None:
    assert _page_faults("") > 20_000
    assert _page_faults("keep_freed_memory()") < 1_000


def _page_faults(before: str) -> int:
    """Give the page faults of twenty bodies of 12 MB, one after the other."""
    command = [sys.executable, "-c", _FAULTS.format(before=before)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
