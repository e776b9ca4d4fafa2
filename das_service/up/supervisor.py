"""`das up`: the whole service on one machine, one OS process per role, watched by one supervisor.

The server starts first and ends last. A child that ends starts again (children.py has the rule); SIGTERM and Ctrl-C
stop the API first, so that nothing new comes in, then the worker, the sink and the server, each within a deadline; a
second Ctrl-C kills. Whatever happens to the supervisor, its children end with it (Linux).
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from das_service.beats import BEAT_SECONDS, beat, forget, instance_name
from das_service.client import Client
from das_service.client.errors import DasClientError
from das_service.redis_client import connect
from das_service.stop_signals import set_by_signals
from das_service.up.children import Child, Ended, Program, cap_log, rotate_log
from das_service.up.embedded import (
    NoServerError,
    find_server,
    server_arguments,
    server_environment,
    wait_until_ready,
)
from das_service.up.service_folder import ServiceFolder, owned
from das_service.up.service_layout import ROLES, SERVER, Layout, import_path, server_memory_bytes

log = logging.getLogger("das.supervisor")
TICK_SECONDS = 0.05
LOG_CHECK_SECONDS = 5.0
SLOW_START_SECONDS = 15.0
KILL_AFTER_SECONDS = 5.0
SERVER_START_SECONDS = 600.0
STOP_SECONDS = 150.0
Say = Callable[[str], None]
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_CLI = (sys.executable, "-m", "das_service.cli")
_OWN_PLACE = {
    "DAS_REDIS_URL", "DAS_TABLES_URI", "DAS_SNAPSHOTS_URI", "DAS_API_URL", "DAS_TOKEN", "DAS_TOKENS_FILE", "DAS_BIND",
    "DAS_PROBE_BIND", "DAS_LOG_FOLDER", "DAS_INSTANCE", "DAS_RESTARTS",
}  # fmt: skip


class SupervisorError(Exception):
    """The service can't start or go on; the message says what to do."""


