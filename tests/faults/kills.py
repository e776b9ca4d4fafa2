"""`python -m tests.faults.kills --seed 1 --kills 20`: a real `das up` under traffic, its processes killed one by one.

Prints one JSON line (contract 10, faults).
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import redis

from das_service.client import Client
from das_service.up.embedded import free_port
from schemas.dataset import DatasetSpec
from tests.fakes import export_closed_form
from tests.faults.judge import judge
from tests.faults.traffic import SPEC, Ledger, Traffic

ROLES = ("api", "worker", "sink", "valkey")
DATASET, FM = "faults", "closed"
_COMMIT_SECONDS = "0.3"


def wait_for(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Wait until it is true.

    Raises:
        TimeoutError: It did not come true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(0.05)


class Service:
    """A `das up` of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith("DAS_")}
        self._environment = {**clean, "DAS_COMMIT_SECONDS": _COMMIT_SECONDS, "DAS_DEAD_AFTER_SECONDS": "2"}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "das_service.cli",
            "up",
            "--folder",
            str(self.folder),
            "--port",
            str(self.port),
        ]
        with (self.folder / "up.log").open("ab") as output:
            self._process = subprocess.Popen(command, env=self._environment, stdout=output, stderr=output)
        wait_for(lambda: self.answers("/health/live"), seconds=60, what="the API's start")

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def answers(self, path: str) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(self.url + path, timeout=5).status_code == 200
        return False

    def roles(self) -> dict[str, dict[str, Any]]:
        record = json.loads((self.folder / "roles.json").read_text())
        return {role["role"]: role for role in record["roles"]}

    def redis(self) -> redis.Redis:
        record = json.loads((self.folder / "roles.json").read_text())
        return redis.Redis.from_url(record["redis_url"], protocol=2)


@contextlib.contextmanager
def readiness_watch(service: Service) -> Iterator[list[float]]:
    """Watch /health/ready; the list holds the longest time it was not ready, in seconds."""
    longest, stop = [0.0], threading.Event()

    def watch() -> None:
        since: float | None = None
        while not stop.wait(0.1):
            now = time.monotonic()
            if service.answers("/health/ready"):
                since = None
            else:
                since = since or now
                longest[0] = max(longest[0], now - since)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield longest
    stop.set()
    thread.join()


def run(*, seed: int, kills: int, folder: Path) -> dict[str, Any]:
    """Kill and judge; give the record of contract 10."""
    service = Service(folder)
    service.start()
    try:
        with Client(service.url) as client:
            client.put_dataset(DATASET, SPEC)
            client.put_fm(DATASET, FM, required=True)
            publish(service, client)
        ledger = Ledger(folder / "ledger.ndjson")
        with readiness_watch(service) as unready, Traffic(service.url, DATASET, ledger, seed=seed) as traffic:
            by_role, in_flight = _kill(service, traffic, random.Random(seed), kills)
            traffic.stop()
            wait_for(lambda: is_worked_off(service), seconds=120, what="working off the backlog")
        if traffic.errors:
            raise traffic.errors[0]
        with service.redis() as server:
            verdict = judge(ledger, folder / "tables", server, dataset=DATASET, fm=FM, sent_rows=traffic.sent_rows)
    finally:
        service.stop()
    counts = {
        "kills": sum(by_role.values()),
        "kills_by_role": dict(by_role),
        "kills_with_requests_in_flight": in_flight,
    }
    return {"seed": seed, **counts, **asdict(verdict), "longest_unready_seconds": round(unready[0], 2)}


def publish(service: Service, client: Client) -> None:
    """Publish and activate a closed-form FM."""
    target = service.folder / "snapshots" / DATASET / FM / "s1"
    target.parent.mkdir(parents=True, exist_ok=True)
    export_closed_form(
        target,
        DatasetSpec.model_validate(SPEC),
        fm=FM,
        snapshot_id="s1",
        trained_through=datetime(2025, 1, 1, tzinfo=UTC),
    )
    from das_service.snapshot_folder import manifest_sha256

    client.register_snapshot(DATASET, FM, snapshot_id="s1", uri=str(target), sha256=manifest_sha256(target))
    client.wait_for_snapshot(DATASET, FM, "s1")
    client.activate_snapshot(DATASET, FM, "s1")


def _kill(service: Service, traffic: Traffic, chance: random.Random, kills: int) -> tuple[Counter[str], int]:
    plan = [ROLES[i % len(ROLES)] for i in range(kills)]
    chance.shuffle(plan)
    by_role: Counter[str] = Counter()
    with_requests = 0
    for role in plan:
        before = traffic.acked_rows
        wait_for(lambda: traffic.acked_rows > before + 3000 or bool(traffic.errors), seconds=90, what="traffic")  # noqa: B023
        time.sleep(chance.uniform(0, 0.4))
        killed: list[int] = []
        wait_for(lambda: _kill_with_requests(traffic, service, role, killed), seconds=10, what="a request in flight")  # noqa: B023
        with_requests += 1
        by_role[role] += 1
        wait_for(lambda: service.roles()[role]["pid"] not in {*killed, None}, seconds=30, what=f"a new {role}")  # noqa: B023
        if chance.random() < 0.7:  # sometimes the next one falls before this one is well
            wait_for(lambda: service.answers("/health/ready"), seconds=60, what=f"readiness after {role}")
    return by_role, with_requests


def _kill_with_requests(traffic: Traffic, service: Service, role: str, killed: list[int]) -> bool:
    """Kill the role's process if a request is in flight, which none of them leaves meanwhile; give whether it was."""
    pid = service.roles()[role]["pid"]
    with traffic.held() as in_flight:
        if in_flight and pid is not None:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return bool(killed)


def is_worked_off(service: Service) -> bool:
    """Give whether nothing waits: no entry unscored, none uncommitted."""
    with contextlib.suppress(httpx.HTTPError):
        answer = httpx.get(f"{service.url}/v1/status", timeout=5)
        if answer.status_code == 200:
            record = answer.json()["datasets"][DATASET]
            return bool(record["in_log"] == 0 and record["fms"][FM]["pending"] == 0)
    return False


def main() -> int:
    """Run from the command line; give the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="das-faults-")))
        folder.mkdir(parents=True, exist_ok=True)
        record = run(seed=arguments.seed, kills=arguments.kills, folder=folder)
    print(json.dumps(record))
    bad = ("lost", "duplicated", "altered", "unaccounted", "dead_letters")
    return 1 if any(record[name] for name in bad) else 0


if __name__ == "__main__":
    sys.exit(main())
