"""The worker role on both servers: scores once, survives death, poison, lost connections and lost logs."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from das_service.logs import streams
from das_service.registry import FmRecord, dataset_field, fm_field
from schemas import keys
from schemas.dataset import DatasetSpec, Feature
from tests.busy import busy
from tests.conftest import Server, make_settings
from tests.declared import SPEC, Declared, examples
from tests.fakes import expected_supervision
from tests.roles import Roles, beats, metric, publish, wait_for


@pytest.fixture
def declared(own_server: Server, tmp_path: Path) -> Iterator[Declared]:
    with contextlib.closing(own_server.client()) as client:
        yield Declared(make_settings(own_server, tmp_path), client)


@pytest.fixture
def workers(declared: Declared, tmp_path: Path) -> Iterator[Roles]:
    with contextlib.closing(Roles(declared.settings, tmp_path)) as roles:
        yield roles


def test_every_example_is_scored_once_with_the_answers_computed_by_hand(declared: Declared, workers: Roles) -> None:
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


def test_a_repeat_in_another_chunk_is_not_scored_again(declared: Declared, workers: Roles) -> None:
    declared.declare_fm("f")
    workers.start()
    publish(declared)
    declared.append(0, examples(0, 10))
    wait_for(lambda: declared.pending("f") == 0)
    declared.append(0, examples(5, 10))
    wait_for(lambda: declared.pending("f") == 0)
    assert [row["example_id"] for row in declared.scored("f")] == [f"e{i}" for i in range(15)]


def test_two_workers_and_a_kill_publish_each_chunk_once(declared: Declared, workers: Roles) -> None:
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
    declared: Declared, workers: Roles, poison: str
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


def test_a_row_that_kills_the_process_is_found_by_those_who_come_after(declared: Declared, workers: Roles) -> None:
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


def test_a_killed_server_costs_a_pause_and_no_row(declared: Declared, workers: Roles, own_server: Server) -> None:
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


def test_a_lost_log_halts_the_lane_and_says_so(declared: Declared, workers: Roles) -> None:
    declared.declare_fm("f")
    workers.start()
    publish(declared)
    declared.append(0, examples(0, 10))
    wait_for(lambda: declared.pending("f") == 0)
    declared.client.delete("{ads.0}:scored:f")
    declared.append(0, examples(10, 10))

    wait_for(lambda: "das recover" in str([beat["problems"] for beat in beats(declared)]))
    assert declared.pending("f") == 1


def test_sigterm_finishes_what_is_in_hand_and_ends_with_0(declared: Declared, workers: Roles) -> None:
    declared.declare_fm("f")
    process = workers.start()
    publish(declared)
    declared.append(0, examples(0, 100))
    wait_for(lambda: declared.pending("f") == 0)
    process.terminate()
    assert process.wait(timeout=20) == 0
    assert declared.client.hlen("das:beats") == 0


def test_a_feature_added_under_way_is_no_reason_to_die(declared: Declared, workers: Roles) -> None:
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
    assert (declared.dead("f"), process.poll()) == ([], None)
    logits, _ = expected_supervision(pa.Table.from_pylist(examples(0, 30)), SPEC)
    np.testing.assert_allclose([row["click__logit"] for row in declared.scored("f")], logits["click"], rtol=1e-6)


@pytest.mark.parametrize("change", [{"data": b"no batch"}, {"head": ["v", "1"]}], ids=["rows", "header"])
def test_an_entry_that_cannot_be_read_is_left_to_the_sink(
    declared: Declared, workers: Roles, change: dict[str, Any]
) -> None:
    declared.declare_fm("f")
    process = workers.start()
    publish(declared)
    limits = streams.AppendLimits(epoch=1, floors={}, max_bytes=1 << 30, dedup_seconds=3600)
    streams.append_chunks(declared.client, [dataclasses.replace(declared.chunk(0, examples(0, 5)), **change)], limits)
    declared.append(0, examples(10, 10))
    wait_for(lambda: declared.pending("f") == 0)
    assert [row["example_id"] for row in declared.scored("f")] == [f"e{i}" for i in range(10, 20)]
    wait_for(lambda: metric(declared, "das_fm_unreadable_entries_total") == 1)
    assert (process.poll(), declared.client.xlen(keys.log("ads", 0, "examples"))) == (None, 2)


@pytest.mark.parametrize("own_server", ["valkey"], indirect=True)
def test_an_fm_of_a_dataset_that_is_not_declared_holds_nobody_up(declared: Declared, workers: Roles) -> None:
    declared.registry.change(fm_field("aaa", "f"), FmRecord, lambda _: FmRecord(fm="f", required=True))
    declared.declare_fm("f")
    process = workers.start()
    publish(declared)
    declared.append(0, examples(0, 10))
    wait_for(lambda: declared.pending("f") == 0)
    assert (len(declared.scored("f")), process.poll()) == (10, None)


def test_a_server_that_is_busy_for_a_while_costs_a_pause(declared: Declared, workers: Roles) -> None:
    declared.declare_fm("f")
    process = workers.start()
    publish(declared)
    for i in range(40):
        declared.append(i % 2, examples(i * 100, 100))
    wait_for(lambda: len(declared.scored("f")) > 0)
    with busy(declared.client):
        time.sleep(2)
    wait_for(lambda: declared.pending("f") == 0)
    assert (len(declared.scored("f")), declared.dead("f"), process.poll()) == (4000, [], None)
