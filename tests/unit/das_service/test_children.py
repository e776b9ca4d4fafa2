"""When a child starts again, and what its log keeps."""

from pathlib import Path

import pytest

from das_service.up.children import Ended, Restarts, cap_log, read_tail, rotate_log


def pauses(*ends: tuple[int, float]) -> list[float]:
    restarts = Restarts()
    return [restarts.pause_after(code, lived_seconds=lived) for code, lived in ends]


def test_pauses_double_up_to_five_seconds() -> None:
    assert pauses(*[(1, 0.1)] * 7) == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_a_child_that_lived_for_long_starts_again_at_once() -> None:
    assert pauses((1, 0.1), (1, 0.1), (-9, 31.0), (1, 0.1)) == [0.2, 0.4, 0.2, 0.4]


@pytest.mark.parametrize(
    ("ends", "hopeless"),
    [
        ([(2, 0.5)] * 5, True),
        ([(2, 0.5)] * 4, False),
        ([(2, 0.5)] * 4 + [(1, 0.5)], False),
        ([(2, 0.5)] * 4 + [(2, 60.0)], False),
        ([(1, 0.5)] * 9, False),
        ([(2, 0.5)] * 4 + [(-9, 0.5)] + [(2, 0.5)] * 5, True),
    ],
)
def test_a_child_is_hopeless_after_five_quick_configuration_errors(
    ends: list[tuple[int, float]], hopeless: bool
) -> None:
    restarts = Restarts()
    for code, lived in ends:
        restarts.pause_after(code, lived_seconds=lived)
    assert restarts.is_hopeless is hopeless


@pytest.mark.parametrize(
    ("code", "reason"),
    [(1, "ended with exit code 1"), (-9, "was ended by SIGKILL"), (-99, "was ended by signal 99")],
)
def test_ends_are_said_in_words(code: int, reason: str) -> None:
    assert Ended(role="api", code=code, lived_seconds=1, pause_seconds=1).reason == reason


def test_a_new_run_keeps_the_log_of_the_former_one(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    rotate_log(log)
    for text in ("first", "second"):
        log.write_text(text)
        rotate_log(log)
    assert (tmp_path / "api.log.1").read_text() == "second"
    assert not log.exists()


def test_a_log_is_capped_under_the_hands_of_its_writer(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    with log.open("ab") as writer:
        writer.write(b"x" * 100)
        writer.flush()
        cap_log(log, max_bytes=100)
        assert log.stat().st_size == 100
        writer.write(b"y")
        writer.flush()
        cap_log(log, max_bytes=100)
        writer.write(b"z")
        writer.flush()
    assert log.read_bytes() == b"z"
    assert (tmp_path / "api.log.1").read_bytes() == b"x" * 100 + b"y"


def test_the_tail_of_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "none.log") == ""
