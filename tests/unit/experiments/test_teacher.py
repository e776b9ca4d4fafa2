"""The teacher: one pass in order, honest about what it saw, the same for the same seed, fit to be exported."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from experiments.data.complete_journey import DATASET_SPEC, LABEL_COLUMN, WeekFile
from experiments.teacher import (
    EMBEDDING_SIZE,
    INPUTS,
    Batch,
    Teacher,
    TrainedTeacher,
    build_optimizers,
    build_signature,
    iter_batches,
    predict_logits,
    train_batch,
    train_teacher,
)
from fm_inference import export_snapshot
from fm_inference.features import build_tensors
from vm_training.metrics import auc


@pytest.fixture(scope="module")
def trained(paths: list[Path]) -> TrainedTeacher:
    """The teacher of weeks 1 and 2, read-only."""
    return train_teacher(paths)


@pytest.fixture
def rows(week_files: dict[int, WeekFile]) -> pa.Table:
    """A few later rows."""
    return pq.read_table(week_files[20].path).slice(0, 300)


def _weights(teacher: TrainedTeacher) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in teacher.module.state_dict().items()}


def _write(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path)
    return path


def test_batches_hold_every_row_once_in_the_order_of_the_files(paths: list[Path]) -> None:
    batches = list(iter_batches(paths, batch_rows=1000))
    tables = [pq.read_table(path) for path in paths]
    expected = [build_tensors(table, INPUTS) for table in tables]
    for name in ("cat", "dense"):
        together = torch.cat([batch.tensors[name] for batch in batches])
        assert torch.equal(together, torch.cat([tensors[name] for tensors in expected]))
    labels = np.concatenate([table[LABEL_COLUMN].to_numpy() for table in tables])
    assert np.array_equal(torch.cat([batch.labels for batch in batches]).numpy(), labels)


def test_no_batch_cuts_a_tie(paths: list[Path]) -> None:
    times = np.concatenate([pq.read_table(path)["event_time"].cast(pa.int64()).to_numpy() for path in paths])
    batches = list(iter_batches(paths, batch_rows=100))
    stops = np.cumsum([len(batch.labels) for batch in batches])
    assert len(batches) > 100
    assert [batch.last_event_time for batch in batches] == times[stops - 1].tolist()
    assert np.all(times[stops[:-1]] > times[stops[:-1] - 1])


def test_trained_through_is_just_after_the_last_row(paths: list[Path], trained: TrainedTeacher) -> None:
    last = pq.read_table(paths[-1])["event_time"][-1].as_py()
    assert trained.trained_through == last + timedelta(microseconds=1)
    assert trained.trained_through.tzinfo is UTC


def test_files_out_of_order_are_refused(paths: list[Path]) -> None:
    with pytest.raises(ValueError, match="not in the order of event_time, or not after the file before it"):
        train_teacher(paths[::-1])


def test_a_file_that_begins_at_the_time_where_another_ended_is_refused(paths: list[Path], tmp_path: Path) -> None:
    table = pq.read_table(paths[0])
    halves = [_write(tmp_path / "a.parquet", table[:2]), _write(tmp_path / "b.parquet", table[2:])]
    assert table["event_time"][1] == table["event_time"][2]
    with pytest.raises(ValueError, match="not after the file before it"):
        list(iter_batches(halves))


def test_rows_out_of_order_in_a_file_are_refused(paths: list[Path], tmp_path: Path) -> None:
    table = pq.read_table(paths[0])
    turned = _write(tmp_path / "turned.parquet", table.take(np.arange(len(table))[::-1]))
    with pytest.raises(ValueError, match=r"turned\.parquet is not in the order of event_time"):
        list(iter_batches([turned]))


def test_a_file_without_rows_changes_nothing(paths: list[Path], tmp_path: Path) -> None:
    empty = _write(tmp_path / "empty.parquet", pq.read_table(paths[0])[:0])
    with_empty = train_teacher([paths[0], empty])
    assert _weights(with_empty) == _weights(train_teacher(paths[:1]))
    assert with_empty.trained_through < datetime(2017, 1, 3, tzinfo=UTC)


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no rows to train on"):
        train_teacher([])


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(paths: list[Path]) -> None:
    once, again, other = (train_teacher(paths[:1], seed=seed) for seed in (0, 0, 1))
    assert _weights(again) == _weights(once)
    assert (again.normalized_entropy, again.auc) == (once.normalized_entropy, once.auc)
    assert _weights(other) != _weights(once)


def test_training_leaves_the_process_s_random_state_and_threads_alone(paths: list[Path]) -> None:
    before = torch.get_rng_state(), torch.get_num_threads()
    train_teacher(paths[:1], num_threads=before[1] + 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]


def test_progress_adds_up_to_the_rows(paths: list[Path]) -> None:
    reported: list[int] = []
    trained = train_teacher(paths[:1], on_progress=reported.append)
    assert sum(reported) == trained.num_rows == pq.read_metadata(paths[0]).num_rows


def test_a_batch_is_predicted_before_it_is_trained_on(paths: list[Path]) -> None:
    torch.manual_seed(0)
    module = Teacher()
    batch: Batch = next(iter_batches(paths))
    with torch.no_grad():
        before = module(**batch.tensors)["logit_purchase"].numpy()
    assert np.array_equal(train_batch(module, batch, build_optimizers(module)), before)
    with torch.no_grad():
        assert not np.array_equal(module(**batch.tensors)["logit_purchase"].numpy(), before)


def test_two_weeks_teach_it_more_than_the_base_rate(trained: TrainedTeacher, week_files: dict[int, WeekFile]) -> None:
    later = pq.read_table(week_files[20].path)
    assert trained.normalized_entropy < 1
    assert auc(predict_logits(trained.module, later), later[LABEL_COLUMN]) > 0.65


def test_predictions_do_not_depend_on_the_batch(trained: TrainedTeacher, rows: pa.Table) -> None:
    whole, parts = predict_logits(trained.module, rows), predict_logits(trained.module, rows, batch_rows=7)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_no_rows_give_no_predictions(trained: TrainedTeacher, rows: pa.Table) -> None:
    assert predict_logits(trained.module, rows[:0]).shape == (0,)


def test_outputs_are_a_logit_and_an_embedding_per_row_and_finite_for_any_number(trained: TrainedTeacher) -> None:
    extremes = torch.tensor([-torch.inf, torch.inf, torch.nan, -1.0, 3.4e38])
    num_categories, num_floats = (len(wanted.features) for wanted in INPUTS)
    dense = extremes[:, None].expand(5, num_floats).contiguous()
    answer = trained.module(cat=torch.zeros(5, num_categories, dtype=torch.int64), dense=dense)
    assert {name: (value.shape, value.dtype) for name, value in answer.items()} == {
        "logit_purchase": ((5,), torch.float32),
        "z": ((5, EMBEDDING_SIZE), torch.float32),
    }
    assert all(bool(value.isfinite().all()) for value in answer.values())


def test_every_feature_of_the_dataset_reaches_a_tensor() -> None:
    features = [feature["name"] for feature in DATASET_SPEC["features"]]
    assert sorted(name for wanted in INPUTS for name in wanted.features) == sorted(features)


def test_it_can_be_exported_with_golden_rows(trained: TrainedTeacher, rows: pa.Table, tmp_path: Path) -> None:
    signature = build_signature(fm="teacher", snapshot_id="weeks-1-2", golden=rows[:16])
    manifest = export_snapshot(trained.module, signature, tmp_path / "s", trained_through=trained.trained_through)
    assert manifest.trained_through == trained.trained_through
    assert set(manifest.files) == {"model.pt2", "golden.arrow"}
