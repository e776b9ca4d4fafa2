"""Publishing: the copy is whole or not there, steps may be repeated, a snapshot never changes."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from pyarrow import fs

from das_service.client import Client, SnapshotRejectedError
from das_service.client.http import Clock
from das_service.folder import Folder
from das_service.settings import Settings, load_settings
from das_service.snapshot_folder import SnapshotError, check_files, manifest_sha256, read_manifest
from das_service.snapshot_publish import publish_snapshot

_FM = "/v1/datasets/ads/fms/teacher"


@dataclass
class Api:
    """A service that validates at once."""

    is_declared: bool = False
    state: str = "validated"
    calls: list[tuple[str, str, Any]] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.read() or b"null")
        path = request.url.path.removeprefix(_FM)
        self.calls.append((request.method, path, body))
        if (request.method, path) == ("GET", "") and not self.is_declared:
            return httpx.Response(404, json={"code": "unknown_fm", "detail": "there is no FM 'teacher'"})
        if (request.method, path) == ("PUT", "/active"):
            self.state = "active"
        return httpx.Response(
            200, json={"snapshot_id": "s1", "state": self.state, "reasons": ["bad"]}, headers={"ETag": '"1"'}
        )

    def changes(self) -> list[tuple[str, str]]:
        return [(method, path) for method, path, _ in self.calls if method != "GET"]


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({}, snapshots_uri=str(tmp_path / "snapshots"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_snapshot(tmp_path / "exported")


def write_snapshot(folder: Path, *, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "model.pt2").write_bytes(weights)
    manifest = {
        "format": 1, "snapshot_id": "s1", "fm": "teacher", "created_at": "2026-01-01T00:00:00Z",
        "trained_through": "2026-01-01T00:00:00Z", "max_batch": 8,
        "inputs": [{"tensor": "dense", "features": ["price"], "encode": {"kind": "float"}}],
        "outputs": {"logits": {"click": "logit"}},
        "files": {"model.pt2": f"sha256:{hashlib.sha256(weights).hexdigest()}"},
    }  # fmt: skip
    (folder / "snapshot.json").write_text(json.dumps(manifest))
    return folder


def publish(api: Api, settings: Settings, folder: Path, **options: Any) -> dict[str, Any]:
    clock = Clock(sleep=lambda _: None)
    with Client("http://das", transport=httpx.MockTransport(api), clock=clock) as client:
        return publish_snapshot(client, settings, "ads", folder, **options)


def test_a_snapshot_is_copied_whole_and_registered_by_its_manifest(
    api: Api, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    assert publish(api, settings, folder)["state"] == "validated"
    place = tmp_path / "snapshots" / "ads" / "teacher" / "s1"
    check_files(place, read_manifest(place, sha256=manifest_sha256(folder)))
    registered = {"snapshot_id": "s1", "uri": str(place), "sha256": manifest_sha256(folder)}
    assert ("POST", "/snapshots", registered) in api.calls
    assert [entry.name for entry in place.parent.iterdir()] == ["s1"]


def test_an_fm_that_is_new_is_declared_first(api: Api, settings: Settings, folder: Path) -> None:
    steps: list[str] = []
    publish(api, settings, folder, on_step=steps.append)
    assert api.changes() == [("PUT", ""), ("POST", "/snapshots")]
    assert "FM teacher is new and is declared, required" in steps[0]


def test_an_fm_that_is_declared_stays_as_it_is(settings: Settings, folder: Path) -> None:
    api = Api(is_declared=True)
    publish(api, settings, folder, activate=True)
    assert api.changes() == [("POST", "/snapshots"), ("PUT", "/active")]


def test_publishing_again_copies_nothing(api: Api, settings: Settings, folder: Path, tmp_path: Path) -> None:
    publish(api, settings, folder)
    place = tmp_path / "snapshots" / "ads" / "teacher" / "s1"
    before = {entry.name: entry.stat().st_ino for entry in place.iterdir()}
    publish(api, settings, folder)
    assert {entry.name: entry.stat().st_ino for entry in place.iterdir()} == before


def test_a_snapshot_may_lie_at_its_place_already(api: Api, settings: Settings, tmp_path: Path) -> None:
    place = tmp_path / "snapshots" / "ads" / "teacher" / "s1"
    place.parent.mkdir(parents=True)
    write_snapshot(place)
    assert publish(api, settings, place)["state"] == "validated"


def test_another_snapshot_under_the_same_id_is_refused(
    api: Api, settings: Settings, folder: Path, tmp_path: Path
) -> None:
    publish(api, settings, folder)
    other = write_snapshot(tmp_path / "other", weights=b"other weights")
    with pytest.raises(SnapshotError, match=r"another snapshot 's1' of FM 'teacher' lies at .*: give this a new id"):
        publish(api, settings, other)


@pytest.mark.parametrize("damage", ["changed", "missing", "unnamed"])
def test_a_damaged_folder_is_refused_before_anything_is_sent(
    api: Api, settings: Settings, folder: Path, tmp_path: Path, damage: str
) -> None:
    if damage == "missing":
        (folder / "model.pt2").unlink()
    else:
        (folder / ("model.pt2" if damage == "changed" else "notes.txt")).write_bytes(b"?")
    with pytest.raises(SnapshotError):
        publish(api, settings, folder)
    assert (api.calls, (tmp_path / "snapshots").exists()) == ([], False)


def test_a_copy_that_breaks_off_leaves_nothing(
    api: Api, settings: Settings, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("das_service.snapshot_publish.shutil.copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        publish(api, settings, folder)
    assert list((tmp_path / "snapshots" / "ads" / "teacher").iterdir()) == []
    assert ("POST", "/snapshots") not in api.changes()


def test_the_copy_is_on_disk_before_it_has_its_name(
    api: Api, settings: Settings, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "snapshots" / "ads" / "teacher" / "s1"
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        "das_service.snapshot_publish.fsync_path", lambda path: synced.append((path.name, place.exists()))
    )
    publish(api, settings, folder)
    assert [name for name, is_named in synced if not is_named][:2] == ["model.pt2", "snapshot.json"]
    assert synced[-1] == ("teacher", True)


def test_an_object_store_gets_the_manifest_last(
    api: Api, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, written = tmp_path / "bucket", []
    (bucket / "models" / "ads" / "teacher" / "s1").mkdir(parents=True)

    class Store:
        """A local folder that notes the order of what is written."""

        def __init__(self) -> None:
            self.local = fs.LocalFileSystem()

        def open_output_stream(self, path: str) -> Any:
            written.append(Path(path).name)
            return self.local.open_output_stream(path)

        def open_input_stream(self, path: str) -> Any:
            return self.local.open_input_stream(path)

    monkeypatch.setattr(Folder, "remote", lambda _: (Store(), str(bucket / "models")))
    settings = load_settings({}, snapshots_uri="s3://bucket/models")
    for _ in range(2):
        publish(api, settings, folder)
    assert written == ["model.pt2", "snapshot.json"]
    assert api.calls[-2][2] == {
        "snapshot_id": "s1", "uri": "s3://bucket/models/ads/teacher/s1", "sha256": manifest_sha256(folder),
    }  # fmt: skip
    check_files(bucket / "models" / "ads" / "teacher" / "s1", read_manifest(folder))


def test_a_rejected_snapshot_raises_with_its_reasons(settings: Settings, folder: Path) -> None:
    api = Api(state="rejected")
    with pytest.raises(SnapshotRejectedError, match="bad"):
        publish(api, settings, folder, activate=True)
    assert ("PUT", "/active") not in api.changes()
