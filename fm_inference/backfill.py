"""`python -m fm_inference.backfill`: scores stored examples; `das backfill` runs it."""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import duckdb
import pyarrow as pa
import redis
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from das_service.cli.output import MISUSED, REFUSED, InputError, say, say_json, warn
from das_service.errors import DasError, UnavailableError
from das_service.folder import Folder
from das_service.redis_client import connect
from das_service.registry import Catalog, read_catalog
from das_service.settings import Settings, SettingsError, load_settings
from das_service.snapshot_folder import SnapshotError
from das_service.stop_signals import set_by_signals
from fm_inference.backfill_run import Backfill, BackfillQuery, Tally
from fm_inference.lane import refusal
from fm_inference.outputs import first_line
from fm_inference.publishing import microseconds
from fm_inference.threads import bound_threads

STOPPED = 130
_NICE = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a backfill with the settings of the environment; give the exit code. arguments: default the process's own."""
    asked = _parser().parse_args(arguments)
    try:
        settings = load_settings()
        if arguments is None:
            _take_little(settings)
        started = time.monotonic()
        tally = _run(settings, asked)
    except (SettingsError, InputError) as error:
        return _fail(str(error), MISUSED)
    except DasError as error:
        return _fail(error.detail, REFUSED)
    except SnapshotError as error:
        return _fail(f"a snapshot can't be loaded: {error}", REFUSED)
    except (redis.exceptions.RedisError, OSError, duckdb.IOException, duckdb.OutOfMemoryException) as error:
        return _fail(f"the server of the logs or the tables can't be used ({error}); run it again: it goes on", REFUSED)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _fail(f"too little memory for the model ({first_line(error)}); DAS_DEVICE names another", REFUSED)
    _report(tally, time.monotonic() - started, asked)
    return STOPPED if tally.stopped else 0


def _take_little(settings: Settings) -> None:
    """Bound the threads of this process, and let the others on the machine come first."""
    bound_threads(settings)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(settings.torch_threads)
    pa.set_cpu_count(settings.torch_threads)
    os.nice(_NICE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="das backfill")
    parser.add_argument("dataset", nargs="?")
    parser.add_argument("--fm", required=True)
    parser.add_argument("--from", dest="since", required=True)
    parser.add_argument("--to", dest="until", required=True)
    parser.add_argument("--rows-per-second", type=float)
    for flag in ("--dry-run", "--no-wait", "--json"):
        parser.add_argument(flag, action="store_true")
    return parser


def parse_moment(text: str, option: str) -> datetime:
    """Give the time that an option names; a date is its midnight in UTC.

    Raises:
        InputError: It is no ISO 8601 time, or one without an offset.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{option} {text!r} is no time: write 2026-03-01 or 2026-03-01T12:00:00Z") from None
    if moment.tzinfo is None:
        if len(text) > len("2026-03-01"):
            raise InputError(f"{option} {text!r} has no offset from UTC: add Z")
        moment = moment.replace(tzinfo=UTC)
    return moment


def _run(settings: Settings, asked: argparse.Namespace) -> Tally:
    since, until = parse_moment(asked.since, "--from"), parse_moment(asked.until, "--to")
    if since >= until:
        raise InputError(f"--from {asked.since} must be before --to {asked.until}")
    if asked.rows_per_second is not None and not 0 < asked.rows_per_second < float("inf"):
        raise InputError("--rows-per-second must be above 0")
    with _stopped_by_signals() as stopping, connect(settings) as client:
        catalog = read_catalog(client)
        query = BackfillQuery(
            dataset=asked.dataset or _only_dataset(catalog),
            fm=asked.fm,
            first_us=microseconds(since),
            end_us=microseconds(until),
            rows_per_second=asked.rows_per_second,
            dry_run=asked.dry_run,
            wait=not asked.no_wait,
        )
        refused = refusal(client, Folder(settings.tables_uri, settings.storage_options), query.dataset)
        if refused:
            raise UnavailableError(refused, code="log_lost")
        with _progress() as on_progress:
            return Backfill(settings, client, catalog, query, stopping=stopping, on_progress=on_progress).run()


def _only_dataset(catalog: Catalog) -> str:
    names = sorted(catalog.datasets)
    if len(names) != 1:
        raise InputError(f"say which dataset it is: {', '.join(names) or 'none is declared'}")
    return names[0]


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """Give an event that SIGINT and SIGTERM set; a second one ends the process as usual."""
    stopping = threading.Event()
    with set_by_signals(stopping, also=lambda number: signal.signal(number, signal.SIG_DFL)):
        yield stopping


@contextmanager
def _progress() -> Iterator[Callable[[Tally], None]]:
    """Show a bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.completed:,.0f} rows"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("backfill", total=None)
        yield lambda tally: bar.update(task, completed=tally.rows, total=tally.total_rows)


def _report(tally: Tally, seconds: float, asked: argparse.Namespace) -> None:
    done = tally.scored.total()
    if asked.json:
        said: dict[str, Any] = {
            "rows": tally.rows, "scored": dict(sorted(tally.scored.items())), "already": tally.already,
            "too_early": tally.too_early, "pending": tally.pending, "failed": tally.failed, "reasons": tally.reasons,
            "committed": tally.committed, "stopped": tally.stopped, "dry_run": asked.dry_run,
            "seconds": round(seconds, 3),
        }  # fmt: skip
        say_json(said)
        return
    verb = "to score" if asked.dry_run else "scored"
    by_snapshot = ", ".join(f"{number:,} with {name}" for name, number in sorted(tally.scored.items()))
    say(f"{tally.rows:,} rows looked at, {done:,} {verb}{f' ({by_snapshot})' if by_snapshot else ''}, {seconds:.1f} s")
    skipped = {
        "have their row already": tally.already, "are older than every snapshot": tally.too_early,
        "are left to the FM's workers": tally.pending, "failed": tally.failed,
    }  # fmt: skip
    for what, number in skipped.items():
        if number:
            say(f"  {number:,} {what}")
    for reason in tally.reasons:
        warn(f"das: {reason}")
    if tally.stopped:
        warn("das: stopped; run it again: it goes on")


def _fail(message: str, code: int) -> int:
    warn(f"das: {message}")
    return code


if __name__ == "__main__":
    sys.exit(main())
