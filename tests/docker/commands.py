"""The commands of `das`, to see whether what a file says can be typed."""

from collections.abc import Sequence
from typing import Any

import typer

from das_service.cli.app import build_app


def find_command(words: Sequence[str]) -> Any:
    """Give the command that the words begin with; a KeyError names the word that is none."""
    command: Any = typer.main.get_command(build_app())
    rest = list(words)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    return command
