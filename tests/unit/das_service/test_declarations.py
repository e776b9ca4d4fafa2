"""Where a snapshot may lie."""

from pathlib import Path

import pytest

from das_service.declarations import snapshot_place
from das_service.errors import InvalidRowsError


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
