"""Child processes of the supervisor: how one starts, when it starts again, where its output goes.

A child that ended starts again after a pause that doubles from 0.2 s to 5 s, and begins at 0.2 s once a child has lived
for 30 s. One that ends with exit code 2 five times in a row within seconds is wrongly configured: a sixth start would
change nothing.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import das_service.up.leash

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 5.0
STEADY_SECONDS = 30.0
MISCONFIGURED_CODE = 2
MISCONFIGURED_SECONDS = 10.0
MISCONFIGURED_TIMES = 5
LOG_MAX_BYTES = 32 * 1024 * 1024
TAIL_BYTES = 4096


@dataclass(slots=True)
class Restarts:
    """What is remembered of a child's ends. count: how often it was started again."""

    count: int = 0
    misconfigured: int = 0
    _next_pause_seconds: float = FIRST_PAUSE_SECONDS

    def pause_after(self, code: int, *, lived_seconds: float) -> float:
        """Give the seconds to wait before the next start."""
        in_vain = code == MISCONFIGURED_CODE and lived_seconds < MISCONFIGURED_SECONDS
        self.misconfigured = self.misconfigured + 1 if in_vain else 0
        if lived_seconds >= STEADY_SECONDS:
            self._next_pause_seconds = FIRST_PAUSE_SECONDS
        pause = self._next_pause_seconds
        self._next_pause_seconds = min(2 * pause, LONGEST_PAUSE_SECONDS)
        return pause

    @property
    def is_hopeless(self) -> bool:
        """Whether a further start would fail like the last ones."""
        return self.misconfigured >= MISCONFIGURED_TIMES


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a child runs. kept_fds: descriptors it inherits; death_signal: what it gets when the supervisor ends."""

    role: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    log_file: Path
    kept_fds: Sequence[int] = ()
    death_signal: signal.Signals = signal.SIGKILL


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A child that ended, and when it will start again."""

    role: str
    code: int
    lived_seconds: float
    pause_seconds: float

    @property
    def reason(self) -> str:
        """How it ended, in words."""
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        try:
            return f"was ended by {signal.Signals(-self.code).name}"
        except ValueError:
            return f"was ended by signal {-self.code}"


class Child:
    """One child process and its successors. One owner thread; times are monotonic seconds."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.restarts = Restarts()
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._due_at: float | None = None

    @property
    def role(self) -> str:
        """The role that it plays."""
        return self.program.role

    @property
    def pid(self) -> int | None:
        """The process id, None while there is no process."""
        return None if self._process is None else self._process.pid

    def describe(self) -> dict[str, object]:
        """Give what status shows."""
        return {"role": self.role, "pid": self.pid, "restarts": self.restarts.count}

    def start(self, *, now: float) -> None:
        """Start the process, in a session of its own, so that Ctrl-C reaches the supervisor alone."""
        leash = [sys.executable, "-I", "-S", das_service.up.leash.__file__, str(os.getpid())]
        self.program.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.program.log_file.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own arguments
                [*leash, str(int(self.program.death_signal)), *self.program.arguments],
                env={**self.program.environment, "DAS_RESTARTS": str(self.restarts.count)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=self.program.kept_fds,
                start_new_session=True,
            )
        self._started_at = now
        self._due_at = None

    def look(self, *, now: float) -> Ended | None:
        """Start the process again if it is time; give how it ended if that is news."""
        if self._process is None:
            if self._due_at is not None and now >= self._due_at:
                self._start_again(now)
            return None
        code = self._process.poll()
        if code is None:
            return None
        self._process = None
        lived = now - self._started_at
        pause = self.restarts.pause_after(code, lived_seconds=lived)
        self._due_at = now + pause
        return Ended(role=self.role, code=code, lived_seconds=lived, pause_seconds=pause)

    def _start_again(self, now: float) -> None:
        self.restarts.count += 1
        try:
            self.start(now=now)
        except OSError:  # the machine has no memory, process or disk left for it now
            self._due_at = now + LONGEST_PAUSE_SECONDS

    def running_process(self) -> "subprocess.Popen[bytes]":
        """Give the process that was started last.

        Raises:
            RuntimeError: There is none.
        """
        if self._process is None:
            raise RuntimeError(f"the {self.role} was not started")
        return self._process

    def wait(self, *, seconds: float) -> None:
        """Wait until the process is gone; it is killed when it takes longer."""
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if there is a process."""
        if self._process is not None:
            self._process.send_signal(number)

    def has_ended(self) -> bool:
        """Give whether there is no process; a child that was told to stop is not started again."""
        return self._process is None or self._process.poll() is not None

    def log_tail(self) -> str:
        """Give the last lines that it wrote."""
        return read_tail(self.program.log_file)


def read_tail(path: Path) -> str:
    """Give the last lines of a text file, empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            return file.read().decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


def rotate_log(path: Path) -> None:
    """Put a former run's log aside, as `<name>.1`."""
    if path.exists():
        path.replace(path.with_name(f"{path.name}.1"))


def cap_log(path: Path, *, max_bytes: int = LOG_MAX_BYTES) -> None:
    """Copy a log that has grown too large to `<name>.1` and empty it; its writer appends, so it need not know."""
    if path.exists() and path.stat().st_size > max_bytes:
        shutil.copyfile(path, path.with_name(f"{path.name}.1"))
        os.truncate(path, 0)
