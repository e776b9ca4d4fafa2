"""What of a spool folder this process still holds: open files, mappings, and names that can be seen."""

import time
from collections.abc import Callable
from pathlib import Path


def held_spools(folder: Path) -> list[str]:
    """Give the files of the folder that are open, mapped or named; unnamed ones have a path too."""
    held = [str(path) for path in folder.iterdir()]
    for handle in list(Path("/proc/self/fd").iterdir()):
        try:
            target = str(handle.readlink())
        except FileNotFoundError:  # the listing's own, or another thread's
            continue
        held += [target] if target.startswith(f"{folder}/") else []
    maps = Path("/proc/self/maps").read_text()
    return held + [line for line in maps.splitlines() if f" {folder}/" in line]


def wait_until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
