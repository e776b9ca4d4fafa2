"""The plot is a PNG for any number of weeks, and refuses arrays that do not belong together."""

from pathlib import Path

import numpy as np
import pytest

from experiments.plots import plot_teacher

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
