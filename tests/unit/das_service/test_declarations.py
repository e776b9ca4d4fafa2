"""Which snapshot is active, and where a snapshot may lie."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from das_service.declarations import activated, active_etag, snapshot_place
from das_service.errors import InvalidRowsError
from das_service.registry import FmRecord


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


def test_a_place_is_given_with_links_resolved(tmp_path: Path) -> None:
    root = tmp_path / "snapshots"
    (root / "real").mkdir(parents=True)
    (root / "link").symlink_to(root / "real")

    assert snapshot_place(str(root), f"file://{root}/link") == str((root / "real").resolve())


@pytest.mark.parametrize("uri", ["s3://bucket/snapshots/s1", "s3://bucket/snapshots/deep/s1"])
def test_places_on_an_object_store_lie_under_the_root(uri: str) -> None:
    assert snapshot_place("s3://bucket/snapshots", uri) == uri


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket/snapshots", "s3://bucket/snapshotsx/s1", "s3://other/snapshots/s1", "s3://bucket/snapshots/../s1",
     "s3://bucket/snapshots/%2e%2e/s1", "s3a://bucket/snapshots/s1", "/elsewhere/s1", "s3://bucket/snapshots/s1?x=1"],
)  # fmt: skip
def test_other_places_on_an_object_store_are_refused(uri: str) -> None:
    with pytest.raises(InvalidRowsError) as caught:
        snapshot_place("s3://bucket/snapshots", uri)
    assert caught.value.code == "bad_uri"
