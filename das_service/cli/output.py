"""What the command line says and how it fails: plain words on stderr, machine-readable output on stdout.

A command prints its result on stdout, as JSON where `--json` asks for it; progress and trouble go to stderr, so that
a pipe carries the result alone.
"""

import base64
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from das_service.client import DasClientError

REFUSED, MISUSED = 1, 2
_SHOWN_ROWS = 10

Url = Annotated[
    str | None, typer.Option("--url", help="Address of the API. Default: DAS_API_URL, else http://127.0.0.1:8000.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


class PlainGroup(TyperGroup):
    """Commands whose expected failures end in a sentence and an exit code; bugs keep their stack trace."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # noqa: ANN401 - a subclass of what it names
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            known = explain(error)
            if known is None:
                raise
            message, code = known
            warn(f"das: {message}")
            raise typer.Exit(code) from None

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401 - as in invoke
        """Give a command, its help wrapped by the terminal alone: typer keeps a docstring's own line breaks."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help:
            paragraphs = inspect.cleandoc(command.help).split("\n\n")
            command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        return command


def explain(error: Exception) -> tuple[str, int] | None:
    """Give the sentence and the exit code for a failure that can be expected, None for a bug of ours."""
    from das_service.client import DasClientError

    if isinstance(error, DasClientError):
        return _explain_refusal(error), REFUSED
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror), MISUSED
    if type(error).__module__.split(".")[0] in {"pyarrow", "json"}:
        return f"the input can't be read: {error}", MISUSED
    code = _EXPECTED.get(f"{type(error).__module__}.{type(error).__name__}")
    return None if code is None else (str(error), code)


# By name, because importing them would cost every command the start-up time of the service.
_EXPECTED = {
    "das_service.cli.output.InputError": MISUSED,
    "das_service.settings.SettingsError": MISUSED,
    "das_service.up.service_folder.FolderInUseError": MISUSED,
    "das_service.up.service_layout.PortInUseError": MISUSED,
    "das_service.up.embedded.NoServerError": MISUSED,
    "das_service.up.supervisor.SupervisorError": MISUSED,
    "das_service.snapshot_folder.SnapshotError": MISUSED,
    "schemas.wire.TruncatedStreamError": REFUSED,
}


class InputError(Exception):
    """What was given to a command can't be used; the message says why and what would do."""


def _explain_refusal(error: "DasClientError") -> str:
    from das_service.client import RowsRefusedError

    lines = [error.detail]
    if error.code == "unreachable":
        lines.append("is the service running? `das up` starts it; --url or DAS_API_URL say where it is")
    if isinstance(error, RowsRefusedError):
        lines += [f"row {row.row}, {row.column or 'all columns'}: {row.message}" for row in error.errors[:_SHOWN_ROWS]]
    for difference in error.problem.get("differences") or ():
        stored, declared = json.dumps(difference.get("stored")), json.dumps(difference.get("declared"))
        lines.append(f"{difference.get('field')}: stored {stored}, declared {declared}")
    return "\n  ".join(lines)


def say(text: str) -> None:
    """Print a result."""
    typer.echo(text)


def warn(text: str) -> None:
    """Print progress or trouble."""
    typer.echo(text, err=True)


def say_json(value: Any) -> None:  # noqa: ANN401 - whatever JSON spells
    """Print a result for machines."""
    typer.echo(json.dumps(value, indent=2, default=_as_json))


def _as_json(value: Any) -> str:  # noqa: ANN401
    """Give what JSON has no type for as the API does: bytes as base64, times as RFC 3339."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else str(value)


def say_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str) -> None:
    """Print rows under column names, or what `empty` says where there are none."""
    if not rows:
        say(empty)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*["" if value is None else str(value) for value in row])
    Console().print(table)


def read_text(path: str) -> str:
    """Give a file's text, `-` for stdin.

    Raises:
        InputError: It is not UTF-8.
    """
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8: {error}") from error


def read_json_file(path: str) -> dict[str, Any]:
    """Give the JSON object in a file, `-` for stdin.

    Raises:
        InputError: It is not one.
    """
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise InputError(f"{path} holds no JSON object")
    return dict(value)
