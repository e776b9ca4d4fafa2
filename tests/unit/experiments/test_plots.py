"""The plots are PNGs for any number of weeks, and refuse what does not belong together."""

from pathlib import Path

import numpy as np
import pytest

from experiments.plots import plot_students, plot_teacher

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("num_weeks", [1, 2, 27])
def test_any_number_of_weeks_gives_a_picture(num_weeks: int, tmp_path: Path) -> None:
    values = np.linspace(0.6, 0.8, num_weeks)
    path = tmp_path / "plot.png"
    plot_teacher(path, weeks=np.arange(27, 27 + num_weeks), normalized_entropy=values, auc=values, base_rate=values)
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize("num_weeks", [0, 2])
def test_arrays_that_do_not_belong_together_are_refused(num_weeks: int, tmp_path: Path) -> None:
    one = np.ones(max(num_weeks - 1, 0))
    with pytest.raises(ValueError, match="one value per week"):
        plot_teacher(tmp_path / "p.png", weeks=np.arange(num_weeks), normalized_entropy=one, auc=one, base_rate=one)


@pytest.mark.parametrize("num_weeks", [1, 27])
def test_any_number_of_weeks_of_two_students_gives_a_picture(num_weeks: int, tmp_path: Path) -> None:
    weekly = {27 + i: {"without": 0.8, "with": 0.79 + i / 1000, "shuffled": 0.9} for i in range(num_weeks)}
    path = tmp_path / "plot.png"
    plot_students(path, {"one": weekly, "other": weekly})
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize("students", [{}, {"one": {}}])
def test_no_student_and_a_student_without_weeks_are_refused(students: dict[str, dict[int, dict[str, float]]]) -> None:
    with pytest.raises(ValueError, match="at least one student and one week"):
        plot_students(Path("never.png"), students)
