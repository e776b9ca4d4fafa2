"""What a long run shows of itself: a bar per stage on stderr, and how long each stage took."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from das_service.up.supervisor import SupervisorError


@dataclass(slots=True)
class Clock:
    """Seconds of each stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)
    started_at: float = field(default_factory=time.monotonic)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, or another part of it."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 1)

    def total(self) -> dict[str, float]:
        """Give all stages and the total."""
        return {**self.seconds, "total": round(time.monotonic() - self.started_at, 1)}


class Bars:
    """Progress bars on stderr, so that stdout ends with the record."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip

    @contextlib.contextmanager
    def bar(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show one bar; give the function that moves it."""
        with self._progress:
            task = self._progress.add_task(text, total=total)
            yield lambda done: self._progress.advance(task, done)
        self._progress.remove_task(task)


def empty_folder(folder: Path, *, mark: str) -> None:
    """Make an empty folder of it, if an earlier run left its mark there.

    Raises:
        SupervisorError: There is something in it that no such run has made.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / mark).exists():
        raise SupervisorError(f"{folder} is not empty and not of an earlier run; name another with --folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / mark).touch()
