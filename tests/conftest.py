"""Real servers, real folders: the fixtures that all tests share."""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

import pytest
import redis

from das_service.settings import Settings, load_settings
from das_service.up.embedded import find_server, free_port, server_arguments, start_server, wait_until_ready

ROOT = Path(__file__).resolve().parent.parent
REDIS = ROOT / ".venv" / "redis" / "redis-server"
STRACE = shutil.which("strace") or str(ROOT / ".venv" / "redis" / "strace")
collect_ignore = [] if Path(STRACE).exists() else ["faults/test_fsync.py"]
PROGRAMS = {"valkey": None, **({"redis": REDIS} if REDIS.exists() else {})}


def pytest_report_header() -> list[str]:
    """Say which servers the tests run on, and what is left out because it could not be had."""
    left_out = [] if Path(STRACE).exists() else ["no strace: tests/faults/test_fsync.py is left out"]
    return [f"servers: {', '.join(sorted(PROGRAMS))}", *left_out]


@dataclass
class Server:
    """A real server that a test may kill and start again on the same folder."""

    program: Path
    folder: Path
    port: int
    arguments: dict[str, str] = field(default_factory=dict)
    process: "Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, protocol=2, socket_timeout=10.0)

    def start(self) -> None:
        extra = [text for name, value in self.arguments.items() for text in (f"--{name}", value)]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = start_server(
            [*server_arguments(self.folder, port=self.port), *extra],
            program=self.program,
            log_file=self.folder / "server.log",
        )
        wait_until_ready(self.url, process=self.process)

    def kill(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()
            self.process = None


def _program(name: str) -> Path:
    return PROGRAMS[name] or find_server()


@pytest.fixture(scope="session", params=sorted(PROGRAMS))
def shared_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server of each kind for the whole run; tests that use it run once on each."""
    server = Server(program=_program(request.param), folder=tmp_path_factory.mktemp("server"), port=free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """A running server, empty."""
    with shared_server.client() as client:
        client.flushall()
    return shared_server


@pytest.fixture(params=sorted(PROGRAMS))
def own_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A running server of the test's own, to be killed and restarted."""
    server = Server(program=_program(request.param), folder=tmp_path / "server", port=free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> Settings:
    """Settings of a service on the shared server and folders of its own."""
    return make_settings(server, tmp_path)


def make_settings(server: Server, folder: Path, **overrides: object) -> Settings:
    """Give settings that point at the server and at folders under `folder`."""
    values = {
        "redis_url": server.url,
        "tables_uri": str(folder / "tables"),
        "snapshots_uri": str(folder / "snapshots"),
        "disk_reserve_bytes": 0,
        "commit_seconds": 0.2,
        **overrides,
    }
    return load_settings({}, **values)
