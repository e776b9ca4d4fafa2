"""The ExFM experiment: what its plan covers, what a method does to a student, what the report makes of the cells."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.exfm_cells import Job
from experiments.exfm_plan import FROZEN, FULL, METHODS, MIDDLE, PEEK, QUICK, Cell, Knobs, Plan, rates, trials
from experiments.exfm_report import GUIDE, build_record, rendered, to_choice, to_page, write_report
from experiments.exfm_students import Rows, Trainer, load_rows, save_rows
from experiments.exfm_words import findings, values
from experiments.teacher import torch_settings
from tests.conftest import ROOT

RESULTS = ROOT / "experiments" / "results"


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_every_week_behind_the_first_is_scored_once_by_a_snapshot_of_weeks_before_it(plan: Plan) -> None:
    parts = {boundary: plan.part_after(boundary) for boundary in plan.boundaries()}
    assert [week for part in parts.values() for week in part] == [*plan.tune, *plan.report]
    for boundary in parts:
        if boundary >= plan.tune[-1]:
            for lag in plan.lags:
                assert plan.source(lag, boundary) in parts
                assert plan.source(lag, boundary) <= boundary


def test_the_full_plan_is_both_slices_of_the_factorial_and_the_controls() -> None:
    cells = list(FULL.cells())
    assert len(set(cells)) == len(cells)
    plain = [cell for cell in cells if cell.control is None]
    assert {(c.method, c.lag, c.teacher_size) for c in plain if c.method != "none"} == {
        (method, lag, size)
        for method in METHODS[1:]
        for lag, size in [(0, MIDDLE), (4, MIDDLE), (12, MIDDLE), (FROZEN, MIDDLE), (0, "small"), (0, "large")]
    }
    assert len(plain) == 2 * 5 * (1 + 5 * 6)
    assert {cell.control for cell in cells} == {None, "shuffled", "constant", "peek", "peek_unguarded"}


@pytest.mark.parametrize("count", [1, 8])
def test_every_method_has_as_many_settings_to_choose_from(count: int) -> None:
    assert len(set(rates(count))) == count
    assert rates(count)[0] == Knobs()
    base = Knobs(table_rate=0.2, layer_rate=3e-3)
    for method in METHODS[1:]:
        tried = trials(method, base, count)
        assert len(set(tried)) == count
        assert tried[0] == base
        assert {(knobs.table_rate, knobs.layer_rate) for knobs in tried} == {(0.2, 3e-3)}


def test_a_cell_at_other_settings_is_another_file() -> None:
    cell = Cell(method="ah", student="small", seed=0, fm=MIDDLE, lag=0, teacher_size=MIDDLE)
    names = {cell.key(Knobs()), cell.key(Knobs(beta=2.0)), replace(cell, seed=1).key(Knobs())}
    assert len(names) == 3
    assert cell.key(Knobs()) == replace(cell).key(Knobs())


@pytest.fixture(scope="module")
def rows() -> Rows:
    random = np.random.default_rng(0)
    count = 6_000
    truth = random.standard_normal(count)
    indices = random.integers(0, 50, (count, 11)).astype(np.int32)
    return Rows(
        indices=indices,
        labels=(random.random(count) < 1 / (1 + np.exp(-truth))).astype(np.float32),
        logits={MIDDLE: truth.astype(np.float32), PEEK: np.zeros(count, np.float32)},
        present={MIDDLE: np.ones(count, np.bool_), PEEK: np.zeros(count, np.bool_)},
    )


def trained(rows: Rows, method: str, *, student: str = "small", fm: str = MIDDLE, **changes: Any) -> np.ndarray:
    cell = Cell(
        method=method, student=student, seed=0, fm="" if method == "none" else fm, control=changes.pop("control", None)
    )
    with torch_settings(seed=0, num_threads=1):
        trainer = Trainer(cell, Knobs(**changes))
        trainer.add_method()
        return trainer.train(rows)


@pytest.mark.parametrize("student", ["small", "large"])
def test_a_method_changes_what_a_student_says_only_where_its_teacher_speaks(rows: Rows, student: str) -> None:
    alone = trained(rows, "none", student=student)
    for method in METHODS[1:]:
        np.testing.assert_array_equal(trained(rows, method, student=student, fm=PEEK), alone)
        assert np.abs(trained(rows, method, student=student) - alone).max() > 1e-3


def test_a_distill_head_of_no_weight_is_no_head(rows: Rows) -> None:
    np.testing.assert_array_equal(trained(rows, "ah", weight=0.0), trained(rows, "none"))


def test_controls_give_the_method_something_else(rows: Rows) -> None:
    assert not np.array_equal(trained(rows, "single", control="shuffled"), trained(rows, "single"))
    assert not np.array_equal(trained(rows, "single_sa", control="constant"), trained(rows, "single_sa"))


def test_a_start_state_goes_on_as_if_it_had_never_stopped(rows: Rows) -> None:
    first, last = rows.part(np.arange(len(rows)) < 4_096), rows.part(np.arange(len(rows)) >= 4_096)
    with torch_settings(seed=0, num_threads=1):
        whole = Trainer(Cell(method="none", student="small", seed=0), Knobs())
        whole.train(first)
        other = Trainer(Cell(method="none", student="small", seed=0), Knobs())
        other.load(whole.save())
        np.testing.assert_array_equal(other.copy(fm="").train(last), whole.train(last))


def test_rows_come_back_as_they_were_kept(rows: Rows, tmp_path: Path) -> None:
    save_rows(tmp_path / "rows", rows)
    back = load_rows(tmp_path / "rows")
    np.testing.assert_array_equal(back.indices, rows.indices)
    np.testing.assert_array_equal(back.logits[MIDDLE], rows.logits[MIDDLE])
    assert back.present.keys() == rows.present.keys()


@pytest.fixture
def record() -> dict[str, Any]:
    """Cells whose NE is 0.8 alone, lower by the seed's number of thousandths + 1 with a teacher."""
    plan = replace(QUICK, seeds=range(3))
    found = {}
    for cell in plan.cells():
        ne = 0.8 if cell.method == "none" else 0.8 - (cell.seed + 1) / 1000
        metrics = {**asdict(cell), "teacher_size": cell.teacher_size, "ne": ne, "auc": 0.7, "calibration": 1.0}
        found[Job(cell=cell, knobs=Knobs(), phase="report")] = metrics
    teachers = {fm: {"coverage": 1.0, "ne": 0.7, "auc": 0.8} for fm in ("middle", "middle_lag2", "middle_frozen", PEEK)}
    teachers[PEEK]["statuses"] = {"leaky": 3}
    served = {
        "teachers": teachers, "posted": 10, "forwards": {MIDDLE: 10}, "rows": {"tune": 1, "report": 2},
        "slices": {
            "display": {"rows": 2, **{run: {"read": [1.0, 1.5], "train": [2.0, 2.5]} for run in ("without", "with")}},
        },
    }  # fmt: skip
    return build_record(
        plan,
        found,
        {("small", "none"): {Knobs(): 0.8}, **{("small", method): {Knobs(): 0.79} for method in METHODS[1:]}},
        served,
        seconds={"total": 60.0},
        machine="here",
    )


