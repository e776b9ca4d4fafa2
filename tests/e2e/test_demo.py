"""`das demo` on three weeks: its own account, a recount of the folder it keeps, and a Ctrl-C in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from tests.conftest import ROOT
from vm_training.metrics import auc, normalized_entropy

pytestmark = pytest.mark.usefixtures("demo")


def start(folder: Path) -> "subprocess.Popen[str]":
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DAS_")}
    command = [
        sys.executable,
        "-m",
        "das_service.cli",
        "demo",
        "--weeks",
        "3",
        "--rotate-weeks",
        "2",
        "--folder",
        str(folder),
    ]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "data"


@pytest.fixture(scope="module")
def demo(folder: Path) -> dict[str, Any]:
    process = start(folder)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    return dict(json.loads(out.splitlines()[-1]))


def column(table: Path, name: str) -> list[Any]:
    files = pads.dataset(DeltaTable(table).file_uris(), format="parquet")
    return list(files.to_table(columns=[name])[name].to_pylist())


def test_every_posted_impression_was_scored_once_and_can_be_looked_up(demo: dict[str, Any]) -> None:
    posted = demo["examples_posted"]
    assert posted > 200_000
    same = ("examples_scored", "fm_forwards", "supervision_rows_offline")
    assert {name: demo[name] for name in same} == dict.fromkeys(same, posted)
    assert (demo["duplicates"], demo["missing"], demo["leaky"], demo["coverage"]) == (0, 0, 0, 1.0)


def test_the_teacher_knows_more_than_the_base_rate(demo: dict[str, Any]) -> None:
    assert demo["fm"]["ne"] < 0.75
    assert demo["fm"]["auc"] > 0.85


def test_a_recount_of_the_kept_folder_gives_the_same_numbers(demo: dict[str, Any], folder: Path) -> None:
    tables = folder / "service" / "tables" / "complete_journey"
    posted = pq.read_table(folder / "posted.parquet")["example_id"].to_pylist()
    scored = Counter(column(tables / "supervision" / "teacher", "example_id"))
    assert len(posted) == len(set(posted)) == demo["examples_posted"]
    assert scored == Counter(posted)
    assert Counter(column(tables / "examples", "example_id")) == scored
    assert {path.stem for path in (folder / "metrics").glob("*.txt")} >= {"api", "worker", "sink"}


def test_labels_come_late_and_the_teacher_is_renewed_from_what_closed(demo: dict[str, Any], folder: Path) -> None:
    tables = folder / "service" / "tables" / "complete_journey"
    assert demo["snapshots"] == 2
    assert set(column(tables / "supervision" / "teacher", "snapshot_id")) == {"weeks-1-26", "weeks-1-28"}
    late = column(tables / "late_labels", "example_id")
    assert demo["late_labels"] == len(late) > 0
    assert set(late) <= set(column(tables / "closed", "example_id"))
    assert 0 < demo["freshness_gap_seconds"]["p50"] < demo["freshness_gap_seconds"]["p95"] < 21 * 86_400


@pytest.mark.parametrize("place", [0, 1])
def test_a_student_s_numbers_are_those_of_its_closed_rows(demo: dict[str, Any], folder: Path, place: int) -> None:
    vm = demo["vms"][place]
    kept = pq.read_table(folder / "students" / f"{vm['name']}.parquet")
    tables = folder / "service" / "tables" / "complete_journey"
    own = {
        example
        for path in (folder / "weeks").glob("week_*.parquet")
        for example in pq.read_table(path, filters=pc.field(vm["name"]) != "0")["example_id"].to_pylist()
    }
    closed = [example for example in column(tables / "closed", "example_id") if example in own]
    assert vm["rows"] == len(kept) == len(closed)
    assert kept["teacher_logit"].null_count == 0
    label = kept["purchase"].to_numpy()
    runs = {run: kept[f"logit_{run}"].to_numpy() for run in ("without", "with", "shuffled")}
    assert vm == {
        "name": vm["name"],
        "rows": len(kept),
        **{f"ne_{run}": normalized_entropy(logit, label) for run, logit in runs.items()},
        **{f"auc_{run}": auc(runs[run], label) for run in ("without", "with")},
    }


def test_supervision_helps_each_student_and_on_other_rows_it_does_not(demo: dict[str, Any]) -> None:
    assert [vm["name"] for vm in demo["vms"]] == ["display", "mailer"]
    for vm in demo["vms"]:
        assert vm["ne_with"] < vm["ne_without"] < vm["ne_shuffled"]
        assert vm["auc_with"] > vm["auc_without"]


def test_ctrl_c_leaves_nothing_running(folder: Path) -> None:
    roles = folder / "service" / "roles.json"
    roles.unlink()
    process = start(folder)
    deadline = time.monotonic() + 300
    while not (roles.exists() and all(r["pid"] for r in json.loads(roles.read_text())["roles"])):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert (process.returncode, alive) == (130, [])
    assert len(gone) >= 2  # the supervisor and its server, at least
