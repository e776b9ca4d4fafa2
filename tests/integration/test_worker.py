"""The worker role on both servers: scores once, survives death, poison, withdrawal and lost connections."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from das_service.logs import streams
from das_service.registry import SnapshotRecord, dataset_field
from das_service.settings import Settings
from schemas.dataset import DatasetSpec, Feature
from tests.conftest import ROOT, Server, make_settings
from tests.declared import SPEC, Declared, examples
from tests.fakes import expected_supervision


def wait_for(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("the condition did not come true in time")
        time.sleep(0.02)


@dataclass
class Workers:
    """Worker processes of one test."""

    settings: Settings
    folder: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> subprocess.Popen[bytes]:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("DAS_")},
            "DAS_REDIS_URL": self.settings.redis_url.get_secret_value(),
            "DAS_TABLES_URI": self.settings.tables_uri,
            "DAS_SNAPSHOTS_URI": self.settings.snapshots_uri,
            "DAS_DEAD_AFTER_SECONDS": "2",
        }
        with (self.folder / f"worker-{len(self.running)}.log").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "fm_inference"], env=environment, cwd=ROOT, stdout=output, stderr=output
            )
        self.running.append(process)
        return process

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("worker-*.log")))


@pytest.fixture
def declared(own_server: Server, tmp_path: Path) -> Iterator[Declared]:
    with contextlib.closing(own_server.client()) as client:
        yield Declared(make_settings(own_server, tmp_path), client)


@pytest.fixture
def workers(declared: Declared, tmp_path: Path) -> Iterator[Workers]:
    group = Workers(declared.settings, tmp_path)
    yield group
    for process in group.running:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def state(declared: Declared, fm: str, snapshot_id: str) -> SnapshotRecord:
    return declared.catalog.snapshot(declared.dataset, fm, snapshot_id)


def publish(declared: Declared, fm: str = "f", snapshot_id: str = "s1", **options: object) -> None:
    """Register and activate a closed-form snapshot with a running worker's help."""
    declared.register(fm, snapshot_id, **options)
    wait_for(lambda: state(declared, fm, snapshot_id).state != "validating")
    assert state(declared, fm, snapshot_id).reasons == ()
    declared.activate(fm, snapshot_id)


def test_every_example_is_scored_once_with_the_answers_computed_by_hand(declared: Declared, workers: Workers) -> None:
    declared.declare_fm("f")
    rows = examples(0, 300)
    declared.append(0, rows[:120])
    workers.start()
    publish(declared)
    declared.append(1, rows[120:])
    wait_for(lambda: declared.pending("f") == 0)

    logits, embeddings = expected_supervision(pa.Table.from_pylist(rows), SPEC)
    scored = declared.scored("f")
    assert [row["example_id"] for row in scored] == [row["example_id"] for row in rows]
    np.testing.assert_allclose([row["click__logit"] for row in scored], logits["click"], rtol=1e-6)
    (name,) = embeddings
    assert [row[name] for row in scored] == [bytes(value) for value in embeddings[name]]
    online = declared.online(1, "f", "e299")
    assert online is not None
    assert (online["click__logit"], bytes(online[name])) == (scored[-1]["click__logit"], scored[-1][name])


def test_a_repeat_in_another_chunk_is_not_scored_again(declared: Declared, workers: Workers) -> None:
    declared.declare_fm("f")
    workers.start()
    publish(declared)
    declared.append(0, examples(0, 10))
    wait_for(lambda: declared.pending("f") == 0)
    declared.append(0, examples(5, 10))
    wait_for(lambda: declared.pending("f") == 0)
    assert [row["example_id"] for row in declared.scored("f")] == [f"e{i}" for i in range(15)]


def test_two_workers_and_a_kill_publish_each_chunk_once(declared: Declared, workers: Workers) -> None:
    declared.declare_fm("f")
    workers.start()
    publish(declared)
    workers.start()
    for i in range(40):
        declared.append(i % 2, examples(i * 50, 50))
    wait_for(lambda: len(declared.scored("f")) > 200)
    os.kill(workers.running[0].pid, signal.SIGKILL)
    for i in range(40, 80):
        declared.append(i % 2, examples(i * 50, 50))
    wait_for(lambda: declared.pending("f") == 0)
    assert sorted(row["example_id"] for row in declared.scored("f")) == sorted(f"e{i}" for i in range(4000))


@pytest.mark.parametrize("poison", ["raise", "nan"])
def test_poison_rows_go_to_the_dead_letters_and_all_others_are_scored(
    declared: Declared, workers: Workers, poison: str
) -> None:
    declared.declare_fm("f")
    workers.start()
    publish(declared, poison=poison, poison_above=1000.0)
    rows = examples(0, 200)
    for bad in (3, 77, 78):
        rows[bad]["price"] = 5000.0
    declared.append(0, rows)
    wait_for(lambda: declared.pending("f") == 0)
    assert [row["example_id"] for row in declared.dead("f")] == ["e3", "e77", "e78"]
    assert [row["example_id"] for row in declared.scored("f")] == [f"e{i}" for i in range(200) if i not in {3, 77, 78}]
    online = declared.online(0, "f", "e77")
    assert online is not None
    assert online["_state"] == 1


def test_a_row_that_kills_the_process_is_found_by_those_who_come_after(declared: Declared, workers: Workers) -> None:
    declared.declare_fm("f")
    workers.start()
    publish(declared, poison="kill", poison_above=1000.0)
    rows = examples(0, 60)
    rows[41]["price"] = 5000.0
    declared.append(0, rows)
    deadline = time.monotonic() + 120
    while declared.pending("f") and time.monotonic() < deadline:
        if workers.running[-1].poll() is not None:
            workers.start()
        time.sleep(0.05)
    assert [(row["example_id"], "ended the process" in row["reason"]) for row in declared.dead("f")] == [("e41", True)]
    assert sorted(row["example_id"] for row in declared.scored("f")) == sorted(f"e{i}" for i in range(60) if i != 41)


