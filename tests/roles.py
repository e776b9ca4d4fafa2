"""Workers and sinks as processes of a test, and what is asked of them."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from das_service.registry import SnapshotRecord
from das_service.settings import Settings
from tests.conftest import ROOT
from tests.declared import Declared

PROGRAMS = {"worker": ["fm_inference"], "sink": ["das_service.cli", "sink"]}


def wait_for(condition: Callable[[], bool], *, seconds: float = 120.0) -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("the condition did not come true in time")
        time.sleep(0.02)


@dataclass
class Roles:
    """Processes of one test; `close` kills those that are left."""

    settings: Settings
    folder: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, role: str = "worker", **overrides: str) -> subprocess.Popen[bytes]:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("DAS_")},
            "DAS_REDIS_URL": self.settings.redis_url.get_secret_value(),
            "DAS_TABLES_URI": self.settings.tables_uri,
            "DAS_SNAPSHOTS_URI": self.settings.snapshots_uri,
            "DAS_COMMIT_SECONDS": str(self.settings.commit_seconds),
            "DAS_DEAD_AFTER_SECONDS": "2",
            **overrides,
        }
        with (self.folder / f"{role}-{len(self.running)}.log").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *PROGRAMS[role]], env=environment, cwd=ROOT, stdout=output, stderr=output
            )
        self.running.append(process)
        return process

    def close(self) -> None:
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


def beats(declared: Declared, role: str = "worker") -> list[dict[str, Any]]:
    """Give what the processes of a role said last."""
    found = [json.loads(beat) for beat in declared.client.hgetall("das:beats").values()]
    return [beat for beat in found if beat["role"] == role]


def metric(declared: Declared, name: str) -> float:
    """Give a metric of the one living worker, summed over its labels."""
    (beat,) = beats(declared)
    text = httpx.get(f"{beat['probe_url']}/metrics", timeout=10).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == name)


def state(declared: Declared, fm: str, snapshot_id: str) -> SnapshotRecord:
    """Give a snapshot as the registry has it."""
    return declared.catalog.snapshot(declared.dataset, fm, snapshot_id)


def publish(declared: Declared, fm: str = "f", snapshot_id: str = "s1", **options: object) -> None:
    """Register and activate a closed-form snapshot with a running worker's help."""
    declared.register(fm, snapshot_id, **options)
    wait_for(lambda: state(declared, fm, snapshot_id).state != "validating")
    assert state(declared, fm, snapshot_id).reasons == ()
    declared.activate(fm, snapshot_id)
