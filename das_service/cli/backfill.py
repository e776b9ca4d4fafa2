"""`das backfill`: scores stored examples with the snapshots that would have been the newest at their time."""

import os
from pathlib import Path
from typing import Annotated

import typer

from das_service.cli.folder import folder_settings
from das_service.cli.output import AsJson
from das_service.cli.roles import become_module


def backfill(
    dataset: Annotated[str | None, typer.Argument(help="Name of the dataset. Default: the only one.")] = None,
    *,
    fm: Annotated[str, typer.Option("--fm", help="FM whose snapshots score.")],
    since: Annotated[str, typer.Option("--from", help="First event_time: a date, or a time with its offset.")],
    until: Annotated[str, typer.Option("--to", help="End of the event times, exclusive.")],
    rows_per_second: Annotated[
        float | None, typer.Option("--rows-per-second", help="Score no more than that. Default: as live traffic lets.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would be scored, and score nothing.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Don't wait until the sink has committed it.")] = False,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="A folder of `das up`, which must be running.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score stored examples again, each with the newest snapshot that has not seen its label.

    Examples that have this snapshot's row already are left out, so that it can be run again after whatever cut it; so
    are those that the FM's workers have still to score. It gives way to live traffic. Nothing that was scored before
    changes, and nothing is counted again. Runs on this machine with DAS_DEVICE, beside the workers.

    Example: das backfill ads --fm ranker --from 2026-03-01 --to 2026-04-01 --folder das-data
    """
    for name, value in folder_settings(folder).items():
        os.environ[f"DAS_{name}".upper()] = value
    arguments = [] if dataset is None else [dataset]
    arguments += ["--fm", fm, "--from", since, "--to", until]
    arguments += [] if rows_per_second is None else ["--rows-per-second", str(rows_per_second)]
    flags = {"--dry-run": dry_run, "--no-wait": no_wait, "--json": as_json}
    arguments += [flag for flag, is_set in flags.items() if is_set]
    become_module("fm_inference.backfill", needs="torch", hint="pip install 'das-service[worker]'", arguments=arguments)
