"""A few weeks of the public data, built once: week 1 is a single day, week 20 has many coupons."""

from pathlib import Path

import pytest

from experiments.data.complete_journey import WeekFile, build_impressions


@pytest.fixture(scope="session")
def week_files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, WeekFile]:
    """Weeks 1, 2 and 20, read-only."""
    files = build_impressions(tmp_path_factory.mktemp("weeks"), weeks=(1, 2, 20), num_threads=2)
    return {file.week: file for file in files}


@pytest.fixture(scope="session")
def paths(week_files: dict[int, WeekFile]) -> list[Path]:
    """The files of weeks 1 and 2, in order."""
    return [week_files[week].path for week in (1, 2)]
