"""Copies of an object store's snapshots: as many stay as may be needed again, and none of a process that was killed."""

import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pyarrow import fs

from das_service.folder import Folder
from das_service.registry import SnapshotRecord
from das_service.snapshot_folder import SnapshotError
from fm_inference.repository import Repository

ROOT_URI = "s3://bucket/snapshots"
LISTED = ["0", "1", "2", "3", "4"]


class Store(Folder):
    """An object store whose bytes lie in a folder of this machine, and that can be away."""

    here: Path

    def remote(self) -> tuple[fs.FileSystem, str]:
        if not self.here.exists():
            raise OSError("the store can't be reached")
        return fs.SubTreeFileSystem(str(self.here), fs.LocalFileSystem()), "bucket/snapshots"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with some snapshots."""
    store = Store(ROOT_URI)
    object.__setattr__(store, "here", tmp_path / "store")
    for name in LISTED:
        folder = store.here / "bucket" / "snapshots" / name
        folder.mkdir(parents=True)
        (folder / "model.pt2").write_text(name)
    return store


@pytest.fixture
def repository(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    repository = Repository(store, most_idle=2)
    yield repository
    repository.close()
    assert list((tmp_path / "tmp").iterdir()) == []


def record(name: str) -> SnapshotRecord:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    return SnapshotRecord(snapshot_id=name, uri=f"{ROOT_URI}/{name}", sha256="0" * 64, registered_at=moment)


def fetch(repository: Repository, name: str) -> None:
    with repository.borrowed(record(name)) as folder:
        assert (folder / "model.pt2").read_text() == name


def copies(tmp_path: Path) -> list[str]:
    """Which snapshots have a copy on this machine."""
    return sorted(path.read_text() for path in (tmp_path / "tmp").glob("*/*/model.pt2"))


def test_the_copies_used_last_stay_and_no_more_of_them(repository: Repository, tmp_path: Path) -> None:
    for name in ("0", "1", "2", "0", "3"):
        fetch(repository, name)
    assert copies(tmp_path) == ["0", "3"]


def test_snapshots_at_work_stay_whatever_else_is_used(repository: Repository, tmp_path: Path) -> None:
    fetch(repository, "0")
    repository.keep([record("0")])
    for name in ("1", "2", "3", "4"):
        fetch(repository, name)
    assert copies(tmp_path) == ["0", "3", "4"]
    repository.keep([record("4")])
    assert copies(tmp_path) == ["0", "3", "4"]
    fetch(repository, "1")
    assert copies(tmp_path) == ["1", "3", "4"]


def test_a_borrowed_copy_stays_until_it_is_given_back(repository: Repository, tmp_path: Path) -> None:
    with repository.borrowed(record("0")) as folder:
        for name in ("1", "2", "3"):
            fetch(repository, name)
        assert (folder / "model.pt2").read_text() == "0"
    assert copies(tmp_path) == ["2", "3"]


def test_a_fetch_that_fails_leaves_nothing_and_is_tried_again(
    repository: Repository, store: Store, tmp_path: Path
) -> None:
    away = store.here.rename(tmp_path / "away")
    with pytest.raises(OSError, match="can't be reached"), repository.borrowed(record("0")):
        pass
    assert [path.name for path in (tmp_path / "tmp").glob("*/*")] == [".lock"]
    away.rename(store.here)
    fetch(repository, "0")


def test_a_snapshot_that_the_store_does_not_have_is_said(repository: Repository) -> None:
    with pytest.raises(SnapshotError, match="there is nothing at s3://bucket/snapshots/none"):
        fetch(repository, "none")


def test_a_folder_that_is_missing_is_told_from_a_store_that_is_away(tmp_path: Path) -> None:
    store = tmp_path / "snapshots"
    wanted = record("s1").model_copy(update={"uri": str(store / "s1")})
    for _ in ("no store", "an empty mount point"):
        with pytest.raises(FileNotFoundError, match="is not there"), Repository(Folder(str(store))).borrowed(wanted):
            pass
        store.mkdir(exist_ok=True)
    (store / "s0").mkdir()
    with (
        pytest.raises(SnapshotError, match="there is no snapshot folder"),
        Repository(Folder(str(store))).borrowed(wanted),
    ):
        pass


def test_what_was_fetched_is_gone_when_it_is_closed(repository: Repository, tmp_path: Path) -> None:
    fetch(repository, "0")
    assert list((tmp_path / "tmp").glob("das-snapshots-*"))
    repository.close()
    assert not list((tmp_path / "tmp").iterdir())
