"""`das batches`: training batches read from the tables themselves, where they are."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from das_service.cli.folder import tables_settings
from das_service.cli.output import InputError

if TYPE_CHECKING:
    import redis

    from das_service.batches.request import BatchParameters
    from das_service.batches.stream import BatchStream, Reading
    from das_service.settings import Settings

_POLL_SECONDS = 0.5


def batches(
    dataset: Annotated[str, typer.Argument(help="Name of the dataset.")],
    query: Annotated[str, typer.Argument(help="As after the ? of GET .../batches: fms=teacher&batch_rows=4096.")] = "",
    output: Annotated[Path | None, typer.Option("--output", help="File to write; default: stdout.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="A folder of `das up`; default: where DAS_TABLES_URI says.")
    ] = None,
) -> None:
    """Write closed rows, with features, labels and supervision, as an Arrow stream: what GET .../batches answers.

    The same cursors, the same bytes, read from the tables themselves: on the machine of `das up` (--folder), or
    wherever DAS_TABLES_URI (and DAS_STORAGE_OPTIONS) lead. The service need not run, but for as_of, which the server of
    the logs must settle.

    Example: das batches ads 'fms=teacher&from=2024-05-01T00:00:00Z' --output rows.arrows --folder das-data
    """
    from das_service.errors import DasError
    from das_service.settings import load_settings

    if output is None and sys.stdout.isatty():
        raise InputError("an Arrow stream is nothing for a terminal: name a file with --output, or pipe it on")
    settings = load_settings(None, **tables_settings(folder))
    try:
        asked = _parse(query)
        with _opened(settings, dataset, asked) as stream:
            _write(stream, asked.max_rows, output)
    except DasError as error:
        raise InputError(error.detail) from error
    except BrokenPipeError:  # whoever reads has enough
        sys.stderr.close()


def _parse(query: str) -> "BatchParameters":
    from urllib.parse import parse_qs

    from pydantic import ValidationError

    from das_service.batches.request import BatchParameters, refuse_endless

    given = parse_qs(query, keep_blank_values=True)
    names = {field.alias or name: field for name, field in BatchParameters.model_fields.items()}
    unknown = [name for name in given if name not in names]
    if unknown:
        raise InputError(f"there is no parameter {', '.join(unknown)}; there are {', '.join(names)}")
    values = {n: v if n in {"fms", "outputs", "columns", "snapshot"} else v[-1] for n, v in given.items()}
    try:
        asked = BatchParameters.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    refuse_endless(asked, as_json=False)
    return asked


@contextmanager
def _opened(settings: "Settings", dataset: str, asked: "BatchParameters") -> Iterator["BatchStream"]:
    from das_service.batches.as_of import refuse_open_as_of
    from das_service.batches.query import BatchQuery
    from das_service.batches.request import open_stream
    from das_service.redis_client import UNREACHABLE, connect
    from das_service.registry import Catalog

    def settle(catalog: Catalog, wanted: BatchQuery) -> None:
        try:
            refuse_open_as_of(client, reading.folder, catalog, dataset, wanted, now=datetime.now(UTC))
        except UNREACHABLE as error:
            raise InputError(
                "as_of can't be settled: the server of the logs can't be reached, and it alone knows what is still on "
                "its way into the tables; start it, or leave as_of out and keep the cursor"
            ) from error

    with connect(settings) as client, _reading(settings, client) as reading:
        yield open_stream(reading, dataset, asked, settle=settle)


@contextmanager
def _reading(settings: "Settings", client: "redis.Redis") -> Iterator["Reading"]:
    from das_service.batches.stream import PageBudget, Reading, page_pool
    from das_service.folder import Folder
    from das_service.freed_memory import keep_freed_memory
    from das_service.registry import Registry, parse_catalog
    from das_service.tables.duck import Duck

    keep_freed_memory()
    tables = Folder(settings.tables_uri, settings.storage_options)
    registry = Registry(client, tables)  # of which the copy beside the tables is read, without the server
    duck, pool = Duck(memory_bytes=settings.duckdb_memory_bytes, joins_as_written=True), page_pool()
    try:
        yield Reading(
            duck=duck,
            pool=pool,
            folder=tables,
            catalog=lambda: parse_catalog(registry.read_copy()),
            budget=PageBudget(total_bytes=settings.batches_memory_bytes),
            count=lambda *_: None,
        )
    finally:
        pool.shutdown(cancel_futures=True)
        duck.close()


def _write(stream: "BatchStream", max_rows: int | None, output: Path | None) -> None:
    if output is None:
        _write_parts(stream, max_rows, sys.stdout.buffer)
        return
    with output.open("wb") as file:
        _write_parts(stream, max_rows, file)


def _write_parts(stream: "BatchStream", max_rows: int | None, file: IO[bytes]) -> None:
    for part in stream.iter_parts(max_rows=max_rows):
        if part is None:
            time.sleep(_POLL_SECONDS)
        else:
            file.write(part)
            file.flush()
