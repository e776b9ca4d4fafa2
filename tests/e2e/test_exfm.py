"""The ExFM experiment in small, through a real service: interrupted by its own end, it goes on with what is kept."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from experiments.exfm_plan import MIDDLE, QUICK
from tests.conftest import ROOT


def run(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.exfm", "--quick", "--folder", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exfm") / "data"


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    return run(folder)


def test_the_teacher_goes_over_each_impression_once_whoever_reads_it(record: dict[str, Any]) -> None:
    one = record["one_teacher"]
    assert one["forwards"]["middle"] == one["posted"] > 100_000
    assert all(found["rows"] > 1_000 for found in one["slices"].values())


def test_a_teacher_that_lags_scored_with_the_snapshot_of_so_many_weeks_before(
    record: dict[str, Any], folder: Path
) -> None:
    tables = folder / "service" / "tables" / "complete_journey" / "supervision"
    for fm, lag in {MIDDLE: 0, **QUICK.lag_fms()}.items():
        said = DeltaTable(str(tables / fm)).to_pyarrow_table(columns=["example_id", "snapshot_id"])
        for boundary in [each for each in QUICK.boundaries() if each >= QUICK.tune[-1]]:
            week = QUICK.part_after(boundary)[-1]
            ids = pq.read_table(folder / "weeks" / f"week_{week:02}.parquet", columns=["example_id"])["example_id"]
            found = said.filter(pc.is_in(said["example_id"], ids.combine_chunks()))
            assert found.num_rows == len(ids)
            assert found["snapshot_id"].unique().to_pylist() == [f"weeks-1-{QUICK.source(lag, boundary)}"]


def test_the_service_hands_out_nothing_of_a_teacher_that_saw_the_rows(record: dict[str, Any]) -> None:
    assert record["teachers"]["peek"] == {"coverage": 0.0, "statuses": {"leaky": 1_000}}
    assert record["teachers"]["peek_unguarded"]["coverage"] == 1.0
    assert record["teachers"]["peek_unguarded"]["ne"] < record["teachers"]["middle"]["ne"] - 0.01


def test_with_the_guard_off_the_peeking_teacher_makes_a_student_visibly_better(record: dict[str, Any]) -> None:
    change = {c["control"]: c["ne_delta"] for c in record["comparisons"] if c["method"] == "single" and c["control"]}
    assert change["peek"] == 0
    assert change["peek_unguarded"] < -0.002
    assert change["shuffled"] > 0


def test_what_is_kept_is_not_done_again(record: dict[str, Any], folder: Path) -> None:
    kept = sorted((folder / "cells").iterdir())
    kept[0].unlink()
    before = {path: path.stat().st_mtime_ns for path in kept[1:]}
    again = run(folder)
    assert again["cells"] == record["cells"]
    assert {path: path.stat().st_mtime_ns for path in kept[1:] if path.name[:4] == "tune"} == {
        path: at for path, at in before.items() if path.name[:4] == "tune"
    }
