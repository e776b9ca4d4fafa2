"""`das ingest` and `das labels`: hand in a file of examples, or of their outcomes, in bulk."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from das_service.cli.output import REFUSED, AsJson, InputError, Url, say, say_json, warn

if TYPE_CHECKING:
    import pyarrow as pa

    from das_service.client.ingest import IngestResult

_SHOWN_REASONS = 10
_HARMLESS = "(rows before it may be stored already; handing all in again changes nothing)"
_FORMATS = ("parquet", "arrow", "ndjson")
_Format = Annotated[
    str | None, typer.Option("--format", help="parquet, arrow or ndjson; default: by suffix or content.")
]
_Concurrency = Annotated[int, typer.Option(min=1, max=32, help="Requests in flight at once.")]
_RowsPerRequest = Annotated[int, typer.Option(min=1, max=100_000, help="Rows of one request.")]


def ingest(
    dataset: Annotated[str, typer.Argument(help="Name of the dataset.")],
    file: Annotated[str, typer.Argument(help="File of examples, `-` for stdin.")],
    file_format: _Format = None,
    concurrency: _Concurrency = 2,
    rows_per_request: _RowsPerRequest = 5_000,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Hand in a file of examples: Parquet, an Arrow stream or file, or one JSON object a line.

    Columns are example_id, event_time and the dataset's features. A row counts as accepted once it is on disk; rows
    with bad values are left out and the exit code is 1. Handing in the same again changes nothing.

    Example: das ingest ads examples.parquet

    Example: zcat log.ndjson.gz | das ingest ads -
    """
    from das_service.cli.example_files import example_types

    _hand_in(
        dataset, file, file_format, example_types, concurrency, rows_per_request, url, is_labels=False, as_json=as_json
    )


def labels(
    dataset: Annotated[str, typer.Argument(help="Name of the dataset.")],
    file: Annotated[str, typer.Argument(help="File of labels, `-` for stdin.")],
    file_format: _Format = None,
    concurrency: _Concurrency = 2,
    rows_per_request: _RowsPerRequest = 5_000,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Hand in a file of labels: Parquet, an Arrow stream or file, or one JSON object a line.

    Columns are example_id, label_time and the dataset's tasks, each a number from 0 to 1 or null. A row counts as
    accepted once it is on disk; rows with bad values are left out and the exit code is 1. Handing in the same again
    changes nothing.

    Example: das labels ads clicks.parquet
    """
    from das_service.cli.example_files import label_types

    _hand_in(
        dataset, file, file_format, label_types, concurrency, rows_per_request, url, is_labels=True, as_json=as_json
    )


def _hand_in(
    dataset: str,
    file: str,
    file_format: str | None,
    types_of: "Callable[[Mapping[str, Any]], dict[str, pa.DataType]]",
    concurrency: int,
    rows_per_request: int,
    url: str | None,
    *,
    is_labels: bool,
    as_json: bool,
) -> None:
    from das_service.cli.example_files import ExampleFileError, open_examples
    from das_service.client import Client

    if file_format is not None and file_format not in _FORMATS:
        raise InputError(f"--format {file_format} is not one of {', '.join(_FORMATS)}")
    started = time.monotonic()
    with Client(url) as client:
        types = types_of(client.get_dataset(dataset))
        send = client.label_batches if is_labels else client.ingest_batches
        try:
            with (
                open_examples(
                    file,
                    stdin=sys.stdin.buffer,
                    file_format=file_format,  # type: ignore[arg-type]
                    types=types,
                    rows=rows_per_request,
                ) as rows,
                _progress(rows.num_rows) as progress,
            ):
                result = send(
                    dataset,
                    rows.tables,
                    concurrency=concurrency,
                    rows_per_request=rows_per_request,
                    on_progress=progress,
                )
        except ExampleFileError as error:
            raise InputError(f"{error}\n  {_HARMLESS}") from error
    _report(result, time.monotonic() - started, as_json=as_json)
    if result.rejected:
        raise typer.Exit(REFUSED)


class _Progress(Protocol):
    def __call__(self, result: "IngestResult") -> None: ...


@contextmanager
def _progress(num_rows: int | None) -> Iterator[_Progress]:
    """Show a bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:,.0f} rows/s")

    console = Console(stderr=True)
    columns = (TextColumn("{task.completed:,.0f} rows"), BarColumn(), Speed(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("ingest", total=num_rows)
        yield lambda result: bar.update(task, completed=result.accepted + result.rejected)


def _report(result: "IngestResult", seconds: float, *, as_json: bool) -> None:
    errors = [
        {"row": e.row, "example_id": e.example_id, "column": e.column, "code": e.code, "message": e.message}
        for e in result.errors
    ]
    if as_json:
        say_json(
            {
                "accepted": result.accepted,
                "rejected": result.rejected,
                "errors": errors,
                "errors_truncated": result.errors_truncated,
                "seconds": round(seconds, 3),
            }
        )
        return
    rows = result.accepted + result.rejected
    say(f"{result.accepted:,} rows accepted, {result.rejected:,} rejected, {rows / max(seconds, 1e-9):,.0f} rows/s")
    for error in errors[:_SHOWN_REASONS]:
        warn(f"  row {error['row']} ({error['example_id']}), {error['column']}: {error['message']}")
    if result.rejected > _SHOWN_REASONS:
        warn(f"  ... {result.rejected - min(len(errors), _SHOWN_REASONS):,} more; --json shows the first 1,000")
