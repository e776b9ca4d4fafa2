"""`make bench` in small: its record has the shape of contract 10; and the README shows the newest result."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest.report import README, newest_result, rendered
from tests.conftest import ROOT

LINES = (
    "ingest", "lookup", "worker", "worker_free", "sink", "augment", "augment_http", "batches", "batches_http", "loader",
)  # fmt: skip


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-m", "loadtest.bench", "--quick", "--folder", str(tmp_path_factory.mktemp("bench"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", LINES)
def test_a_line_is_a_rate_its_floor_and_their_ratio(record: dict[str, Any], name: str) -> None:
    line = record[name]
    assert line["rows_per_s"] > 0
    assert line["floor_rows_per_s"] > 0
    assert line["ratio"] == pytest.approx(line["rows_per_s"] / line["floor_rows_per_s"], rel=0.01, abs=0.001)


def test_the_joins_say_what_memory_they_took(record: dict[str, Any]) -> None:
    assert [type(record[name]["peak_mb"]) for name in LINES[5:]] == [int] * 5


def test_end_to_end_says_what_each_role_cost(record: dict[str, Any]) -> None:
    end_to_end = record["end_to_end"]
    assert end_to_end["examples_per_s"] > 0
    assert set(end_to_end["cpu_seconds_per_million"]) == {"valkey", "api", "worker", "sink", "generator"}


def test_a_partial_run_cannot_be_kept_as_a_result(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest.bench", "--quick", "--write", "x", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])


def test_the_readme_shows_the_newest_result() -> None:
    text = README.read_text()
    assert rendered(text, newest_result()) == text
