"""The whole journey on one machine, by the commands that a person would type, judged by what they print."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from das_service.client import Client
from das_service.up.supervisor import RunningService, running_service
from schemas.dataset import DatasetSpec
from tests.fakes import expected_supervision, export_closed_form

SPEC: dict[str, Any] = {
    "entity_key": ["user_id"],
    "features": [
        {"name": "price", "type": "float"},
        {"name": "user_id", "type": "category", "value_type": "string"},
        {"name": "item", "type": "category", "value_type": "int64", "nullable": True},
        {"name": "tags", "type": "category_list", "value_type": "string", "max_length": 4},
        {"name": "image", "type": "vector", "size": 2},
    ],
    "tasks": [{"name": "click", "label_window_seconds": 3600}, {"name": "buy", "label_window_seconds": 3600}],
    "partitions": 3,
}
ROWS = 12_000
WAIT_SECONDS = 90.0


@dataclass(frozen=True)
class Shell:
    """Runs `das` against one service."""

    service: RunningService

    def __call__(self, *arguments: str, stdin: str | None = None, code: int = 0) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DAS_")}
        environment |= {
            "DAS_API_URL": self.service.url,
            "DAS_SNAPSHOTS_URI": str(self.service.folder.snapshots),
            "DAS_REDIS_URL": self.service.redis_url,
        }
        done = subprocess.run(
            [sys.executable, "-m", "das_service.cli", *arguments],
            capture_output=True, text=True, input=stdin, timeout=WAIT_SECONDS, check=False, env=environment,
        )  # fmt: skip
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        return done.stdout


def examples(number: int, *, start: int = 0) -> pa.Table:
    """Rows of the last hour, with every kind of feature, nulls among them."""
    base = datetime.now(UTC) - timedelta(minutes=50)
    places = range(start, start + number)
    columns = {
        "example_id": [f"e{i}" for i in places],
        "event_time": pa.array([base + timedelta(milliseconds=i) for i in places], pa.timestamp("us", "UTC")),
        "price": [i / 4 for i in places],
        "user_id": [f"u{i % 50}" for i in places],
        "item": [None if i % 7 == 0 else i % 300 for i in places],
        "tags": pa.array([[f"t{i % 5}"] * (i % 3) for i in places], pa.list_(pa.string())),
        "image": pa.array([[i / 8, 0.5] for i in places], pa.list_(pa.float32(), 2)),
    }
    return pa.table(columns)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("up")
    with running_service(folder=folder, env_overrides={"DAS_COMMIT_SECONDS": "0.3"}) as running:
        yield running


@pytest.fixture(scope="module")
def das(service: RunningService, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A command line whose service has a dataset and an FM of closed form that scores."""
    folder = tmp_path_factory.mktemp("export")
    shell = Shell(service)
    shell("dataset", "put", "ads", "-", stdin=json.dumps(SPEC))
    export_closed_form(folder / "s1", DatasetSpec.model_validate(SPEC))
    published = shell("snapshot", "publish", str(folder / "s1"), "--dataset", "ads", "--activate")
    assert published == "snapshot s1 is active\n"
    return shell


