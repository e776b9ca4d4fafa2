"""Commands that run the service: up, one role at a time, recovery, compaction, the demo."""

import importlib.util
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from das_service.cli.folder import folder_settings
from das_service.cli.output import MISUSED, REFUSED, AsJson, say, say_json, warn

if TYPE_CHECKING:
    from das_service.settings import Settings

Folder = Annotated[Path, typer.Option("--folder", help="Where the log, the tables, snapshots and output live.")]


def up(
    folder: Folder = Path("das-data"),
    port: Annotated[
        int | None,
        typer.Option(
            "--port", min=0, max=65_535, help="Port of the API; 0 = any that is free. Default: DAS_BIND's, 8000."
        ),
    ] = None,
    no_api: Annotated[bool, typer.Option("--no-api", help="Run no API here.")] = False,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Run no FM worker here.")] = False,
    no_sink: Annotated[bool, typer.Option("--no-sink", help="Run no sink here.")] = False,
) -> None:
    """Run the whole service on this machine, until Ctrl-C.

    One process per role, restarted when it ends: a Valkey or Redis server with at most 40 % of the memory (not where
    DAS_REDIS_URL names one), the API, a worker, the sink. Everything is kept in the folder; the next `das up` on it
    goes on from there.

    Example: das up --folder /data/das --port 8000
    """
    from das_service.up.service_layout import lay_out
    from das_service.up.supervisor import Supervisor

    left_out = {"api": no_api, "worker": no_worker, "sink": no_sink}
    roles = [role for role, out in left_out.items() if not out]
    raise typer.Exit(Supervisor(lay_out(folder, roles=roles, port=port), say=say).run())


def api() -> None:
    """Run the API alone, with the settings of DAS_* variables.

    It listens on DAS_BIND, 127.0.0.1:8000 by default. Without tokens it serves this machine alone and refuses another
    address; DAS_TOKENS_FILE names a file of tokens, docs/configuration.md says how to make one.

    Example: DAS_REDIS_URL=redis://log:6379/0 DAS_TABLES_URI=/data/tables das api
    """
    settings = _start_role()
    from das_service.app import describe_access, main

    warn(f"das api: {describe_access(settings)}")
    raise typer.Exit(main(settings))


def sink() -> None:
    """Run the sink alone: it commits the logs to the tables and frees them.

    Example: DAS_REDIS_URL=redis://log:6379/0 DAS_TABLES_URI=/data/tables das sink
    """
    settings = _start_role()
    from das_service.sink.sink import main

    raise typer.Exit(main(settings))


def worker() -> None:
    """Run one FM worker: it validates snapshots and scores examples. One per device.

    Example: DAS_REDIS_URL=redis://log:6379/0 DAS_DEVICE=cuda:0 das worker
    """
    become_module("fm_inference", needs="torch", hint="pip install 'das-service[worker]', or `das up --no-worker`")


def demo(context: typer.Context) -> None:
    """Run the whole service on public data and count everything back.

    --weeks N streams the first N of the 27 weeks after the teacher's; --folder DIR keeps everything elsewhere than in
    demo-data, which is emptied first.

    Example: das demo --weeks 3
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads must not spin beside others' work
    become_module(
        "experiments.demo",
        needs="experiments",
        hint="the demo is part of the source tree, not of the installed package: clone it and run `make demo`",
        arguments=context.args,
    )


def recover(
    folder: Annotated[
        Path | None, typer.Option("--folder", help="A folder of `das up`, which must be running, whose log was lost.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Accept that the server lost its log, and begin a new epoch from the tables.

    Needed after log_lost or log_rewound alone: what was acknowledged and is in neither the log nor the tables is given
    up, and said.

    Example: das recover --folder das-data
    """
    from redis.exceptions import RedisError

    from das_service.errors import DasError

    settings = _start_role(**folder_settings(folder))
    from das_service.recover import recover as run_recovery

    if not yes:
        typer.confirm("Rows that neither the server nor the tables have are given up. Go on?", abort=True, err=True)
    try:
        report = run_recovery(settings)
    except DasError as error:
        warn(f"das: {error.detail}")
        raise typer.Exit(0 if error.code == "nothing_lost" else REFUSED) from None
    except (RedisError, OSError) as error:
        warn(f"das: the server of the logs or the tables' folder can't be used ({error}); run it again when they can")
        raise typer.Exit(REFUSED) from None
    if as_json:
        say_json(asdict(report))
    else:
        say(str(report))


def compact(
    dataset: Annotated[str, typer.Argument(help="Dataset whose tables are compacted.")],
    folder: Annotated[
        Path | None, typer.Option("--folder", help="A folder of `das up`, which must be running.")
    ] = None,
    timeout_seconds: Annotated[float, typer.Option("--timeout-seconds", help="Longest wait for the sink.")] = 600.0,
) -> None:
    """Let the sink merge the small files of a dataset's tables now, instead of when there are many.

    Example: das compact ads --folder das-data
    """
    from das_service.redis_client import UNREACHABLE
    from das_service.sink.compact_request import request_compaction

    settings = _start_role(**folder_settings(folder))
    try:
        is_done = request_compaction(settings, dataset, timeout_seconds=timeout_seconds)
    except UNREACHABLE as error:
        warn(f"das: the server of the logs can't be reached ({error}): name it with --folder or DAS_REDIS_URL")
        raise typer.Exit(REFUSED) from None
    if not is_done:
        warn(f"das: the sink has not finished within {timeout_seconds:g} s; it goes on. `das status` says if one runs")
        raise typer.Exit(REFUSED)
    say(f"the tables of {dataset} are compact")


def _start_role(**overrides: str) -> "Settings":
    """Give the settings, with logging set up as they say."""
    import logging

    from das_service.settings import load_settings

    settings = load_settings(None, **overrides)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return settings


def become_module(module: str, *, needs: str, hint: str, arguments: list[str] | None = None) -> None:
    """Replace this process by `python -m module`: das_service imports nothing from above itself."""
    if importlib.util.find_spec(needs) is None:
        warn(f"das: {needs} is not installed: {hint}")
        raise typer.Exit(MISUSED)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *(arguments or [])])  # noqa: S606 - our own module
