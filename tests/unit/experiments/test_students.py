"""The students: their own rows, three runs from one start, each row predicted before it was trained on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from experiments import students
from experiments.data.complete_journey import WeekFile
from experiments.students import (
    RUNS,
    STUDENTS,
    Rows,
    StudentRuns,
    Trainer,
    build_rows,
    count_trained,
    read_table,
    train_students,
)
from experiments.teacher import torch_settings
from vm_training.layout import read_layout
from vm_training.tensors import Batch, build_batch


def _batches(table: pa.Table, *, status: str = "present", rows: int = 2_048) -> list[Batch]:
    """The table as the service's training batches, with a logit that is the product's own."""
    logit = pa.array(np.sin(table["product_id"].to_numpy()).astype(np.float32) - 2)
    logit = pc.if_else(status == "present", logit, pa.scalar(None, pa.float32()))
    codes = pa.array([status] * len(table)).dictionary_encode()
    served = table.drop_columns(["week"]).append_column("teacher__status", codes)
    served = served.append_column("teacher__purchase__logit", logit).combine_chunks()
    parts = [served.slice(start, rows).to_batches()[0] for start in range(0, len(served), rows)]
    return [build_batch(part, read_layout(part.schema), buckets=1 << 20) for part in parts]


def _weights(trainer: Trainer) -> list[bytes]:
    return [weight.detach().numpy().tobytes() for weight in trainer.student.parameters()]


@pytest.fixture
def settings() -> Iterator[None]:
    with torch_settings(seed=0, num_threads=1):
        yield


@pytest.fixture(scope="module")
def table(week_files: dict[int, WeekFile]) -> pa.Table:
    """What the student of displays has of the first hours of week 20."""
    return read_table([week_files[20].path], student="display").slice(0, 10_000)


@pytest.fixture(scope="module")
def rows(table: pa.Table) -> Rows:
    return build_rows(table)


def _train(paths: list[Path], table: pa.Table, **options: Any) -> dict[str, StudentRuns]:
    """Both students on their rows of the table."""
    own = {name: table.filter(pc.field(name) != "0") for name in STUDENTS}
    return train_students(paths[:1], paths, open_batches=lambda name: _batches(own[name], **options), fm="teacher")


@pytest.fixture(scope="module")
def runs(paths: list[Path], table: pa.Table) -> StudentRuns:
    return _train(paths, table)["display"]


@pytest.mark.parametrize("student", STUDENTS)
def test_a_student_has_the_rows_of_its_slice_in_their_order(student: str, paths: list[Path]) -> None:
    whole = pq.read_table(paths)
    expected = [
        i for i, flag in zip(*(whole[c].to_pylist() for c in ("example_id", student)), strict=True) if flag != "0"
    ]
    assert read_table(paths, student=student)["example_id"].to_pylist() == expected
    assert 0 < len(expected) < len(whole)


def test_a_student_sees_no_history_of_purchases(table: pa.Table) -> None:
    assert [name for name in table.column_names if name.endswith("_purchases") or name == "user_baskets"] == []


@pytest.mark.parametrize(("place", "names"), [(0, ["user_id"]), (4, ["product_type"]), (-1, ["user_id", "product_id"])])
def test_equal_values_or_pairs_share_an_index_and_others_hardly_ever(
    place: int, names: list[str], table: pa.Table, rows: Rows
) -> None:
    values = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    index = rows.indices[:, place].tolist()
    num_values = len(set(values))
    assert len(set(zip(values, index, strict=True))) == num_values
    assert 0.99 * num_values < len(set(index)) <= num_values
    assert 0 <= min(index) < max(index) < 2**20


@pytest.mark.usefixtures("settings")
def test_a_batch_is_predicted_before_it_is_trained_on(rows: Rows) -> None:
    trainer = Trainer()
    with torch.no_grad():
        before: Tensor = trainer.student(rows.indices[:1000])
    assert np.array_equal(trainer.train(rows)[:1000], before.numpy())
    with torch.no_grad():
        assert not torch.equal(trainer.student(rows.indices[:1000]), before)


@pytest.mark.usefixtures("settings")
def test_a_copy_goes_on_as_the_trainer_would_and_shares_nothing_with_it(rows: Rows) -> None:
    trainer = Trainer()
    trainer.train(rows)
    before = _weights(trainer)
    once = trainer.copy().train(rows)
    assert _weights(trainer) == before
    assert np.array_equal(trainer.train(rows), once)


@pytest.mark.usefixtures("settings")
def test_a_batch_s_ids_and_crosses_are_those_of_the_files(table: pa.Table, rows: Rows) -> None:
    (batch,) = _batches(table, rows=len(table))
    assert torch.equal(students.build_indices(batch.categories_BC.numpy()), rows.indices)


def test_rows_without_supervision_train_on_their_labels_alone(paths: list[Path], table: pa.Table) -> None:
    found = _train(paths, table, status="leaky")["display"]
    assert not found.present.any()
    assert np.array_equal(found.logits["with"], found.logits["without"])


def test_all_runs_of_a_student_start_alike_and_then_part(runs: StudentRuns) -> None:
    first = [runs.logits[run][:1000] for run in RUNS]
    assert all(np.array_equal(logits, first[0]) for logits in first)
    last = [runs.logits[run][-1000:].tobytes() for run in RUNS]
    assert len(set(last)) == len(RUNS)


def test_the_first_weeks_are_trained_on_before(paths: list[Path], runs: StudentRuns, table: pa.Table) -> None:
    own = build_rows(table.filter(pc.field("display") != "0"))
    with torch_settings(seed=0, num_threads=1):
        trainer = Trainer()
        trainer.train(build_rows(read_table(paths[:1], student="display")))
        parts = [slice(start, start + 2_048) for start in range(0, len(own.labels), 2_048)]
        logits = [trainer.train_batch(own.indices[part], own.labels[part]) for part in parts]
    assert np.array_equal(np.concatenate(logits), runs.logits["without"])


def test_two_students_side_by_side_give_the_same_each_time(paths: list[Path], table: pa.Table) -> None:
    together, again = (_train(paths, table) for _ in range(2))
    for name in STUDENTS:
        assert len(together[name].labels) == len(together[name].weeks)
        assert all(np.array_equal(together[name].logits[run], again[name].logits[run]) for run in RUNS)


def test_a_row_s_week_is_that_of_its_file(paths: list[Path]) -> None:
    table = read_table(paths, student="display")
    some = table.take(pa.array(range(0, len(table), 40)))
    assert _train(paths, some)["display"].weeks.tolist() == some["week"].to_pylist()


def test_progress_adds_up_to_the_rows_of_all_runs(paths: list[Path]) -> None:
    reported: list[int] = []
    own = {name: read_table(paths[:1], student=name) for name in STUDENTS}
    train_students(
        paths[:1],
        paths[:1],
        open_batches=lambda name: _batches(own[name]),
        fm="teacher",
        on_progress=reported.append,
    )
    assert sum(reported) == count_trained(paths[:1], paths[:1])


def test_a_student_without_rows_says_so(paths: list[Path], table: pa.Table) -> None:
    with pytest.raises(ValueError, match="no closed rows"):
        _train(paths, table.slice(0, 0))


def test_rows_out_of_order_are_refused(table: pa.Table) -> None:
    with pytest.raises(ValueError, match="not in the order of event_time"):
        build_rows(table.take(np.arange(len(table))[::-1]))
