"""Snapshots of a running worker: validated, switched, withdrawn, whatever is pending or in flight meanwhile."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import nn

from das_service.errors import UnavailableError
from das_service.folder import locked
from das_service.logs import streams
from das_service.registry import COPY
from fm_inference import Signature
from tests.conftest import Server, make_settings
from tests.declared import SPEC, Declared, examples
from tests.roles import Roles, beats, metric, publish, state, wait_for

ONE_SERVER = pytest.mark.parametrize("own_server", ["valkey"], indirect=True)


@pytest.fixture
def declared(own_server: Server, tmp_path: Path) -> Iterator[Declared]:
    with contextlib.closing(own_server.client()) as client:
        yield Declared(make_settings(own_server, tmp_path), client)


@pytest.fixture
def workers(declared: Declared, tmp_path: Path) -> Iterator[Roles]:
    with contextlib.closing(Roles(declared.settings, tmp_path)) as roles:
        yield roles


def test_a_new_snapshot_takes_over_without_a_restart_and_nothing_is_scored_twice(
    declared: Declared, workers: Roles
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


def test_a_withdrawn_snapshot_publishes_no_more(declared: Declared, workers: Roles) -> None:
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


def test_a_rejected_snapshot_leaves_the_running_one_at_work(declared: Declared, workers: Roles) -> None:
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


class Scaled(nn.Module):
    """y = 1.003 x exactly, or (cancelling) y = 257 x - 256 x; bfloat16 has eight bits for the weights."""

    def __init__(self, *, cancelling: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[257.0, -256.0] if cancelling else [1.003, 0.0]]))

    def forward(self, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.linear(torch.cat([dense, dense], dim=1))}


@ONE_SERVER
def test_a_worker_with_bf16_judges_snapshots_with_bf16(declared: Declared, workers: Roles) -> None:
    declared.declare_fm("f")
    for snapshot_id, cancelling in (("fine", False), ("wrong", True)):
        signature = Signature.model_validate(
            {
                "fm": "f", "snapshot_id": snapshot_id, "dataset": SPEC, "outputs": {"logits": {"click": "y"}},
                "inputs": [{"tensor": "dense", "features": ["price"], "encode": {"kind": "float", "null": 0.0}}],
                "golden": pa.table({"price": [1.0, 2.0, 3.0]}),
            }
        )  # fmt: skip
        declared.register_module("f", signature, Scaled(cancelling=cancelling))
    workers.start(DAS_BF16="true")
    wait_for(lambda: state(declared, "f", "wrong").state != "validating")
    assert (state(declared, "f", "fine").state, state(declared, "f", "fine").reasons) == ("validated", ())
    (reason,) = state(declared, "f", "wrong").reasons
    assert reason.startswith("golden.arrow: logit 'click' differs in 3 of 3 values")


def test_examples_wait_for_the_first_snapshot_through_restarts_of_the_worker(
    declared: Declared, workers: Roles
) -> None:
    declared.declare_fm("f")
    first = workers.start()
    wait_for(lambda: [beat["fms"] for beat in beats(declared)] == [["ads/f"]])
    declared.append(0, examples(0, 10))
    first.terminate()
    assert first.wait(timeout=30) == 0
    declared.append(1, examples(10, 10))
    workers.start()
    publish(declared)
    declared.append(0, examples(20, 10))
    wait_for(lambda: declared.pending("f") == 0)
    scored = [row["example_id"] for row in declared.scored("f")]
    assert sorted(scored) == sorted(f"e{i}" for i in range(30))
    assert declared.dead("f") == []


def held_entries(declared: Declared) -> int:
    """Give how many entries workers hold."""
    groups = streams.read_groups(declared.client, "ads", range(SPEC.partitions), "examples")
    return sum(group["fm:f"].pending for group in groups.values())


def registry_is_locked(declared: Declared) -> bool:
    """Give whether somebody is at the registry's copy: a worker that has just judged a snapshot may be."""
    try:
        with locked((Path(declared.settings.tables_uri) / COPY).with_suffix(".lock"), wait_seconds=0.0):
            return False
    except UnavailableError:
        return True


def hold_up(declared: Declared, process: subprocess.Popen[bytes]) -> int:
    """Log examples, stop the process (SIGSTOP) while it holds some and has others to read; give how many there are."""
    chunks = 0
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        os.kill(process.pid, signal.SIGSTOP)
        held = held_entries(declared)
        if held and declared.pending("f") > held and not registry_is_locked(declared):
            return 500 * chunks
        while declared.pending("f") < 120:
            declared.append(chunks % 2, examples(500 * chunks, 500))
            chunks += 1
        os.kill(process.pid, signal.SIGCONT)
        while not held_entries(declared) and declared.pending("f"):
            pass
    pytest.fail("it was never caught at work")


def test_entries_that_a_dead_worker_held_go_to_the_snapshot_that_is_active_then(
    declared: Declared, workers: Roles
) -> None:
    declared.declare_fm("f")
    first = workers.start()
    publish(declared)
    declared.register("f", "s2", shift=1.0)
    wait_for(lambda: state(declared, "f", "s2").state == "validated")
    count = hold_up(declared, first)
    declared.activate("f", "s2")
    first.kill()
    workers.start()
    wait_for(lambda: declared.pending("f") == 0)
    scored = declared.scored("f")
    assert sorted(row["example_id"] for row in scored) == sorted(f"e{i}" for i in range(count))
    assert ("s2" in {row["snapshot_id"] for row in scored}, declared.dead("f")) == (True, [])


def test_a_batch_in_flight_of_a_withdrawn_snapshot_is_scored_again_by_the_one_it_gave_way_to(
    declared: Declared, workers: Roles
) -> None:
    declared.declare_fm("f")
    process = workers.start()
    publish(declared)
    declared.register("f", "s2", shift=1.0)
    wait_for(lambda: state(declared, "f", "s2").state == "validated")
    declared.activate("f", "s2")
    wait_for(lambda: [beat["lanes"]["ads/f"]["snapshot"] for beat in beats(declared)] == ["s2"])
    count = hold_up(declared, process)
    declared.activate("f", "s1", withdraw=True)
    before = len(declared.scored("f"))
    os.kill(process.pid, signal.SIGCONT)
    wait_for(lambda: declared.pending("f") == 0)
    scored = declared.scored("f")
    assert sorted(row["example_id"] for row in scored) == sorted(f"e{i}" for i in range(count))
    assert (sum(row["snapshot_id"] == "s2" for row in scored), declared.dead("f")) == (before, [])
    assert metric(declared, "das_fm_wasted_rows_total") > 0
