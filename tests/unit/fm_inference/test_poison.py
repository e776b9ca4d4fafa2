"""Laws of the bisection: every bad row is found, every good row is scored, whatever dies on the way."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fm_inference.poison import ENDED_THE_PROCESS, Attempt, RowsFailedError, resume_attempt, split, try_rows


class ProcessEndedError(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


@given(st.integers(0, 1000), st.integers(2, 5000))
def test_parts_cover_the_range_once(lo: int, length: int) -> None:
    parts = split(lo, lo + length)
    assert [row for a, b in parts for row in range(a, b)] == list(range(lo, lo + length))
    assert 2 <= len(parts) <= 8


@given(num_rows=st.integers(1, 200), raising=st.sets(st.integers(0, 199)), nameless=st.sets(st.integers(0, 199)))
def test_rows_that_raise_fail_and_all_others_are_scored(num_rows: int, raising: set[int], nameless: set[int]) -> None:
    raising, named = {r for r in raising if r < num_rows}, {r for r in nameless if r < num_rows} - raising
    scored: list[int] = []

    def forward(rows: np.ndarray) -> None:
        if raising & set(rows.tolist()):
            raise RuntimeError("index out of range")
        bad = tuple(place for place, row in enumerate(rows.tolist()) if row in named)
        if bad:
            raise RowsFailedError("not finite", bad)
        scored.extend(rows.tolist())

    failed = try_rows(Attempt(todo=[(0, num_rows)]), np.arange(num_rows), note=lambda _: None, forward=forward)
    assert set(failed) == raising | named
    assert sorted(scored) == sorted(set(range(num_rows)) - raising - named)


@given(num_rows=st.integers(1, 300), killers=st.sets(st.integers(0, 299), max_size=4))
def test_rows_that_kill_are_found_through_the_deaths_of_processes(num_rows: int, killers: set[int]) -> None:
    killers = {row for row in killers if row < num_rows}
    kept: list[str] = []

    def forward(rows: np.ndarray) -> None:
        if killers & set(rows.tolist()):
            raise ProcessEndedError

    failed: dict[int, str] = {}
    for deaths in range(40):  # noqa: B007 - asked about below
        attempt = resume_attempt(kept[-1].encode() if kept else None, num_rows)
        try:
            failed = try_rows(attempt, np.arange(num_rows), note=lambda a: kept.append(a.to_json()), forward=forward)
        except ProcessEndedError:
            continue
        break
    else:
        pytest.fail("forty processes died")
    assert failed == dict.fromkeys(sorted(killers), ENDED_THE_PROCESS)
    assert deaths <= 5 * len(killers)


@given(num_rows=st.integers(2, 300), at_once=st.integers(0, 299), later=st.sets(st.integers(0, 299), max_size=3))
def test_rows_that_another_process_found_good_are_tried_again_and_noted(
    num_rows: int, at_once: int, later: set[int]
) -> None:
    """Rows of `later` kill every process but the first."""
    at_once, later = at_once % num_rows, {row for row in later if row < num_rows}
    kept: list[str] = []
    deaths, tried = 0, set[int]()

    def forward(rows: np.ndarray) -> None:
        lo, hi = json.loads(kept[-1])["trying"]
        assert set(rows.tolist()) <= set(range(lo, hi))
        if ({at_once} | (later if deaths else set())) & set(rows.tolist()):
            raise ProcessEndedError
        tried.update(rows.tolist())

    failed: dict[int, str] = {}
    while True:
        attempt = resume_attempt(kept[-1].encode() if kept else None, num_rows)
        tried.clear()
        try:
            failed = try_rows(attempt, np.arange(num_rows), note=lambda a: kept.append(a.to_json()), forward=forward)
        except ProcessEndedError:
            deaths += 1
            assert deaths < 60
            continue
        break
    assert set(failed) == later | {at_once}
    assert tried == set(range(num_rows)) - set(failed)


def test_one_death_over_a_single_row_is_not_yet_held_against_it() -> None:
    died_once = resume_attempt(b'{"todo": [], "trying": [0, 1], "killers": [], "accused": []}', 1)
    assert (died_once.todo, died_once.killers) == ([(0, 1)], [])
    died_again = resume_attempt(b'{"todo": [], "trying": [0, 1], "killers": [], "accused": [0]}', 1)
    assert (died_again.todo, died_again.killers) == ([], [0])