def test_a_new_snapshot_takes_over_without_a_restart_and_nothing_is_scored_twice(
    declared: Declared, workers: Workers
) -> None:
    declared.declare_fm("f")
    process = workers.start()
    publish(declared)
    for i in range(20):
        declared.append(0, examples(i * 10, 10))
    publish(declared, snapshot_id="s2", shift=1.0)
    for i in range(20, 400):
        declared.append(0, examples(i * 10, 10))
    wait_for(lambda: declared.pending("f") == 0)
    declared.append(0, examples(4000, 10))
    wait_for(lambda: declared.scored("f")[-1]["snapshot_id"] == "s2")
    assert [row["example_id"] for row in declared.scored("f")] == [f"e{i}" for i in range(4010)]
    assert process.poll() is None


def test_a_withdrawn_snapshot_publishes_no_more(declared: Declared, workers: Workers) -> None:
    declared.declare_fm("f")
    workers.start()
    publish(declared)
    declared.register("f", "s2", shift=1.0)
    wait_for(lambda: state(declared, "f", "s2").state == "validated")
    declared.activate("f", "s2")
    declared.append(0, examples(0, 10))
    wait_for(lambda: declared.pending("f") == 0)
    declared.activate("f", "s1", withdraw=True)
    declared.append(0, examples(10, 10))
    wait_for(lambda: declared.pending("f") == 0)
    assert {row["snapshot_id"] for row in declared.scored("f")[10:]} == {"s1"}


def test_a_killed_server_costs_a_pause_and_no_row(declared: Declared, workers: Workers, own_server: Server) -> None:
    declared.declare_fm("f")
    process = workers.start()
    publish(declared)
    for i in range(30):
        declared.append(i % 2, examples(i * 100, 100))
    own_server.kill()
    own_server.start()
    for i in range(30, 60):
        declared.append(i % 2, examples(i * 100, 100))
    wait_for(lambda: declared.pending("f") == 0)
    assert sorted(row["example_id"] for row in declared.scored("f")) == sorted(f"e{i}" for i in range(6000))
    assert process.poll() is None


def test_a_lost_log_halts_the_lane_and_says_so(declared: Declared, workers: Workers) -> None:
    declared.declare_fm("f")
    workers.start()
    publish(declared)
    declared.append(0, examples(0, 10))
    wait_for(lambda: declared.pending("f") == 0)
    declared.client.delete("{ads.0}:scored:f")
    declared.append(0, examples(10, 10))

    def halted() -> bool:
        beats = declared.client.hgetall("das:beats").values()
        return any(b"das recover" in beat for beat in beats)

    wait_for(halted)
    assert declared.pending("f") == 1


def test_sigterm_finishes_what_is_in_hand_and_ends_with_0(declared: Declared, workers: Workers) -> None:
    declared.declare_fm("f")
    process = workers.start()
    publish(declared)
    declared.append(0, examples(0, 100))
    wait_for(lambda: declared.pending("f") == 0)
    process.terminate()
    assert process.wait(timeout=20) == 0
    assert declared.client.hlen("das:beats") == 0


def test_a_rejected_snapshot_leaves_the_running_one_at_work(declared: Declared, workers: Workers) -> None:
    declared.declare_fm("f")
    workers.start()
    publish(declared)
    folder = declared.register("f", "broken", shift=1.0)
    (folder / "model.pt2").write_bytes(b"PK nothing")
    wait_for(lambda: state(declared, "f", "broken").state == "rejected")
    assert "model.pt2" in "; ".join(state(declared, "f", "broken").reasons)
    declared.append(0, examples(0, 10))
    wait_for(lambda: declared.pending("f") == 0)
    assert len(declared.scored("f")) == 10


def test_a_feature_added_under_way_is_no_reason_to_die(declared: Declared, workers: Workers) -> None:
    declared.declare_fm("f")
    process = workers.start()
    publish(declared)
    declared.append(0, examples(0, 10))
    wait_for(lambda: declared.pending("f") == 0)
    added = Feature(name="extra", type="float", nullable=True)
    declared.spec = declared.spec.model_copy(update={"features": (*declared.spec.features, added)})
    declared.append(0, examples(10, 10))  # before the worker can know of it
    time.sleep(0.5)
    declared.registry.change(dataset_field("ads"), DatasetSpec, lambda _: declared.spec)
    declared.append(0, examples(20, 10))
    wait_for(lambda: declared.pending("f") == 0)
    assert [row["example_id"] for row in declared.scored("f")] == [f"e{i}" for i in range(30)]
    assert process.poll() is None


def test_an_entry_that_cannot_be_read_is_passed_by(declared: Declared, workers: Workers) -> None:
    declared.declare_fm("f")
    process = workers.start()
    publish(declared)
    limits = streams.AppendLimits(epoch=1, floors={}, max_bytes=1 << 30, dedup_seconds=3600)
    streams.append_chunks(
        declared.client, [dataclasses.replace(declared.chunk(0, examples(0, 5)), data=b"no batch")], limits
    )
    declared.append(0, examples(10, 10))
    wait_for(lambda: declared.pending("f") == 0)
    assert [row["example_id"] for row in declared.scored("f")] == [f"e{i}" for i in range(10, 20)]
    assert process.poll() is None
