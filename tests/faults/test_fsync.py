"""I1 on the disk's side: what is acknowledged was fsynced, counted under strace; SIGKILL could not show its absence."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from das_service.client import Client
from das_service.redis_client import script
from das_service.up.embedded import find_server
from das_service.up.supervisor import running_service
from schemas import keys
from tests.conftest import ROOT, STRACE, Server, make_settings
from tests.declared import Declared, examples
from tests.faults.kills import wait_for
from tests.faults.traffic import SPEC, rows

NUM_BATCHES = 40


@pytest.fixture
def traced_server(tmp_path: Path) -> Path:
    """Give a folder with a `valkey-server` that is the real one, traced by a process beside it (-D) to trace.*."""
    folder = tmp_path / "bin"
    folder.mkdir()
    wrapper = folder / "valkey-server"
    command = f"exec {STRACE} -D -ff -e trace=fsync,fdatasync -o {tmp_path}/trace {find_server()}"
    wrapper.write_text(f'#!/bin/sh\n{command} "$@"\n')
    wrapper.chmod(0o755)
    return folder


def count_syncs(folder: Path) -> int:
    lines = [line for path in folder.glob("trace*") for line in path.read_text().splitlines()]
    return sum(bool(re.search(r"\bf(data)?sync\(\d+\)\s+= 0", line)) for line in lines)


def test_the_server_of_das_up_syncs_for_each_acknowledged_batch(tmp_path: Path, traced_server: Path) -> None:
    path = {"PATH": f"{traced_server}{os.pathsep}{os.environ['PATH']}"}
    with (
        running_service(folder=tmp_path / "das", env_overrides=path, roles=("api", "sink")) as service,
        Client(service.url) as client,
    ):
        client.put_dataset("faults", SPEC)
        before = count_syncs(tmp_path)
        for i in range(NUM_BATCHES):
            result = client.ingest("faults", rows(i * 10, 10))
            assert result.accepted == 10
            assert count_syncs(tmp_path) > before + i


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    from das_service.up.embedded import free_port

    server = Server(program=find_server(), folder=tmp_path / "server", port=free_port())
    server.start()
    yield server
    server.stop()


def test_the_sink_syncs_files_commit_and_mark_before_it_frees_the_log(tmp_path: Path, server: Server) -> None:
    with contextlib.closing(server.client()) as client:
        declared = Declared(make_settings(server, tmp_path), client)
        declared.append(0, examples(0, 100))
        trace = tmp_path / "sink.trace"
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("DAS_")},
            "DAS_REDIS_URL": server.url,
            "DAS_TABLES_URI": declared.settings.tables_uri,
            "DAS_COMMIT_SECONDS": "0.2",
        }
        command = [STRACE, "-f", "-y", "-s", "400", "-e", "trace=fsync,fdatasync,sendto,write", "-o", str(trace)]
        sink = subprocess.Popen(
            [*command, sys.executable, "-m", "das_service.cli", "sink"], env=environment, cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            log = keys.log("ads", 0, "examples")
            wait_for(lambda: client.xlen(log) == 0, seconds=90, what="freeing the log")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(sink.pid, signal.SIGKILL)
            sink.wait()
    lines = trace.read_text(errors="replace").splitlines()
    freed = next(i for i, line in enumerate(lines) if script("trim").sha in line)
    synced = [line for line in lines[:freed] if "sync(" in line]
    for what in ("part-", "_delta_log", "0000001.json", "examples.durable"):
        assert any(what in line for line in synced), f"{what} is not synced before the log is freed"
