"""Whether a snapshot reaches a dataset's bands on recent labelled rows: what is measured, and what is said."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fm_inference.gate import judge_gate
from schemas.dataset import DatasetSpec, grow
from schemas.evaluation import Fit, fit_of
from schemas.gates import SnapshotGates

GATES = SnapshotGates(min_rows=10, max_ne_ratio=1.02, calibration=(0.8, 1.25))
LABELS = np.array([1.0] * 5 + [0.0] * 15)


def fit(logit: float, *, spread: float = 0.0, labels: np.ndarray = LABELS) -> Fit:
    """What a model reaches that says one logit, moved by `spread` to the side of the label."""
    return fit_of(np.where(labels > 0, logit + spread, logit - spread), labels)


BASE = float(np.log(0.25 / 0.75))


def test_a_snapshot_as_good_as_the_active_one_passes_and_its_numbers_are_given() -> None:
    reasons, measured = judge_gate({"click": fit(BASE)}, {"click": fit(BASE)}, GATES, active_id="s1")

    assert reasons == []
    gate = measured["click"]
    assert gate.model_dump() == pytest.approx(
        {"rows": 20, "ne": 1.0, "active_ne": 1.0, "ne_ratio": 1.0, "calibration": 1.0, "active_calibration": 1.0,
         "note": ""}
    )  # fmt: skip


def test_a_worse_snapshot_is_refused_with_both_numbers_and_the_bound() -> None:
    reasons, measured = judge_gate({"click": fit(BASE)}, {"click": fit(BASE, spread=1.0)}, GATES, active_id="s1")

    (reason,) = reasons
    gate = measured["click"]
    assert gate.ne == pytest.approx(1.0)
    for part in ("task 'click'", "NE is 1.0000 on 20", f"{gate.active_ne:.4f}", f"{gate.ne_ratio:.4f}", "at most 1.02"):
        assert part in reason


@pytest.mark.parametrize(("logit", "said"), [(BASE + 0.5, "1."), (BASE - 0.5, "0.")])
def test_a_snapshot_that_says_too_much_or_too_little_is_refused(logit: float, said: str) -> None:
    reasons, _ = judge_gate({"click": fit(logit)}, {"click": fit(logit)}, GATES, active_id="s1")

    (reason,) = reasons
    assert f"calibration is {said}" in reason
    assert "outside [0.8, 1.25]" in reason


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (np.array([1.0, 0.0]), "2 labels are fewer than min_rows, 10"),
        (np.zeros(20), "all 20 labels are 0"),
        (np.ones(20), "all 20 labels are 1"),
    ],
)
def test_a_task_that_says_nothing_refuses_nothing_and_notes_why(labels: np.ndarray, note: str) -> None:
    reasons, measured = judge_gate(
        {"click": fit(9.0, labels=labels)}, {"click": fit(BASE, labels=labels)}, GATES, active_id="s1"
    )

    assert (reasons, measured["click"].note, measured["click"].ne) == ([], note, None)


@given(
    st.lists(st.tuples(st.floats(-30, 30), st.floats(0, 1)), min_size=1, max_size=40),
    st.integers(0, 40),
)
def test_sums_of_parts_are_the_sums_of_the_whole_and_of_a_loop(rows: list[tuple[float, float]], cut: int) -> None:
    logits, labels = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])

    whole = fit_of(logits, labels)
    parts = fit_of(logits[:cut], labels[:cut]) + fit_of(logits[cut:], labels[cut:])

    chances = [1 / (1 + np.exp(-x)) for x in logits]
    loss = -sum(y * np.log(p) + (1 - y) * np.log1p(-p) for p, y in zip(chances, labels, strict=True))
    assert (parts.rows, parts.labels) == (whole.rows, pytest.approx(whole.labels))
    assert parts.loss == pytest.approx(whole.loss) == pytest.approx(loss, rel=1e-3, abs=1e-9)
    assert parts.predictions == pytest.approx(whole.predictions) == pytest.approx(sum(chances))


@pytest.mark.parametrize(
    "gates",
    [{"slice_rows": 10, "min_rows": 11}, {"calibration": [1.2, 0.9]}, {"max_ne_ratio": 0}, {"calibration": [0, 1]},
     {"slice_rows": 10_000_000}, {"bands": 1}],
)  # fmt: skip
def test_gates_that_make_no_sense_are_refused(gates: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"snapshot_gates|greater than 0|less than or equal|extra|Extra"):
        SnapshotGates.model_validate(gates)


def test_the_gates_of_a_dataset_may_be_changed() -> None:
    plain = DatasetSpec.model_validate({"features": [{"name": "price", "type": "float"}]})
    gated = plain.model_copy(update={"snapshot_gates": GATES})

    assert grow(plain, gated) == (gated, [])
    assert grow(gated, plain) == (plain, [])
