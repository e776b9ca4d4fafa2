"""A snapshot that is good in itself, beside the active one on recent labelled examples: judged, with the numbers."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from das_service.audit import read_audit
from das_service.folder import Folder
from das_service.registry import Registry, SnapshotRecord, dataset_field
from das_service.tables.durable_table import DurableTable
from fm_inference.labelled_slice import write_slice
from fm_inference.repository import Repository
from fm_inference.validator import Machine, Validator
from schemas.dataset import DatasetSpec
from schemas.entries import Position
from schemas.tables import CLOSED, EXAMPLES, closed_table_schema, examples_table_schema
from tests.conftest import Server, make_settings
from tests.declared import NOON, SPEC, TRAINED_THROUGH, Declared
from tests.fakes import expected_supervision
from tests.joining import table_rows

# One kind of server is enough: the rows that judge come from tables.
pytestmark = pytest.mark.parametrize("shared_server", ["valkey"], indirect=True)
GATES = {"slice_rows": 400, "min_rows": 100, "max_ne_ratio": 1.02, "calibration": [0.5, 2.0]}
DAY = timedelta(days=1)


@pytest.fixture
def declared(server: Server, tmp_path: Path) -> Iterator[Declared]:
    """FM f with the active snapshot s1, and a gate."""
    with contextlib.closing(server.client()) as client:
        declared = Declared(make_settings(server, tmp_path), client)
        declared.registry.change(
            dataset_field("ads"), DatasetSpec,
            lambda old: DatasetSpec.model_validate({**old.model_dump(), "snapshot_gates": GATES}),
        )  # fmt: skip
        declared.declare_fm("f")
        declared.register("f", "s1", shift=-6.0)
        assert validator(declared).validate_next(declared.catalog, {})
        declared.activate("f", "s1")
        yield declared


def validator(declared: Declared) -> Validator:
    machine = Machine(instance="w1", device="cpu", bf16=False, is_stopping=lambda: False)
    repository = Repository(Folder(declared.settings.snapshots_uri))
    return Validator(Registry(declared.client, declared.folder), repository, machine, declared.folder)


def close(declared: Declared, days: list[int], *, rows_a_day: int = 300, last_price: float = 1.0) -> None:
    """Write examples of some days after NOON, and their labels: drawn by what s1 says of them."""
    random = np.random.default_rng(5)
    num_rows = rows_a_day * len(days)
    times = [
        int((NOON + day * DAY + timedelta(seconds=i)).timestamp()) * 1_000_000
        for day in days
        for i in range(rows_a_day)
    ]
    features = {
        "price": [*random.integers(0, 4, num_rows - 1).astype(float).tolist(), last_price],
        "user_id": [f"u{i % 50}" for i in range(num_rows)],
        "item": random.integers(0, 100, num_rows).tolist(),
    }
    rows = [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]
    logits, _ = expected_supervision(rows, SPEC, shift=-6.0)
    click = random.random(num_rows) < 1 / (1 + np.exp(-logits["click"]))
    common = {"example_id": [f"e{i}" for i in range(num_rows)], "event_time": times}
    empty = np.zeros(num_rows, np.int64)
    tables: dict[str, tuple[pa.Schema, dict[str, Any]]] = {
        EXAMPLES: (
            examples_table_schema(SPEC),
            {**common, **features, "received_at": empty, "is_late": empty.astype(bool), "content_hash": empty},
        ),
        CLOSED: (
            closed_table_schema(SPEC),
            {**common, "ready_seq": empty, "closed_at": empty, "click": click.astype(np.float32), "_partition": empty,
             "_labels_through": empty},
        ),
    }  # fmt: skip
    for name, (schema, columns) in tables.items():
        table = DurableTable(declared.folder, "ads", name, schema=schema, partitions=2, retention_hours=24)
        table.open(epoch=1)
        table.commit(table_rows(columns, schema, SPEC), {0: Position(epoch=1, seq=0)})


def judged(declared: Declared, **options: Any) -> SnapshotRecord:
    """Register s2 and give it as the worker leaves it."""
    declared.register("f", "s2", **options)
    assert validator(declared).validate_next(declared.catalog, {})
    return declared.catalog.snapshot("ads", "f", "s2")


def test_a_snapshot_as_good_as_the_active_one_is_validated_and_its_numbers_kept(declared: Declared) -> None:
    close(declared, [0, 1])

    snapshot = judged(declared, shift=-6.0)

    assert (snapshot.state, snapshot.reasons) == ("validated", ())
    gate = snapshot.gate
    assert gate is not None
    assert (gate.active, gate.rows, gate.note) == ("s1", 400, "")
    assert gate.last == NOON + DAY + timedelta(seconds=299)
    assert gate.first == NOON + timedelta(seconds=200)
    click = gate.tasks["click"]
    assert (click.rows, click.ne_ratio, click.calibration) == (400, 1.0, click.active_calibration)
    assert click.ne == click.active_ne
    last = read_audit(declared.client, "ads", "f")[-1]
    assert (last["who"], last["what"], last["snapshot_id"], last["after"]) == (
        "w1",
        "validate",
        "s2",
        {"state": "validated"},
    )


def test_a_worse_snapshot_is_rejected_with_both_numbers(declared: Declared) -> None:
    close(declared, [0, 1])

    snapshot = judged(declared, shift=30.0)

    assert snapshot.state == "rejected"
    too_uncertain, too_much = snapshot.reasons
    assert snapshot.gate is not None
    click = snapshot.gate.tasks["click"]
    assert f"NE is {click.ne:.4f} on 400 recent labelled rows, {click.ne_ratio:.4f} times the" in too_uncertain
    assert f"calibration is {click.calibration:.4f}" in too_much
    assert read_audit(declared.client, "ads", "f")[-1]["what"] == "reject"


def test_rows_that_a_candidate_may_have_trained_on_are_left_out(declared: Declared) -> None:
    close(declared, [0, 1, 2])

    snapshot = judged(declared, shift=-6.0, trained_through=NOON + 2 * DAY + timedelta(seconds=100))

    assert snapshot.gate is not None
    assert (snapshot.state, snapshot.gate.rows) == ("validated", 200)
    assert snapshot.gate.first == NOON + 2 * DAY + timedelta(seconds=100)


def test_too_few_rows_are_no_gate_and_the_record_says_so(declared: Declared) -> None:
    close(declared, [0], rows_a_day=99)

    snapshot = judged(declared, shift=30.0)

    assert (snapshot.state, snapshot.reasons) == ("validated", ())
    assert snapshot.gate is not None
    assert "99 labelled rows have an event_time at or after" in snapshot.gate.note
    assert "100 are needed (snapshot_gates.min_rows)" in snapshot.gate.note


def test_without_any_closed_example_there_is_no_gate(declared: Declared) -> None:
    snapshot = judged(declared, shift=30.0)

    assert snapshot.gate is not None
    assert (snapshot.state, snapshot.gate.rows) == ("validated", 0)


def test_an_active_snapshot_that_is_gone_refuses_nothing_and_the_record_says_so(declared: Declared) -> None:
    close(declared, [0, 1])
    manifest = Path(declared.settings.snapshots_uri) / "ads" / "f" / "s1" / "snapshot.json"
    manifest.write_text("{}")

    snapshot = judged(declared, shift=-6.0)

    assert snapshot.gate is not None
    assert (snapshot.state, "the active snapshot can't be compared with" in snapshot.gate.note) == ("validated", True)


def test_a_model_that_fails_on_real_rows_is_rejected(declared: Declared) -> None:
    close(declared, [0, 1], last_price=2e6)

    snapshot = judged(declared, shift=-6.0, poison="raise", poison_above=1e6)

    assert snapshot.state == "rejected"
    assert snapshot.reasons[0].startswith("the recent labelled rows can't be scored: ")


def test_the_slice_is_the_most_recent_rows_with_features_and_labels(declared: Declared, tmp_path: Path) -> None:
    close(declared, [0, 1, 40])
    path = tmp_path / "slice.arrow"

    found = write_slice(declared.folder, "ads", SPEC, path, since=TRAINED_THROUGH, most_rows=500)

    with pa.memory_map(str(path)) as source:
        rows = pa.ipc.open_file(source).read_all()
    assert (found.rows, rows.num_rows) == (500, 500)
    assert rows.column_names == ["price", "user_id", "item", "label__click"]
    assert found.first == NOON + DAY + timedelta(seconds=100)
    assert found.last == datetime(2026, 4, 10, 12, 4, 59, tzinfo=UTC)
