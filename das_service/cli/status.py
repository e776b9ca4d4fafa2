"""`das status`: one screen that says how the service is."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from das_service.cli.output import REFUSED, AsJson, Url, say_json


def status(
    url: Url = None,
    folder: Annotated[Path, typer.Option("--folder", help="Folder of `das up`, asked where the API is silent.")] = Path(
        "das-data"
    ),
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong, what runs, and how far each dataset is.

    Works without the API too, with what the supervisor of `das up` knows; exits with 1 where nothing runs at all.

    Example: das status --json | jq .roles
    """
    from das_service.up.service_status import look

    state = look(url, folder)
    if as_json:
        say_json(state)
    else:
        _show(url, folder, state, watch=watch)
    raise typer.Exit(REFUSED if state["source"] == "nobody" else 0)


def _show(url: str | None, folder: Path, state: dict[str, Any], *, watch: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from das_service.cli.status_view import build_view
    from das_service.up.service_status import look

    console = Console()
    former, seen_at = state, time.monotonic()
    time.sleep(1.0 if state.get("datasets") else 0.0)
    state = look(url, folder)
    if not watch:
        console.print(build_view(state, former, seconds=time.monotonic() - seen_at))
        return
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            now = time.monotonic()
            live.update(build_view(state, former, seconds=now - seen_at), refresh=True)
            former, seen_at = state, now
            time.sleep(1.0)
            state = look(url, folder)
