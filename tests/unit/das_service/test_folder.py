"""Files beside the tables: locks have a deadline."""

from pathlib import Path

import pytest

from das_service.errors import UnavailableError
from das_service.folder import locked


def test_a_lock_that_another_holds_for_too_long_is_refused_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a" / "logs.lock"
    with (
        locked(path),
        pytest.raises(UnavailableError, match=r"logs\.lock for 0\.05 s"),
        locked(path, wait_seconds=0.05),
    ):
        pass
    with locked(path, wait_seconds=0.05):
        assert path.exists()
