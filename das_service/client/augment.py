"""`das augment` as a process: the join by reference needs the service's packages and the client does not have them."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from das_service.client.errors import DasClientError


def run_augment(
    arguments: Sequence[str], options: Mapping[str, Sequence[object]], *, flags: Sequence[str]
) -> dict[str, Any]:
    """Give what `das augment --json` prints; its progress bar and its words go to our stderr.

    Raises:
        DasClientError: It was refused (code `augment_refused`), with what it said.
    """
    command = [sys.executable, "-m", "das_service.cli", "augment", "--json", *flags]
    command += [f"{name}={value}" for name, values in options.items() for value in values]
    shown = None if sys.stderr.isatty() else subprocess.PIPE  # a terminal shows the bar, others get the words here
    done = subprocess.run([*command, "--", *arguments], stdout=subprocess.PIPE, stderr=shown, text=True, check=False)  # noqa: S603 - our own module
    answer = _parse(done.stdout)
    if done.returncode == 0 and answer is not None:
        sys.stderr.write(done.stderr or "")
        return answer
    said = (done.stderr or "").strip().removeprefix("das: ")
    raise DasClientError(said or f"`das augment` ended with code {done.returncode}", code="augment_refused")


def _parse(text: str) -> dict[str, Any] | None:
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None
