"""`das augment` as a process: the join by reference needs the service's packages and the client does not have them."""

import codecs
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any, TextIO

from das_service.client.errors import DasClientError

TIDY_SECONDS = 10.0
_LOOK_SECONDS = 0.05
_KEPT_LETTERS = 16_384
_SAYS_WHY = (1, 2)  # the exit codes of a refusal
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run_augment(
    arguments: Sequence[str], options: Mapping[str, Sequence[object]], *, flags: Sequence[str]
) -> dict[str, Any]:
    """Give what `das augment --json` prints; its progress bar and its words go to our stderr.

    The process ends before this does, whatever ends this: it is told to, and killed after TIDY_SECONDS.

    Raises:
        DasClientError: It was refused (code `augment_refused`), with what it said.
    """
    command = [sys.executable, "-m", "das_service.cli", "augment", "--json", *flags]
    command += [f"{name}={value}" for name, values in options.items() for value in values]
    is_live = sys.stderr.isatty()  # a terminal shows the bar, others get the words at the end
    with tempfile.TemporaryFile() as printed:
        said, code = _run([*command, "--", *arguments], printed, is_live=is_live)
        printed.seek(0)
        answer = _parse(printed.read())
    if code == 0 and answer is not None:
        if not is_live:
            sys.stderr.write(said)
        return answer
    why = _ESCAPES.sub("", said).rpartition("das: ")[2].strip() if code in _SAYS_WHY else ""
    raise DasClientError(why or f"`das augment` ended with code {code}", code="augment_refused")


def _run(command: list[str], printed: IO[bytes], *, is_live: bool) -> tuple[str, int]:
    """Give the end of what a process said, and its exit code; what it prints goes to a file.

    It is looked at now and then: where polars was imported, an interrupt ends no wait of the system's.
    """
    environment = _terminal_environment() if is_live else None
    process: subprocess.Popen[bytes] | None = None
    words: _Words | None = None
    try:
        with _interrupts_wait():
            process = subprocess.Popen(command, stdout=printed, stderr=subprocess.PIPE, env=environment)  # noqa: S603 - our own module
            words = _Words(process, shown=sys.stderr if is_live else None)
        while process.poll() is None:
            time.sleep(_LOOK_SECONDS)
    except BaseException:
        if process is not None:
            process.terminate()
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(TIDY_SECONDS)
            finally:
                process.kill()
        raise
    finally:
        if process is not None:
            process.wait()
        if words is not None:
            words.thread.join()
    return words.kept, process.returncode


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait until the block is through: a process that is just being started would be left to itself."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # an interrupt comes to the main thread alone, and to none where it is ignored
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[-1])


def _terminal_environment() -> dict[str, str]:
    """Give the environment in which rich draws into a pipe as on our terminal."""
    environment = {**os.environ, "TTY_COMPATIBLE": "1"}
    with contextlib.suppress(OSError, ValueError):
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
        environment |= {"COLUMNS": str(columns)} if columns else {}
    return environment


class _Words:
    """What a process says on a pipe: its end is kept, and all of it goes to `shown` as it comes."""

    def __init__(self, process: subprocess.Popen[bytes], *, shown: TextIO | None) -> None:
        pipe = process.stderr
        if pipe is None:
            raise RuntimeError("the process has no pipe")
        self.kept = ""
        self.thread = threading.Thread(target=self._listen, args=(pipe, shown), name="das-augment-words", daemon=True)
        self.thread.start()

    def _listen(self, pipe: IO[bytes], shown: TextIO | None) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with pipe:
            while piece := os.read(pipe.fileno(), 65_536):
                text = decoder.decode(piece)
                self.kept = (self.kept + text)[-_KEPT_LETTERS:]
                if shown is not None:
                    with contextlib.suppress(OSError, ValueError):  # a terminal that went away: the join goes on
                        shown.write(text)
                        shown.flush()


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None