def wait_for_status(das: Shell, condition: Any) -> dict[str, Any]:
    """Wait until `das status --json` fulfils the condition, and give it."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        state: dict[str, Any] = json.loads(das("status", "--json"))
        if condition(state):
            return state
        assert time.monotonic() < deadline, state
        time.sleep(0.2)


def test_the_journey_from_a_file_to_supervision(das: Shell, tmp_path: Path) -> None:
    table = examples(ROWS)
    pq.write_table(table, tmp_path / "examples.parquet")
    record = json.loads(das("ingest", "ads", str(tmp_path / "examples.parquet"), "--json"))
    assert (record["accepted"], record["rejected"]) == (ROWS, 0)
    again = json.loads(das("ingest", "ads", str(tmp_path / "examples.parquet"), "--json"))
    assert again["accepted"] == ROWS

    state = wait_for_status(das, lambda s: s["datasets"]["ads"]["fms"]["closed"]["scored"] >= ROWS)
    dataset = state["datasets"]["ads"]
    assert (dataset["distinct"], dataset["conflicting"], dataset["in_log"]) == (ROWS, 0, 0)
    assert dataset["accepted"] == dataset["distinct"] + dataset["duplicates"]
    assert (
        dataset["fms"]["closed"] | {"scored": ROWS, "pending": 0, "failed": 0, "active": "s1"}
        == (dataset["fms"]["closed"])
    )

    (tmp_path / "ids").write_text("".join(f"{i}\n" for i in table["example_id"].to_pylist()))
    out = tmp_path / "supervision.parquet"
    das("lookup", "ads", "--fm", "closed", "--ids-file", str(tmp_path / "ids"), "--out", str(out))
    supervision = pq.read_table(out)
    assert supervision["example_id"].to_pylist() == table["example_id"].to_pylist()
    assert set(supervision["closed__status"].to_pylist()) == {"present"}
    logits, _ = expected_supervision(table, DatasetSpec.model_validate(SPEC))
    for task in ("click", "buy"):
        np.testing.assert_array_equal(supervision[f"closed__{task}__logit"].to_numpy(), logits[task])


def test_bad_rows_are_left_out_and_the_exit_code_says_so(das: Shell) -> None:
    good = {"example_id": "n1", "event_time": datetime.now(UTC).isoformat(), "price": 1, "user_id": "u",
            "tags": [], "image": [0, 1]}  # fmt: skip
    lines = [good, {**good, "example_id": ""}, {**good, "example_id": "n3", "tags": ["a"] * 9}]
    text = das("ingest", "ads", "-", stdin="".join(json.dumps(line) + "\n" for line in lines), code=1)
    assert text.startswith("1 rows accepted, 2 rejected")


def test_an_id_that_was_never_sent_is_missing_in_the_end(das: Shell) -> None:
    wait_for_status(das, lambda s: s["datasets"]["ads"]["fms"]["closed"]["pending"] == 0)
    (row,) = json.loads(das("lookup", "ads", "never-sent", "--fm", "closed", "--json"))
    assert (row["closed__status"], row["closed__click__logit"]) == ("missing", None)


def test_status_lists_the_processes_and_fits_one_screen(das: Shell, service: RunningService) -> None:
    state = json.loads(das("status", "--json"))
    assert (state["ready"], state["problems"]) == (True, [])
    stated = {(role["role"], role["pid"], role["restarts"]) for role in state["roles"]}
    assert stated == {(role["role"], role["pid"], role["restarts"]) for role in service.roles()}
    screen = das("status")
    assert screen.startswith("ready")
    assert len(screen.splitlines()) < 24


def test_a_second_snapshot_takes_over_and_is_rolled_back(das: Shell, service: RunningService, tmp_path: Path) -> None:
    spec = DatasetSpec.model_validate(SPEC)
    export_closed_form(tmp_path / "s2", spec, snapshot_id="s2", shift=16.0)
    das("snapshot", "publish", str(tmp_path / "s2"), "--dataset", "ads", "--activate")
    table = examples(10, start=50_000)
    with Client(service.url) as client:
        deadline = time.monotonic() + WAIT_SECONDS
        start = 50_000
        while True:
            table = examples(10, start=start)
            assert client.ingest("ads", table, wait="scored", timeout_seconds=30).scored
            found = client.lookup("ads", table["example_id"], fms=["closed"])
            if set(found["closed__snapshot_id"].to_pylist()) == {"s2"}:
                break
            assert time.monotonic() < deadline
            start += 10
        logits, _ = expected_supervision(table, spec, shift=16.0)
        np.testing.assert_array_equal(found["closed__click__logit"].to_numpy(), logits["click"])
    assert das("snapshot", "rollback", "ads", "closed") == "snapshot s1 of FM closed is active again (before: s2)\n"
    listed = json.loads(das("snapshot", "list", "ads", "closed", "--json"))
    assert {snapshot["snapshot_id"]: snapshot["state"] for snapshot in listed} == {"s1": "active", "s2": "validated"}


def test_a_killed_worker_costs_nothing(das: Shell, service: RunningService) -> None:
    table = examples(5_000, start=100_000)
    with Client(service.url) as client:
        os.kill(service.pid_of("worker") or 0, signal.SIGKILL)
        assert client.ingest("ads", table).accepted == 5_000
        state = wait_for_status(das, lambda s: s["datasets"]["ads"]["fms"]["closed"]["pending"] == 0)
        assert {role["role"]: role["restarts"] for role in service.roles()}["worker"] == 1
        assert state["datasets"]["ads"]["fms"]["closed"]["failed"] == 0
        found = client.lookup("ads", table["example_id"], fms=["closed"])
    assert set(found["closed__status"].to_pylist()) == {"present"}


def test_compaction_on_request_leaves_few_files_and_all_rows(das: Shell, service: RunningService) -> None:
    before = wait_for_status(das, lambda s: s["datasets"]["ads"]["in_log"] == 0)["datasets"]["ads"]["distinct"]
    assert das("compact", "ads", "--timeout-seconds", "60") == "the tables of ads are compact\n"
    after = json.loads(das("status", "--json"))["datasets"]["ads"]["distinct"]
    assert after == before


def test_status_works_without_the_api(das: Shell, service: RunningService) -> None:
    os.kill(service.pid_of("api") or 0, signal.SIGSTOP)
    try:
        state = json.loads(das("status", "--json", "--folder", str(service.folder.root)))
    finally:
        os.kill(service.pid_of("api") or 0, signal.SIGCONT)
    assert state["ready"] is False
    assert "the API can't be asked" in state["problems"][0]
    assert [role["role"] for role in state["roles"]] == ["valkey", "api", "worker", "sink"]


def test_recovery_has_nothing_to_do_where_nothing_is_lost(das: Shell, service: RunningService) -> None:
    das("recover", "--folder", str(service.folder.root), "--yes")
