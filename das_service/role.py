"""The life of a background role: its threads, its beat, its small HTTP server, and how it ends.

A thread that dies ends the process (a supervisor starts it again): nothing that looks healthy is half dead. SIGTERM
and SIGINT set `stopping`; threads finish what they hold within the drain deadline, then the process goes in any case.
"""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import redis

from das_service.beats import BEAT_SECONDS, beat, forget, reachable_url
from das_service.metrics import Metrics
from das_service.redis_client import UNREACHABLE
from das_service.settings import Settings
from das_service.stop_signals import set_by_signals

log = logging.getLogger("das.role")
Health = Callable[[], list[str]]


class RoleContext:
    """What the threads of one role share: when to stop, who we are, what we report."""

    def __init__(self, settings: Settings, *, role: str, instance: str, client: redis.Redis, metrics: Metrics) -> None:
        self.settings = settings
        self.role = role
        self.instance = instance
        self.client = client
        self.metrics = metrics
        self.stopping = threading.Event()
        self.probe_url = ""

    def info(self) -> dict[str, Any]:
        """Give what goes into every beat."""
        return {"restarts": self.settings.restarts, "probe_url": self.probe_url}


def run_role(
    context: RoleContext,
    threads: Mapping[str, Callable[[], None]],
    *,
    health: Health,
    info: Callable[[], dict[str, Any]],
) -> int:
    """Run the threads until one ends or a signal comes; give the exit code.

    health gives what is wrong, in plain words (empty = ready); info goes into the beats.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # what comes after the block changes nothing any more
    with set_by_signals(context.stopping):
        return _run(context, threads, health, info)


def _run(
    context: RoleContext, threads: Mapping[str, Callable[[], None]], health: Health, info: Callable[[], dict[str, Any]]
) -> int:
    server = _start_probe(context, health)
    failed = threading.Event()
    everything = {**threads, "beat": lambda: _beat_until_stopped(context, info)}
    running = [
        threading.Thread(target=_guard, args=(name, target, context, failed), name=name, daemon=True)
        for name, target in everything.items()
    ]
    for thread in running:
        thread.start()
    while not context.stopping.wait(0.5):
        pass
    deadline = time.monotonic() + context.settings.drain_seconds
    for thread in running:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = [thread.name for thread in running if thread.is_alive()]
    if late:
        log.error("not finished within %.0f s: %s", context.settings.drain_seconds, ", ".join(late))
    server.shutdown()
    _say_goodbye(context)
    return 1 if failed.is_set() or late else 0


def exit_now(code: int) -> None:
    """End the process even if a thread hangs."""
    logging.shutdown()
    os._exit(code)


def _guard(name: str, target: Callable[[], None], context: RoleContext, failed: threading.Event) -> None:
    try:
        target()
    except BaseException:
        failed.set()
        log.exception("thread %s of the %s died; the process ends", name, context.role)
    finally:
        if not context.stopping.is_set():
            failed.set()
            context.stopping.set()


def _beat_until_stopped(context: RoleContext, info: Callable[[], dict[str, Any]]) -> None:
    count = 0
    while True:
        count += 1
        try:
            beat(context.client, context.instance, role=context.role, count=count, info={**context.info(), **info()})
        except (*UNREACHABLE, redis.exceptions.ResponseError) as error:
            log.warning("no beat: %s", error)
        if context.stopping.wait(BEAT_SECONDS):
            return


def _say_goodbye(context: RoleContext) -> None:
    try:
        forget(context.client, context.instance)
    except UNREACHABLE:
        log.warning("the server can't be reached to say goodbye")


def _start_probe(context: RoleContext, health: Health) -> ThreadingHTTPServer:
    """Serve /health/live, /health/ready and /metrics from a daemon thread."""

    class Probe(BaseHTTPRequestHandler):
        timeout = 5

        def do_GET(self) -> None:
            if self.path == "/metrics":
                context.metrics.ready.set(not self._problems())
                self._answer(200, "text/plain; version=0.0.4; charset=utf-8", context.metrics.render())
            elif self.path == "/health/live":
                self._answer(200, "application/json", b'{"status":"alive"}')
            elif self.path == "/health/ready":
                problems = self._problems()
                body = json.dumps({"ready": not problems, "problems": problems}).encode()
                self._answer(503 if problems else 200, "application/json", body)
            else:
                self._answer(404, "text/plain", b"there are /metrics, /health/live and /health/ready\n")

        def _problems(self) -> list[str]:
            return ["stopping"] if context.stopping.is_set() else health()

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing: scrapes are not news."""

    host, _, port = context.settings.probe_bind.rpartition(":")
    server = ThreadingHTTPServer((host, int(port)), Probe)
    server.daemon_threads = True
    context.probe_url = reachable_url(host, server.server_address[1])
    threading.Thread(target=server.serve_forever, name="probe", daemon=True).start()
    return server