class Supervisor:
    """Owns the child processes. The main thread starts, watches and ends them; one more thread reports.

    say: gets one line per crash and restart, and the banner once everything is ready.
    """

    def __init__(self, layout: Layout, *, say: Say) -> None:
        self._layout = layout
        self._say_aloud = say
        self._children: list[Child] = []
        self._stopping = threading.Event()
        self._signals = 0
        self._ready = False
        self._killed = False
        self._failure = ""
        self._news = threading.Lock()
        self._logs_checked_at = 0.0

    def run(self) -> int:
        """Run the service until a signal comes; give the exit code: 0 drained, 1 something failed or had to be killed.

        Raises:
            FolderInUseError: Another supervisor runs on the folder.
            NoServerError: There is no Valkey or Redis server, or it does not start.
            SupervisorError: A role is wrongly configured.
        """
        with owned(self._layout.folder) as lock, set_by_signals(self._stopping, _STOP_SIGNALS, also=self._count):
            try:
                self._start_everything(lock)
                reporter = threading.Thread(target=self._report, name="report", daemon=True)
                reporter.start()
                while not self._stopping.wait(TICK_SECONDS):
                    self._look()
                if self._failure:
                    self._say(self._failure)
                self._say("stopping: what is in flight is finished first (Ctrl-C again: at once)")
                reporter.join(2 * BEAT_SECONDS)
            finally:
                self._stopping.set()
                self._stop_everything()
        return 1 if self._killed or self._failure else 0

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # whoever listened is gone; the service is not
            self._say_aloud(text)

    # ---- start

    def _start_everything(self, lock: int) -> None:
        if self._layout.server_port is not None:
            server = Child(self._server_program(lock))
            self._start(server)
            self._wait_for_server(server)
        for role in self._layout.roles:
            if not self._stopping.is_set():
                self._start(Child(self._role_program(role, lock)))

    def _start(self, child: Child) -> None:
        rotate_log(child.program.log_file)
        self._children.append(child)
        child.start(now=time.monotonic())
        self._write_roles()

    def _server_program(self, lock: int) -> Program:
        folder, port = self._layout.folder, self._layout.server_port or 0
        folder.server_data.mkdir(parents=True, exist_ok=True)
        maxmemory = server_memory_bytes()
        arguments = [str(find_server()), *server_arguments(folder.server_data, port=port, maxmemory_bytes=maxmemory)]
        return Program(
            role=SERVER,
            arguments=arguments,
            environment=server_environment(),
            log_file=folder.log_file(SERVER),
            kept_fds=(lock,),
            death_signal=signal.SIGTERM,
        )

    def _role_program(self, role: str, lock: int) -> Program:
        return Program(
            role=role,
            arguments=[*_CLI, role],
            environment=self._layout.role_environment(role),
            log_file=self._layout.folder.log_file(role),
            kept_fds=(lock,),
        )

    def _wait_for_server(self, server: Child) -> None:
        deadline = time.monotonic() + SERVER_START_SECONDS
        while not self._stopping.is_set():
            try:
                wait_until_ready(self._layout.redis_url, process=server.running_process(), seconds=1.0)
            except NoServerError as error:
                if server.has_ended() or time.monotonic() > deadline:
                    raise NoServerError(f"{error}: {server.log_tail()}") from error
            else:
                return

    # ---- run

    def _look(self) -> None:
        now = time.monotonic()
        for child in self._children:
            pid = child.pid
            ended = child.look(now=now)
            if ended is not None:
                self._tell(child, ended)
            if child.pid != pid:
                self._write_roles()
        if now - self._logs_checked_at > LOG_CHECK_SECONDS:
            self._logs_checked_at = now
            for child in self._children:
                with contextlib.suppress(OSError):
                    cap_log(child.program.log_file)

    def _tell(self, child: Child, ended: Ended) -> None:
        if child.restarts.is_hopeless:
            raise SupervisorError(f"the {child.role} can't start:\n{child.log_tail()}")
        self._say(
            f"the {ended.role} {ended.reason} after {ended.lived_seconds:.1f} s; it starts again in "
            f"{ended.pause_seconds:.1f} s (its log: {child.program.log_file})"
        )

    def roles(self) -> list[dict[str, object]]:
        """Give role, pid and restarts of each child."""
        return [child.describe() for child in self._children]

    def _write_roles(self) -> None:
        with self._news, contextlib.suppress(OSError):  # a full disk must not end the service
            self._layout.folder.write_roles(
                {
                    "pid": os.getpid(),
                    "url": self._layout.url,
                    "redis_url": self._layout.shown_redis_url,
                    "tables_uri": self._layout.environment["DAS_TABLES_URI"],
                    "snapshots_uri": self._layout.environment["DAS_SNAPSHOTS_URI"],
                    "ready": self._ready,
                    "roles": self.roles(),
                }
            )

    # ---- the reporting thread

    def _report(self) -> None:
        try:
            self._report_until_stopped()
        except BaseException as error:
            self._failure = f"the reporting thread died ({type(error).__name__}: {error}); the service ends"
            log.exception("the reporting thread died")
        finally:
            self._stopping.set()

    def _report_until_stopped(self) -> None:
        settings = self._layout.settings
        name = instance_name(settings, "supervisor")
        count, slow_at = 0, time.monotonic() + SLOW_START_SECONDS
        with connect(settings) as server, Client(self._layout.url) as client:
            while not self._stopping.wait(BEAT_SECONDS if self._ready else BEAT_SECONDS / 4):
                count += 1
                with contextlib.suppress(RedisError):
                    beat(server, name, role="supervisor", count=count, info={"roles": self.roles()})
                if not self._ready:
                    slow_at = self._report_readiness(client, slow_at)
            with contextlib.suppress(RedisError):
                forget(server, name)

    def _report_readiness(self, client: Client, slow_at: float) -> float:
        problems = _problems(client) if "api" in self._layout.roles else []
        if not problems:
            self._ready = True
            self._write_roles()
            self._say(self._layout.banner())
        elif time.monotonic() > slow_at:
            self._say("not ready yet: " + "; ".join(problems))
            return time.monotonic() + 4 * SLOW_START_SECONDS
        return slow_at

    # ---- stop

    def _count(self, _: int) -> None:
        self._signals += 1

    def _stop_everything(self) -> None:
        by_role = {child.role: child for child in self._children}
        for role in (*self._layout.roles, SERVER):
            if role in by_role:
                self._stop(by_role[role])
        self._ready = False
        self._write_roles()

    def _stop(self, child: Child) -> None:
        child.signal(signal.SIGTERM)
        deadline = time.monotonic() + self._layout.settings.drain_seconds + KILL_AFTER_SECONDS
        while not child.has_ended():
            if time.monotonic() > deadline or self._signals > 1:
                self._killed = True
                self._say(f"the {child.role} did not end in time and is killed; nothing that was acknowledged is lost")
                child.wait(seconds=0)
            time.sleep(TICK_SECONDS)


