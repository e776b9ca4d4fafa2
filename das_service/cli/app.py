"""The typer application: which commands there are. Each topic has a file of its own."""

from collections.abc import Callable

import typer

from das_service.cli.augment import augment
from das_service.cli.backfill import backfill
from das_service.cli.batches import batches
from das_service.cli.dataset import dataset_app
from das_service.cli.dead_letters import dead_letters_app
from das_service.cli.ingest import ingest, labels
from das_service.cli.lookup import lookup
from das_service.cli.output import PlainGroup
from das_service.cli.roles import api, compact, demo, recover, sink, up, worker
from das_service.cli.snapshot import fm_app, snapshot_app
from das_service.cli.status import status

_RUN, _USE, _KEEP = "Run the service", "Use it", "Keep it well"


def build_app() -> typer.Typer:
    """Give the command line."""
    app = typer.Typer(
        cls=PlainGroup,
        name="das",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        add_completion=False,
        help="Run the teacher once per example; hand its supervision to every student.\n\nStart: das up",
    )
    run: tuple[Callable[..., None], ...] = (up, api, worker, sink)
    keep: tuple[Callable[..., None], ...] = (status, backfill, recover, compact)
    for command in run:
        app.command(rich_help_panel=_RUN)(command)
    handed_on = {"ignore_unknown_options": True, "allow_extra_args": True}
    app.command(rich_help_panel=_RUN, context_settings=handed_on)(demo)
    app.add_typer(dataset_app, name="dataset", rich_help_panel=_USE)
    app.command(rich_help_panel=_USE)(ingest)
    app.command(rich_help_panel=_USE)(labels)
    app.command(rich_help_panel=_USE)(lookup)
    app.command(rich_help_panel=_USE)(augment)
    app.command(rich_help_panel=_USE)(batches)
    app.add_typer(fm_app, name="fm", rich_help_panel=_USE)
    app.add_typer(snapshot_app, name="snapshot", rich_help_panel=_USE)
    for command in keep:
        app.command(rich_help_panel=_KEEP)(command)
    app.add_typer(dead_letters_app, name="dead-letters", rich_help_panel=_KEEP)
    return app
