"""What the demo says of its students, against numbers that a hand computes."""

import numpy as np
import pytest
from rich.console import Console

from experiments.demo_report import print_students, vm_record, weekly_entropy
from experiments.students import StudentRuns

HALF = np.zeros(4, np.float32)  # a probability of 1/2, all that is known where half of the labels are 1
RUNS = StudentRuns(
    event_times=np.arange(4),
    teacher_logits=HALF,
    present=np.ones(4, np.bool_),
    weeks=np.array([27, 27, 28, 28]),
    labels=np.array([0, 1, 0, 1], np.float32),
    logits={"without": HALF, "with": np.array([-40, 40, 0, 0], np.float32), "shuffled": -HALF},
)


def test_a_student_s_record_is_over_all_its_rows() -> None:
    assert vm_record("display", RUNS) == {
        "name": "display",
        "rows": 4,
        "ne_without": pytest.approx(1.0),
        "ne_with": pytest.approx(0.5),
        "ne_shuffled": pytest.approx(1.0),
        "auc_without": 0.5,
        "auc_with": pytest.approx(7 / 8),
    }


def test_each_week_has_its_own_entropy() -> None:
    weekly = weekly_entropy(RUNS)
    assert {week: values["with"] for week, values in weekly.items()} == {
        27: pytest.approx(0.0, abs=1e-9),
        28: pytest.approx(1.0),
    }


def test_the_table_says_how_much_supervision_changed() -> None:
    console = Console(width=80)
    with console.capture() as shown:
        print_students(console, [vm_record("mailer", RUNS) | {"rows": 1_339_369}])
    row = next(line for line in shown.get().splitlines() if line.strip().startswith("mailer "))
    assert row.split() == ["mailer", "1,339,369", "1.0000", "0.5000", "-50.00%", "1.0000", "0.5000", "0.8750"]
