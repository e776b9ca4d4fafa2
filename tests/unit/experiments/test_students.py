"""The students: their own rows, three runs from one start, each row predicted before it was trained on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from experiments.complete_journey import WeekFile
from experiments.students import (
    RUNS,
    STUDENTS,
    Rows,
    StudentRuns,
    Supervision,
    Trainer,
    build_rows,
    count_trained,
    parse_supervision,
    read_table,
    train_students,
)
from experiments.teacher import torch_settings


def _augment(table: pa.Table, *, status: str = "present") -> pa.Table:
    """Append the columns that the service appends, with a logit that is the product's own."""
    logit = pa.array(np.sin(table["product_id"].to_numpy()).astype(np.float32) - 2)
    logit = pc.if_else(status == "present", logit, pa.scalar(None, pa.float32()))
    statuses = pa.array([status] * len(table)).dictionary_encode()
    return table.append_column("teacher__status", statuses).append_column("teacher__purchase__logit", logit)


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


@pytest.fixture(scope="module")
def supervision(table: pa.Table) -> Supervision:
    return parse_supervision(_augment(table), fm="teacher")


@pytest.fixture(scope="module")
def runs(paths: list[Path], table: pa.Table) -> StudentRuns:
    return train_students(paths[:1], {"display": _augment(table)}, fm="teacher")["display"]


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
def test_the_supervision_of_a_row_reaches_the_rows_after_it(rows: Rows, supervision: Supervision) -> None:
    start = Trainer()
    alone, taught = start.copy().train(rows), start.copy().train(rows, supervision)
    same = alone == taught
    assert 1000 < same.argmin() < 4000  # the first batch, and no more
    assert not same[4000:].all()


@pytest.mark.usefixtures("settings")
def test_rows_without_supervision_train_on_their_labels_alone(table: pa.Table, rows: Rows) -> None:
    missing = parse_supervision(_augment(table, status="missing"), fm="teacher")
    start = Trainer()
    assert np.array_equal(start.copy().train(rows, missing), start.copy().train(rows))


def test_a_supervision_is_present_by_its_status(table: pa.Table) -> None:
    augmented = _augment(table)
    supervision = parse_supervision(augmented, fm="teacher")
    assert supervision.present.all()
    assert supervision.logits.tolist() == augmented["teacher__purchase__logit"].to_pylist()
    assert not parse_supervision(_augment(table, status="leaky"), fm="teacher").present.any()


def test_shuffled_supervision_is_the_same_on_other_rows() -> None:
    logits = torch.arange(1000, dtype=torch.float32)
    shuffled = Supervision(logits=logits, present=logits < 300).shuffled(0)
    assert torch.equal(shuffled.logits.sort().values, logits)
    assert torch.equal(shuffled.present, shuffled.logits < 300)
    assert (shuffled.logits != logits).float().mean() > 0.9


def test_all_runs_of_a_student_start_alike_and_then_part(runs: StudentRuns) -> None:
    first = [runs.logits[run][:1000] for run in RUNS]
    assert all(np.array_equal(logits, first[0]) for logits in first)
    last = [runs.logits[run][-1000:].tobytes() for run in RUNS]
    assert len(set(last)) == len(RUNS)


def test_the_first_weeks_are_trained_on_before(paths: list[Path], runs: StudentRuns, table: pa.Table) -> None:
    with torch_settings(seed=0, num_threads=1):
        trainer = Trainer()
        trainer.train(build_rows(read_table(paths[:1], student="display")))
        assert np.array_equal(trainer.train(build_rows(table)), runs.logits["without"])


def test_two_students_side_by_side_are_what_each_is_alone(paths: list[Path], table: pa.Table) -> None:
    tables = {name: _augment(table.filter(pc.field(name) != "0")) for name in STUDENTS}
    together, again = (train_students(paths[:1], tables, fm="teacher") for _ in range(2))
    for name in STUDENTS:
        assert len(together[name].labels) == len(together[name].weeks) == len(tables[name])
        assert all(np.array_equal(together[name].logits[run], again[name].logits[run]) for run in RUNS)


def test_progress_adds_up_to_the_rows_of_all_runs(paths: list[Path], table: pa.Table) -> None:
    augmented = {"display": _augment(table)}
    reported: list[int] = []
    train_students(paths[:1], augmented, fm="teacher", on_progress=reported.append)
    first = len(read_table(paths[:1], student="display"))
    assert sum(reported) == count_trained(paths[:1], augmented) == first + 3 * len(table)


def test_rows_out_of_order_are_refused(table: pa.Table) -> None:
    with pytest.raises(ValueError, match="not in the order of event_time"):
        build_rows(table.take(np.arange(len(table))[::-1]))
