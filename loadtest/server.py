"""A bare server for stages that need no API: the program and the settings of `das up`, with `appendfsync always`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from das_service.settings import Settings, load_settings
from das_service.up.embedded import find_server, free_port, server_arguments, start_server, wait_until_ready


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[Settings]:
    """Run a server on a folder; give the settings of a role that works with it and with tables in that folder."""
    port = free_port()
    data = folder / "server"
    data.mkdir(parents=True)
    process = start_server(
        server_arguments(data, port=port), program=find_server(), log_file=folder / "server.log"
    )  # fmt: skip
    url = f"redis://127.0.0.1:{port}/0"
    try:
        wait_until_ready(url, process=process)
        yield load_settings(
            {}, redis_url=url, tables_uri=str(folder / "tables"), snapshots_uri=str(folder / "snapshots")
        )  # fmt: skip
    finally:
        process.terminate()
        process.wait(timeout=60)
