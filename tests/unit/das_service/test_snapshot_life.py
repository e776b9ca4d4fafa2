"""What becomes of an FM's record when a snapshot is activated, shadowed, rolled back or retired."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from das_service.errors import ConflictError, DasError
from das_service.registry import FmRecord, SnapshotRecord, SnapshotState
from das_service.snapshot_life import (
    activated,
    active_etag,
    refuse_race,
    refuse_unusable,
    retired,
    rolled_back,
    shadow_etag,
    with_shadow,
    without_shadow,
)


def after(*names: str) -> FmRecord:
    """The record after these were activated in turn."""
    record = FmRecord(fm="f", required=True)
    for name in names:
        record = activated(record, name)
    return record


def stored(state: SnapshotState) -> SnapshotRecord:
    return SnapshotRecord(
        snapshot_id="a", uri="/a", sha256="0" * 64, state=state, reasons=("too small",),
        registered_at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip


@given(st.lists(st.sampled_from("abc"), max_size=12))
def test_the_generation_grows_exactly_when_a_former_snapshot_comes_back(names: list[str]) -> None:
    record = FmRecord(fm="f", required=True)
    former: set[str] = set()
    for name in names:
        after = activated(record, name)
        goes_back = name != record.active and name in former
        assert after.active == name
        assert after.generation == record.generation + goes_back
        former.add(name)
        record = after
    assert set(record.was_active) | {record.active} >= former


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_the_etag_changes_with_every_change_of_the_active_snapshot(names: list[str]) -> None:
    record = FmRecord(fm="f", required=True)
    seen = {active_etag(record)}
    for name in names:
        after = activated(record, name)
        assert (active_etag(after) in seen) == (after == record)
        seen.add(active_etag(after))
        record = after


def test_the_etag_does_not_change_with_anything_else() -> None:
    record = FmRecord(fm="f", required=True, active="a")

    assert active_etag(record) == active_etag(record.model_copy(update={"snapshots": ("a", "b"), "required": False}))


def test_retiring_a_snapshot_does_not_change_the_active_ones_etag() -> None:
    record = after("a", "b")

    assert active_etag(retired(record, "a")) == active_etag(record)


def test_rolling_back_goes_to_the_one_before_and_then_one_further() -> None:
    record = after("a", "b", "c")

    once = rolled_back(record)
    twice = rolled_back(once)

    assert (once.active, once.generation) == ("b", record.generation + 1)
    assert (twice.active, twice.generation) == ("a", record.generation + 2)


def test_rolling_back_passes_by_what_is_retired() -> None:
    assert rolled_back(retired(after("a", "b", "c"), "b")).active == "a"


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (after(), "none was active before it"),
        (after("a"), "none was active before it"),
        (rolled_back(after("a", "b")), "none was active before it"),
        (retired(after("a", "b"), "a"), "those before it are retired (a)"),
    ],
)
def test_where_no_former_one_is_left_rolling_back_is_refused_with_the_reason(record: FmRecord, why: str) -> None:
    with pytest.raises(ConflictError) as caught:
        rolled_back(record)
    assert (caught.value.code, why in caught.value.detail) == ("nothing_to_roll_back_to", True)


def test_a_shadow_that_is_activated_is_the_shadow_no_more() -> None:
    record = activated(with_shadow(after("a"), "b", 0.5), "b")

    assert (record.active, record.shadow, record.shadow_share) == ("b", None, 0.0)


def test_another_shadow_takes_the_place_of_the_first_and_the_etag_says_so() -> None:
    first = with_shadow(after("a"), "b", 0.5)
    second = with_shadow(first, "c", 0.5)
    wider = with_shadow(second, "c", 0.6)

    assert (second.shadow, without_shadow(second)) == ("c", after("a"))
    assert len({shadow_etag(record) for record in (after("a"), first, second, wider)}) == 4


def test_the_active_one_is_no_shadow_and_without_it_there_is_none() -> None:
    with pytest.raises(ConflictError, match="scores everything") as active:
        with_shadow(after("a"), "a", 0.5)
    with pytest.raises(ConflictError, match="no active snapshot") as none:
        with_shadow(after(), "a", 0.5)
    assert (active.value.code, none.value.code) == ("is_active", "no_active")


def test_a_snapshot_at_work_is_not_retired() -> None:
    record = with_shadow(after("a"), "b", 0.5)

    for snapshot_id, code in (("a", "is_active"), ("b", "is_shadow")):
        with pytest.raises(ConflictError) as caught:
            retired(record, snapshot_id)
        assert caught.value.code == code


def test_a_retired_snapshot_can_publish_no_more_and_retiring_again_changes_nothing() -> None:
    record = after("a", "b")
    once = retired(record, "a")

    assert (once.retired, once.generation) == (("a",), record.generation + 1)
    assert retired(once, "a") == once


@pytest.mark.parametrize("state", ["validating", "rejected"])
def test_a_snapshot_that_is_not_validated_may_not_score_and_the_reason_is_told(state: SnapshotState) -> None:
    with pytest.raises(ConflictError, match=f"is {state}, not validated: too small") as caught:
        refuse_unusable(after(), stored(state))
    assert caught.value.code == "not_validated"


def test_a_retired_snapshot_may_not_score() -> None:
    with pytest.raises(ConflictError) as caught:
        refuse_unusable(retired(after("b"), "a"), stored("validated"))
    assert caught.value.code == "retired"


def test_a_change_decided_on_another_state_is_refused_and_told_what_is_now() -> None:
    record = after("a", "b")

    refuse_race(record, "*", active_etag(record))
    refuse_race(record, f'"x", {active_etag(record)}', active_etag(record))
    with pytest.raises(DasError, match="its active snapshot is 'b'") as caught:
        refuse_race(record, active_etag(after("a")), active_etag(record))
    assert (caught.value.code, caught.value.http_status) == ("lost_race", 412)
