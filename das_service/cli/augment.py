"""`das augment`: a trainer's Parquet files joined with supervision, where the tables are."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from das_service.cli.folder import tables_settings
from das_service.cli.output import AsJson, InputError, say, say_json, warn

if TYPE_CHECKING:
    from das_service.registry import Catalog
    from das_service.settings import Settings
    from das_service.supervision.augment_files import Summary


def augment(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Parquet file, or a folder of them.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Where the same rows go; a folder if IN is one.")],
    dataset: Annotated[str | None, typer.Option("--dataset", help="Dataset; default: the only one there is.")] = None,
    fm: Annotated[list[str] | None, typer.Option("--fm", help="FM, may be repeated; default: all.")] = None,
    output: Annotated[
        list[str] | None, typer.Option("--output", help="Task or embedding, may be repeated; default: all.")
    ] = None,
    max_freshness_gap_seconds: Annotated[
        float | None, typer.Option(min=0, max=1e12, help="A larger event_time - trained_through is stale.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="A folder of `das up`; default: where DAS_TABLES_URI says.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Append to each row of IN what FMs said of it: same rows, same order, in bounded memory.

    IN has example_id and event_time, and any columns of your own. Embeddings stay encoded (docs/training.md says how to
    decode them). The join reads the tables themselves, so it runs where they are: on the machine of `das up`
    (--folder), or wherever DAS_TABLES_URI (and DAS_STORAGE_OPTIONS) lead.

    Example: das augment clicks.parquet clicks-augmented.parquet --folder das-data

    Example: das augment clicks/ augmented/ --dataset ads --fm teacher --output click
    """
    from das_service.errors import DasError
    from das_service.freed_memory import keep_freed_memory
    from das_service.settings import load_settings

    if target.exists() and not overwrite:
        raise InputError(f"{target} is there already: choose another OUT, or say --overwrite")
    if not source.exists():
        raise InputError(f"there is no {source}")
    settings = load_settings(None, **tables_settings(folder))
    keep_freed_memory()
    started = time.monotonic()
    try:
        with _ended_orderly():
            summary = _augment(settings, source, target, dataset, fm, output, max_freshness_gap_seconds)
    except DasError as error:
        raise InputError(error.detail) from error
    except OSError as error:
        raise InputError(f"{target} can't be written: {error}") from error
    _report(summary, time.monotonic() - started, as_json=as_json)


def _augment(
    settings: "Settings",
    source: Path,
    target: Path,
    dataset: str | None,
    fms: list[str] | None,
    outputs: list[str] | None,
    max_gap_seconds: float | None,
) -> "Summary":
    from das_service.folder import Folder
    from das_service.redis_client import UNREACHABLE, connect
    from das_service.registry import Registry, parse_catalog
    from das_service.supervision.answer import LookupQuery
    from das_service.supervision.answer_size import bytes_per_row
    from das_service.supervision.augment_files import augment_files, list_sources, open_duck, refuse_unfit
    from das_service.supervision.join import OfflineJoin, window_rows

    tables = Folder(settings.tables_uri, settings.storage_options)
    sources = list_sources(source)
    with connect(settings) as client:
        catalog = parse_catalog(Registry(client, tables).read_copy())
        name = dataset or _only_dataset(catalog)
        catalog.spec(name)
        query = LookupQuery(
            fms=tuple(dict.fromkeys(fms or catalog.fms.get(name, {}))),
            outputs=tuple(outputs) if outputs else None,
            embedding_format="encoded",
            max_freshness_gap_seconds=max_gap_seconds,
        )
        duck = open_duck(settings.duckdb_memory_bytes)
        try:
            try:
                client.ping()
                join = OfflineJoin(duck, tables, catalog, name, query, client=client)
            except UNREACHABLE:
                warn("das: the server of the logs can't be reached: rows that are on their way are called missing")
                join = OfflineJoin(duck, tables, catalog, name, query, client=None)
            refuse_unfit(sources, join.schema.names)
            per_row = [bytes_per_row(catalog.fm(name, fm).outputs, query, as_json=False) for fm in query.fms]
            with _progress(sum(part.num_rows for part in sources)) as on_progress:
                return augment_files(
                    sources,
                    target,
                    join,
                    window_rows=window_rows(sum(per_row)),
                    as_folder=source.is_dir(),
                    on_progress=on_progress,
                )
        finally:
            duck.close()


@contextmanager
def _ended_orderly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that what it has begun is tidied up.

    A second one changes nothing: a terminal's Ctrl-C comes from the terminal and from the client. A second Ctrl-C does
    not wait for the tidying.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    former = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}  # nohup ignores

    def ignore(*_: object) -> None:
        """Hear one that has come already too, which SIG_IGN has Python complain of."""

    def end(*_: object) -> None:
        for number in former:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else ignore)
        raise KeyboardInterrupt

    for number in former:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _only_dataset(catalog: "Catalog") -> str:
    names = sorted(catalog.datasets)
    if len(names) != 1:
        known = ", ".join(names) or "none is declared"
        raise InputError(f"say which --dataset it is: {known}")
    return names[0]


@contextmanager
def _progress(num_rows: int) -> Iterator[Callable[["Summary"], None]]:
    """Show a bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.completed:,.0f} rows"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("augment", total=num_rows)
        yield lambda summary: bar.update(task, completed=summary.rows)


def _report(summary: "Summary", seconds: float, *, as_json: bool) -> None:
    from das_service.supervision.answer import STATUSES
    from das_service.supervision.augment_files import status_counts

    statuses = status_counts(summary, STATUSES)
    if as_json:
        say_json({"rows": summary.rows, "statuses": statuses, "seconds": round(seconds, 3)})
        return
    say(f"{summary.rows:,} rows, {summary.rows / max(seconds, 1e-9):,.0f} rows/s")
    for fm, counts in statuses.items():
        told = ", ".join(f"{number:,} {status}" for status, number in counts.items() if number)
        say(f"  {fm}: {told or 'no rows'}")