def _problems(client: Client) -> list[str]:
    try:
        answer = client.ready()
    except DasClientError as error:
        return [error.detail]
    if answer["ready"]:
        return []
    return [str(problem) for problem in answer.get("problems") or ["the API is not ready"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningService:
    """A service that a program has started for itself. pid: of its supervisor."""

    url: str
    redis_url: str
    folder: ServiceFolder
    pid: int

    def roles(self) -> list[dict[str, Any]]:
        """Give role, pid (None between two starts) and restarts of each process, as they are now."""
        return list((self.folder.read_roles() or {}).get("roles", []))

    def pid_of(self, role: str) -> int | None:
        """Give the pid of a role, None while it has no process."""
        return next((entry["pid"] for entry in self.roles() if entry["role"] == role), None)


@contextlib.contextmanager
def running_service(
    *,
    folder: Path,
    env_overrides: Mapping[str, str] | None = None,
    roles: Sequence[str] = ROLES,
    port: int = 0,
    ready_seconds: float = 120.0,
) -> Iterator[RunningService]:
    """Run `das up` on a folder as a child process, and give it once everything is ready; drained at the end.

    Addresses and folders in this process's own DAS_* variables are left out: only env_overrides counts for these.

    Raises:
        SupervisorError: It ended, or was not ready in time; the message has what it said.
    """
    root = ServiceFolder(folder.absolute())
    environment = {name: value for name, value in os.environ.items() if name not in _OWN_PLACE}
    left_out = [f"--no-{role}" for role in ROLES if role not in roles]
    up = Child(
        Program(
            role="supervisor",
            arguments=[*_CLI, "up", "--folder", str(root.root), "--port", str(port), *left_out],
            environment={**environment, **import_path(), "PYTHONUNBUFFERED": "1", **(env_overrides or {})},
            log_file=root.log_file("supervisor"),
            death_signal=signal.SIGTERM,
        )
    )
    rotate_log(up.program.log_file)
    up.start(now=time.monotonic())
    try:
        yield _wait_for_service(up, root, ready_seconds)
    finally:
        up.signal(signal.SIGTERM)
        up.wait(seconds=STOP_SECONDS)


def _wait_for_service(up: Child, folder: ServiceFolder, seconds: float) -> RunningService:
    deadline = time.monotonic() + seconds
    while not up.has_ended():
        state = folder.read_roles()
        if state is not None and state["pid"] == up.pid and state["ready"]:
            return RunningService(url=state["url"], redis_url=state["redis_url"], folder=folder, pid=state["pid"])
        if time.monotonic() > deadline:
            raise SupervisorError(f"the service is not ready after {seconds:.0f} s:\n{up.log_tail()}")
        time.sleep(TICK_SECONDS)
    raise SupervisorError(f"the service did not start:\n{up.log_tail()}")
