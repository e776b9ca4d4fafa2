"""`das up` with its real processes: what it starts again, what it refuses, what is left when it ends."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis

from das_service.client import Client
from das_service.up.service_folder import FolderInUseError, ServiceFolder, owned
from das_service.up.service_layout import lay_out
from das_service.up.supervisor import RunningService, Supervisor, SupervisorError, running_service

ROLES = ("api", "sink")
WAIT_SECONDS = 60.0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    """A service without a worker (torch takes seconds to load), on a folder of its own."""
    with running_service(folder=tmp_path / "service", roles=ROLES) as running:
        yield running


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


def up(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `das up` to its end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DAS_")}
    return subprocess.run(
        [sys.executable, "-m", "das_service.cli", "up", "--folder", str(folder), *arguments],
        capture_output=True, text=True, timeout=WAIT_SECONDS, check=False, env={**clean, **environment},
    )  # fmt: skip


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def test_each_role_is_a_process_of_its_own(service: RunningService) -> None:
    roles = service.roles()
    assert [role["role"] for role in roles] == ["valkey", "api", "sink"]
    assert [role["restarts"] for role in roles] == [0, 0, 0]
    children = {child.pid for child in psutil.Process(service.pid).children()}
    assert {role["pid"] for role in roles} == children


@pytest.mark.parametrize("role", ["api", "sink", "valkey"])
def test_a_killed_role_starts_again_and_the_service_is_ready_again(service: RunningService, role: str) -> None:
    before = service.pid_of(role)
    assert before is not None
    with Client(service.url) as client:
        client.put_dataset("ads", {"features": [{"name": "price", "type": "float"}]})
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: service.pid_of(role) not in {before, None}, f"a new {role}")
        wait_until(lambda: is_ready(client), "readiness")
        assert [dataset["dataset"] for dataset in client.list_datasets()] == ["ads"]
    assert {entry["role"]: entry["restarts"] for entry in service.roles()} == {
        **dict.fromkeys(("valkey", "api", "sink"), 0), role: 1,
    }  # fmt: skip


def is_ready(client: Client) -> bool:
    from das_service.client import UnreachableError

    with contextlib.suppress(UnreachableError):
        return bool(client.ready()["ready"])
    return False


def test_a_role_that_dies_again_and_again_waits_longer_each_time(service: RunningService) -> None:
    for _ in range(3):
        wait_until(lambda: service.pid_of("sink") is not None, "a sink")
        os.kill(service.pid_of("sink") or 0, signal.SIGKILL)
        wait_until(lambda: service.pid_of("sink") is None, "the sink's end")
    said = (service.folder.root / "logs" / "supervisor.log").read_text()
    lines = [line for line in said.splitlines() if line.startswith("the sink was ended by SIGKILL")]
    assert [line.split("starts again in ")[1].split(" (")[0] for line in lines] == ["0.2 s", "0.4 s", "0.8 s"]


def test_the_supervisor_beats_with_its_roles(service: RunningService) -> None:
    with redis.Redis.from_url(service.redis_url, protocol=2) as server:
        beats = [record.decode() for record in server.hgetall("das:beats").values()]
    (supervisor,) = [record for record in beats if '"role": "supervisor"' in record]
    for role in service.roles():
        assert f'"role": "{role["role"]}", "pid": {role["pid"]}, "restarts": 0' in supervisor


def test_nothing_runs_on_after_the_supervisor_is_killed(service: RunningService) -> None:
    children = psutil.Process(service.pid).children(recursive=True)
    assert len(children) >= 3
    os.kill(service.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, children)), "the children's end")


def test_a_folder_can_be_used_again_right_after_a_kill(tmp_path: Path) -> None:
    with running_service(folder=tmp_path, roles=ROLES) as first:
        with Client(first.url) as client:
            client.put_dataset("ads", {"features": [{"name": "price", "type": "float"}]})
        os.kill(first.pid, signal.SIGKILL)
        with running_service(folder=tmp_path, roles=ROLES) as second, Client(second.url) as client:
            assert [dataset["dataset"] for dataset in client.list_datasets()] == ["ads"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_in_order_and_without_force(tmp_path: Path, number: signal.Signals) -> None:
    with running_service(folder=tmp_path, roles=ROLES) as service:
        supervisor = psutil.Process(service.pid)
        children = supervisor.children(recursive=True)
        os.kill(service.pid, number)
        wait_until(lambda: not is_alive(supervisor), "the supervisor's end")
        assert not any(map(is_alive, children))
    said = (tmp_path / "logs" / "supervisor.log").read_text()
    assert "stopping" in said
    assert "is killed" not in said
    assert "bye bye" in (tmp_path / "logs" / "valkey.log").read_text()


def test_the_death_of_the_reporting_thread_ends_the_service_with_an_error(tmp_path: Path) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("ready"):
            raise RuntimeError("boom")

    supervisor = Supervisor(lay_out(tmp_path, roles=(), port=0), say=say)
    assert supervisor.run() == 1
    assert "the reporting thread died (RuntimeError: boom); the service ends" in said
    assert all(child["pid"] is None or not psutil.pid_exists(child["pid"]) for child in supervisor.roles())


def test_a_second_supervisor_is_refused_in_plain_words(service: RunningService) -> None:
    done = up(service.folder.root, "--port", "0")
    assert done.returncode == 2
    assert done.stderr == (
        f"das: `das up` runs on {service.folder.root} already (process {service.pid}): stop it first, "
        "or choose another --folder\n"
    )


def test_a_port_in_use_is_refused_in_plain_words(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = up(tmp_path, "--port", str(port))
    assert (done.returncode, done.stderr) == (
        2, f"das: the API can't listen on 127.0.0.1:{port} (Address already in use): choose another port with --port\n",
    )  # fmt: skip


def test_an_unknown_setting_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = up(tmp_path / "folder", DAS_COMIT_ROWS="3")
    assert done.returncode == 2
    assert "unknown setting DAS_COMIT_ROWS" in done.stderr
    assert not (tmp_path / "folder").exists()


def test_a_role_that_is_wrongly_configured_ends_the_service_with_its_words(tmp_path: Path) -> None:
    done = up(tmp_path, "--no-worker", "--no-sink", "--port", "0", DAS_TOKENS_FILE=str(tmp_path / "none.json"))
    assert done.returncode == 2
    assert "the api can't start" in done.stderr
    assert "none.json" in done.stderr


def test_a_service_that_does_not_start_is_an_error_with_its_words(tmp_path: Path) -> None:
    with (
        pytest.raises(SupervisorError, match="unknown setting DAS_COMIT_ROWS"),
        running_service(folder=tmp_path, env_overrides={"DAS_COMIT_ROWS": "3"}),
    ):
        pass


def test_a_folder_is_owned_until_the_last_heir_is_gone(tmp_path: Path) -> None:
    folder = ServiceFolder(tmp_path)
    with owned(folder) as lock:
        heir = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()}"), owned(folder):
            pass
    assert folder.has_supervisor()
    heir.communicate(b"\n")
    assert not folder.has_supervisor()