def test_a_comparison_is_the_mean_over_paired_seeds_with_students_interval(record: dict[str, Any]) -> None:
    found = next(c for c in record["comparisons"] if (c["method"], c["lag_weeks"], c["control"]) == ("ah", 0, None))
    assert found["ne_delta"] == pytest.approx(-0.002)
    half = 4.302652729911275 * 0.001 / np.sqrt(3)  # t of two degrees of freedom, 95 %
    assert (found["low"], found["high"], found["seeds"]) == (
        pytest.approx(-0.002 - half), pytest.approx(-0.002 + half), 3,
    )  # fmt: skip


def test_the_transfer_ratio_is_the_gain_by_the_teachers_lead(record: dict[str, Any]) -> None:
    found = next(t for t in record["transfer"] if t["method"] == "ah")
    assert found["ratio"] == pytest.approx(0.002 / 0.1)


def test_the_record_has_the_shape_of_the_contract(record: dict[str, Any]) -> None:
    cell = {"method", "lag_weeks", "teacher_size", "student", "seed", "control", "ne", "auc", "calibration"}
    assert all(set(found) == cell for found in record["cells"])
    comparison = {"method", "against", "lag_weeks", "teacher_size", "student", "ne_delta", "low", "high", "seeds"}
    assert all(comparison <= set(found) for found in record["comparisons"])
    assert {"machine", "seconds"} <= set(record)


def test_the_page_is_written_from_the_record_alone(record: dict[str, Any], tmp_path: Path) -> None:
    write_report(tmp_path, record)
    kept = json.loads((tmp_path / "exfm.json").read_text())
    assert kept == record
    assert (tmp_path / "exfm.md").read_text() == to_page(kept)
    assert "-2.00 (-4.48 to +0.48)" in to_page(kept)
    assert {path.name for path in tmp_path.glob("*.png")} == {"exfm-lag.png", "exfm-transfer.png"}


