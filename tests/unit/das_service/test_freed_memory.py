"""Memory that was freed: what the API's bodies and answers are made in, again and again."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from das_service.freed_memory import KEPT_BYTES
from das_service.up.embedded import server_environment, start_server
from das_service.up.service_layout import lay_out
from das_service.up.supervisor import Supervisor

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


pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone gives it back at once")


def test_memory_that_was_freed_is_not_fetched_from_the_kernel_again() -> None:
    assert _page_faults("") > 20_000
    assert _page_faults("keep_freed_memory()") < 1_000


def test_nor_is_it_by_a_server_that_has_no_allocator_of_its_own() -> None:
    assert _page_faults("", server_environment()) < 1_000


def test_whoever_starts_the_server_gives_it_that_environment(tmp_path: Path) -> None:
    env = shutil.which("env")
    assert env is not None
    start_server([], program=Path(env), log_file=tmp_path / "log").wait()
    assert f"MALLOC_TRIM_THRESHOLD_={KEPT_BYTES}" in (tmp_path / "log").read_text().splitlines()
    program = Supervisor(lay_out(tmp_path, roles=(), port=0), say=print)._server_program(0)
    assert program.environment == server_environment()


def test_what_the_user_says_of_malloc_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert server_environment()["MALLOC_TRIM_THRESHOLD_"] == "1000"


def _page_faults(before: str, environment: Mapping[str, str] | None = None) -> int:
    """Give the page faults of twenty bodies of 12 MB, one after the other."""
    command = [sys.executable, "-c", _FAULTS.format(before=before)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)