def test_the_guide_has_each_method_at_each_lag(record: dict[str, Any]) -> None:
    shown = "-2.00 (-4.48 to +0.48)"
    assert "The small student:\n\n| method | 0 weeks | 2 weeks | frozen |" in to_choice(record)
    assert f"| auxiliary head | {shown} | {shown} | {shown} |" in to_choice(record)


def test_methods_are_compared_with_each_other_by_seed(record: dict[str, Any]) -> None:
    found = [c for c in record["comparisons"] if c["against"] == "single"]
    assert {c["method"] for c in found} == {"ah", "ah_scaled", "ah_sa", "single_sa"}
    assert {(c["ne_delta"], c["low"], c["high"], c["control"]) for c in found} == {(0.0, 0.0, 0.0, None)}


def test_the_kept_page_and_the_guide_say_what_the_kept_record_says() -> None:
    record = json.loads((RESULTS / "exfm.json").read_text())
    assert (RESULTS / "exfm.md").read_text() == to_page(record)
    assert rendered(GUIDE.read_text(), record) == GUIDE.read_text()


def test_the_kept_result_shows_what_supervision_is_worth_and_what_a_leak_is() -> None:
    record = json.loads((RESULTS / "exfm.json").read_text())
    against_none = [c for c in record["comparisons"] if c["against"] == "none"]
    chosen = min((one for one in record["tried"] if one["student"] == "small"), key=lambda one: one["ne"])["method"]

    def change(method: str, control: str | None) -> dict[str, Any]:
        wanted = (method, "small", 0, MIDDLE, control)
        return next(
            c for c in against_none
            if (c["method"], c["student"], c["lag_weeks"], c["teacher_size"], c["control"]) == wanted
        )  # fmt: skip

    assert chosen != "none"
    assert change(chosen, None)["high"] < 0
    assert change(chosen, "shuffled")["low"] > 0
    assert record["teachers"][PEEK]["coverage"] == 0
    for method in ("single", "ah"):
        assert change(method, PEEK)["ne_delta"] == pytest.approx(0, abs=1e-3)
        assert change(method, "peek_unguarded")["high"] < change(method, None)["low"]
    # What docs/training.md says in its own words.
    told = {student: list(findings(record, student))[:4] for student in ("small", "large")}
    assert all("auxiliary head is best" in one and "clearly ahead of all others" in one for one in told["large"])
    assert "single head is best" in told["small"][0]
    for behind_an_old_teacher in told["small"][2:]:
        best, others = behind_an_old_teacher.split(" is best")
        assert "auxiliary head, three scalings" in best
        assert "not clearly better than single head" in others
    for student in ("small", "large"):
        single, auxiliary = (values(record, student, "frozen", method, "calibration") for method in ("single", "ah"))
        assert max(single.values()) < 0.96
        assert min(auxiliary.values()) > 0.99
    leaky, honest = (values(record, "small", 0, "single", "auc", control=c) for c in ("peek_unguarded", None))
    assert min(leaky.values()) > max(honest.values()) + 0.002
    assert record["teachers"][PEEK]["statuses"] == {"leaky": 1_000}
    one = record["one_teacher"]
    assert one["posted"] == one["forwards"][MIDDLE]
    assert len(one["slices"]) == 4
    assert {c["seeds"] for c in record["comparisons"]} == {5}
    assert record["seconds"]["total"] < 90 * 60


def test_findings_are_those_of_the_cells(record: dict[str, Any]) -> None:
    """All methods are 1, 2 and 3 thousandths better than labels alone, by seed: none is better than another."""
    told = list(findings(record, "small"))
    assert told[0].startswith("With a fresh teacher: single head is best, -2.00 (-4.48 to +0.48); not clearly better")
    assert "labels alone and auxiliary head and auxiliary head, three scalings" in told[0]
    assert told[-1].startswith("The scalings of the auxiliary head: +0.00 (+0.00 to +0.00), it can't be told")
    worse = [
        {**cell, "ne": cell["ne"] + (0.05 if cell["method"] == "ah_sa" else 0.0)} for cell in record["cells"]
    ]  # fmt: skip
    told = list(findings({**record, "cells": worse}, "small"))
    assert (
        "The adapter beside the auxiliary head: +50.00 (+50.00 to +50.00), it hurts, with a fresh teacher" in told[-2]
    )
    assert "labels alone are best" in next(
        findings({**record, "cells": [{**c, "ne": 0.9 if c["method"] != "none" else 0.8} for c in worse]}, "small")
    )
