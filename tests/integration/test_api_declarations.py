"""Declaring datasets, FMs and snapshots, and choosing which snapshot scores."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import redis

from das_service.folder import Folder
from das_service.logs import streams
from das_service.registry import Registry, SnapshotRecord, read_catalog
from das_service.settings import Settings
from schemas import keys
from schemas.dataset import DatasetSpec
from tests.served import OUTPUTS, SPEC, Api, Stand, examples

FM = "/v1/datasets/ads/fms/f"


def manifest(outputs: dict[str, Any] | None = None) -> bytes:
    """A snapshot.json with one logit and one embedding, as OUTPUTS says, or with other outputs."""
    logits = {"logits": {"click": "logit"}, "embeddings": {"hidden": {"tensor": "z", "size": 2, "codec": "float16"}}}
    return json.dumps(
        {
            "format": 1, "snapshot_id": "s2", "fm": "f", "created_at": "2026-01-01T00:00:00Z",
            "trained_through": "2026-01-01T00:00:00Z", "max_batch": 10,
            "inputs": [{"tensor": "dense", "features": ["price"], "encode": {"kind": "float"}}],
            "outputs": outputs or logits, "files": {"model.pt2": f"sha256:{'0' * 64}"},
        }
    ).encode()  # fmt: skip


def publish(settings: Settings, name: str, content: bytes) -> tuple[str, str]:
    """Write a snapshot folder and give its uri and sha256."""
    folder = Path(settings.snapshots_uri) / name
    folder.mkdir(parents=True)
    (folder / "snapshot.json").write_bytes(content)
    return str(folder), sha256(content).hexdigest()


def test_a_dataset_is_created_once_and_read_back_as_declared(api: Api) -> None:
    created = api.http.put("/v1/datasets/new", json=SPEC)
    again = api.http.put("/v1/datasets/new", json=SPEC)

    assert (created.status_code, again.status_code) == (201, 200)
    read = api.http.get("/v1/datasets/new").json()
    assert DatasetSpec.model_validate(read) == DatasetSpec.model_validate(SPEC)
    assert api.http.put("/v1/datasets/new", json=read).status_code == 200
    assert [item["dataset"] for item in api.http.get("/v1/datasets").json()["datasets"]] == ["ads", "new"]


def test_a_nullable_feature_may_be_added_and_no_other_change_made(api: Api) -> None:
    grown = {**SPEC, "features": [*SPEC["features"], {"name": "hour", "type": "float", "nullable": True}]}
    assert api.http.put("/v1/datasets/ads", json=grown).status_code == 200

    other = {
        **grown,
        "partitions": 3,
        "features": [
            {"name": "price", "type": "vector", "size": 2},
            SPEC["features"][2],
            {"name": "zip", "type": "float"},
        ],
        "entity_key": [],
    }
    answer = api.http.put("/v1/datasets/ads", json=other)

    assert (answer.status_code, answer.json()["code"]) == (409, "dataset_conflict")
    fields = {item["field"] for item in answer.json()["differences"]}
    assert {"partitions", "entity_key", "features.price", "features.hour", "features.user_id", "features.zip"} <= fields
    assert len(api.http.get("/v1/datasets/ads").json()["features"]) == 6


SPEC_FAULTS: dict[str, dict[str, Any]] = {
    "no features": {"features": []},
    "unknown key": {"colour": "red"},
    "reserved name": {"features": [{"name": "example_id", "type": "float"}]},
    "bad name": {"features": [{"name": "Price", "type": "float"}]},
    "vector without size": {"features": [{"name": "a", "type": "vector"}]},
    "unknown entity key": {"entity_key": ["nobody"]},
    "partitions as text": {"partitions": "4"},
    "negative limit": {"max_future_seconds": -1},
}


@pytest.mark.parametrize("changes", SPEC_FAULTS.values(), ids=SPEC_FAULTS)
def test_a_declaration_that_makes_no_sense_is_refused(api: Api, changes: dict[str, Any]) -> None:
    answer = api.http.put("/v1/datasets/new", json={**SPEC, "entity_key": [], **changes})

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_body")
    assert answer.json()["errors"]
    assert api.http.get("/v1/datasets/new").status_code == 404


def test_a_declaration_that_was_cut_after_its_record_is_mended_by_a_repeat(
    api: Api, store: redis.Redis, settings: Settings
) -> None:
    registry = Registry(store, Folder(settings.tables_uri))
    registry.change("dataset/half", DatasetSpec, lambda _: DatasetSpec.model_validate(SPEC))
    assert api.post(examples(0, 1), dataset="half").status_code == 503

    assert api.http.put("/v1/datasets/half", json=SPEC).status_code == 200

    assert api.post(examples(0, 1), dataset="half").status_code == 202


def test_an_fm_is_declared_with_logs_and_groups_at_the_present_end(api: Api, store: redis.Redis) -> None:
    api.post(examples(0, 50))

    answer = api.http.put(FM, json={"required": True})

    assert answer.status_code == 201
    assert answer.json() == {
        "fm": "f", "required": True, "outputs": None, "active": None, "was_active": [], "shadow": None,
        "shadow_share": 0.0, "trained_through": None, "snapshots": [],
    }  # fmt: skip
    groups = streams.read_groups(store, "ads", range(2), "examples")
    assert [groups[p][keys.group("f")].last_delivered.seq for p in range(2)] == [0, 0]
    assert store.get(keys.generation("ads", 0, "f")) == b"0"
    assert api.http.put(FM, json={"required": False}).status_code == 200
    assert [fm["required"] for fm in api.http.get("/v1/datasets/ads/fms").json()["fms"]] == [False]


def test_an_fm_of_an_unknown_dataset_is_404(api: Api) -> None:
    assert api.http.put("/v1/datasets/other/fms/f", json={}).json()["code"] == "unknown_dataset"
    assert api.http.get("/v1/datasets/ads/fms/f").json()["code"] == "unknown_fm"
    assert api.http.get("/v1/datasets/other/fms").json()["code"] == "unknown_dataset"
    assert api.http.get("/v1/datasets/ads/fms/f/active").status_code == 404


def test_a_snapshot_is_registered_and_validating(api: Api) -> None:
    api.declare_fm()
    uri, digest = publish(api.settings, "s2", manifest())

    answer = api.http.post(f"{FM}/snapshots", json={"snapshot_id": "s2", "uri": uri, "sha256": f"sha256:{digest}"})

    assert answer.status_code == 202
    read = api.http.get(f"{FM}/snapshots/s2").json()
    assert (read["state"], read["sha256"], read["uri"], read["reasons"]) == ("validating", digest, uri, [])
    assert api.http.get(f"{FM}/snapshots").json()["snapshots"] == [read]
    assert api.http.get(FM).json()["snapshots"] == ["s2"]
    assert api.http.get(f"{FM}/snapshots/s3").json()["code"] == "unknown_snapshot"


def test_a_snapshot_registered_again_is_the_same_and_with_other_bytes_a_conflict(api: Api) -> None:
    api.declare_fm()
    body = {"snapshot_id": "s2", "uri": f"{api.settings.snapshots_uri}/s2", "sha256": "a" * 64}
    first, again = (api.http.post(f"{FM}/snapshots", json=body) for _ in range(2))
    other = api.http.post(f"{FM}/snapshots", json={**body, "sha256": "b" * 64})

    assert first.json() == again.json()
    assert (other.status_code, other.json()["code"]) == (409, "snapshot_conflict")


def test_a_rejected_snapshot_that_is_registered_again_is_validated_again(api: Api, store: redis.Redis) -> None:
    api.declare_fm()
    body = {"snapshot_id": "s2", "uri": f"{api.settings.snapshots_uri}/s2", "sha256": "a" * 64}
    api.http.post(f"{FM}/snapshots", json=body)
    Registry(store, Folder(api.settings.tables_uri)).change(
        "snapshot/ads/f/s2",
        SnapshotRecord,
        lambda old: old.model_copy(update={"state": "rejected", "reasons": ("no file",)}),
    )
    assert api.http.get(f"{FM}/snapshots/s2").json()["reasons"] == ["no file"]

    assert api.http.post(f"{FM}/snapshots", json=body).json()["state"] == "validating"


@pytest.mark.parametrize(
    "uri", ["/etc", "{root}", "{root}/../elsewhere", "{root}x/s2", "s3://bucket/s2", "http://x/y", "{root}/link"]
)
def test_a_snapshot_outside_the_snapshots_folder_is_refused(api: Api, uri: str) -> None:
    api.declare_fm()
    root = Path(api.settings.snapshots_uri)
    root.mkdir(parents=True)
    (root / "link").symlink_to("/etc")

    answer = api.http.post(
        f"{FM}/snapshots", json={"snapshot_id": "s2", "uri": uri.format(root=root), "sha256": "a" * 64}
    )

    assert (answer.status_code, answer.json()["code"]) == (422, "bad_uri")
    assert api.http.get(FM).json()["snapshots"] == []


def test_a_snapshot_with_other_outputs_than_the_fms_is_refused(api: Api, stand: Stand) -> None:
    stand.validate("s1")
    same = publish(api.settings, "same", manifest())
    other = publish(api.settings, "other", manifest({"logits": {"click": "logit", "buy": "b"}}))

    def register(name: str, place: tuple[str, str]) -> Any:
        return api.http.post(f"{FM}/snapshots", json={"snapshot_id": name, "uri": place[0], "sha256": place[1]})

    assert register("same", same).status_code == 202
    refused = register("other", other)
    assert (refused.status_code, refused.json()["code"]) == (409, "outputs_fixed")
    assert register("unreadable", (other[0], "c" * 64)).status_code == 202


def test_only_a_validated_snapshot_can_become_active(api: Api) -> None:
    api.declare_fm()
    body = {"snapshot_id": "s2", "uri": f"{api.settings.snapshots_uri}/s2", "sha256": "a" * 64}
    api.http.post(f"{FM}/snapshots", json=body)

    answer = api.http.put(f"{FM}/active", json={"snapshot_id": "s2"})

    assert (answer.status_code, answer.json()["code"]) == (409, "not_validated")
    assert api.http.put(f"{FM}/active", json={"snapshot_id": "s9"}).status_code == 404
    assert api.http.get(f"{FM}/active").json() == {"snapshot_id": None, "generation": 0}


@pytest.fixture
def two_snapshots(api: Api, stand: Stand) -> Api:
    """FM f with validated snapshots s1 and s2, s1 active."""
    for name in ("s2", "s1"):
        stand.validate(name)
    assert api.http.get(f"{FM}/active").json()["snapshot_id"] == "s1"
    return api


def generations(store: redis.Redis) -> list[int]:
    return [int(store.get(keys.generation("ads", partition, "f"))) for partition in range(2)]


def test_activating_leaves_the_generation_and_rolling_back_raises_it(two_snapshots: Api, store: redis.Redis) -> None:
    forward = two_snapshots.http.put(f"{FM}/active", json={"snapshot_id": "s2"})
    assert forward.json() == {"snapshot_id": "s2", "generation": 0}
    assert generations(store) == [0, 0]
    assert two_snapshots.http.get(f"{FM}/snapshots/s2").json()["state"] == "active"

    back = two_snapshots.http.put(f"{FM}/active", json={"snapshot_id": "s1"})

    assert back.json() == {"snapshot_id": "s1", "generation": 1}
    assert generations(store) == [1, 1]


def test_a_roll_back_that_was_cut_is_mended_by_a_repeat(two_snapshots: Api, store: redis.Redis) -> None:
    for name in ("s2", "s1"):
        two_snapshots.http.put(f"{FM}/active", json={"snapshot_id": name})
    store.set(keys.generation("ads", 1, "f"), 0)

    two_snapshots.http.put(f"{FM}/active", json={"snapshot_id": "s1"})

    assert generations(store) == [1, 1]


def test_a_withdrawn_snapshot_can_not_publish_what_it_holds(
    two_snapshots: Api, stand: Stand, store: redis.Redis
) -> None:
    two_snapshots.http.put(f"{FM}/active", json={"snapshot_id": "s2"})
    two_snapshots.post(examples(0, 50))
    held = read_catalog(store).fm("ads", "f")
    two_snapshots.http.put(f"{FM}/active", json={"snapshot_id": "s1"})

    assert held.generation == 0
    assert generations(store) == [1, 1]
    assert stand.work() == 50  # with the generation that the registry has now


def test_the_loser_of_a_race_gets_412(two_snapshots: Api) -> None:
    etag = two_snapshots.http.get(f"{FM}/active").headers["ETag"]

    first = two_snapshots.http.put(f"{FM}/active", json={"snapshot_id": "s2"}, headers={"If-Match": etag})
    second = two_snapshots.http.put(f"{FM}/active", json={"snapshot_id": "s1"}, headers={"If-Match": etag})

    assert (first.status_code, second.status_code) == (200, 412)
    assert second.json()["code"] == "lost_race"
    assert first.headers["ETag"] == two_snapshots.http.get(f"{FM}/active").headers["ETag"]
    assert two_snapshots.http.get(f"{FM}/active").json()["snapshot_id"] == "s2"


def test_of_many_at_once_exactly_one_wins(two_snapshots: Api) -> None:
    etag = two_snapshots.http.get(f"{FM}/active").headers["ETag"]
    barrier = threading.Barrier(8)

    def change(_: int) -> int:
        barrier.wait()
        answer = two_snapshots.http.put(f"{FM}/active", json={"snapshot_id": "s2"}, headers={"If-Match": etag})
        return int(answer.status_code)

    with ThreadPoolExecutor(8) as pool:
        codes = sorted(pool.map(change, range(8)))
    assert codes == [200] + [412] * 7


def test_registering_a_snapshot_does_not_spoil_an_activation(two_snapshots: Api) -> None:
    etag = two_snapshots.http.get(f"{FM}/active").headers["ETag"]
    body = {"snapshot_id": "s3", "uri": f"{two_snapshots.settings.snapshots_uri}/s3", "sha256": "a" * 64}
    two_snapshots.http.post(f"{FM}/snapshots", json=body)

    answer = two_snapshots.http.put(f"{FM}/active", json={"snapshot_id": "s2"}, headers={"If-Match": etag})

    assert answer.status_code == 200


def test_snapshots_keep_the_numbers_that_online_values_name(two_snapshots: Api, store: redis.Redis) -> None:
    before = read_catalog(store).fm("ads", "f").snapshots
    body = {"snapshot_id": "s0", "uri": f"{two_snapshots.settings.snapshots_uri}/s0", "sha256": "a" * 64}
    two_snapshots.http.post(f"{FM}/snapshots", json=body)

    assert read_catalog(store).fm("ads", "f").snapshots == (*before, "s0")


def test_the_status_says_how_far_every_fm_is(api: Api, stand: Stand) -> None:
    stand.validate()
    api.post(examples(0, 30))

    fm = api.http.get("/v1/datasets/ads/status").json()["fms"]["f"]
    assert (fm["pending"], fm["scored"], fm["active"], fm["backlog_entries"]) == (30, 0, "s1", 2)
    assert fm["backlog_bytes"] > 0
    assert fm["oldest_age_seconds"] >= 0

    stand.work()

    fm = api.http.get("/v1/datasets/ads/status").json()["fms"]["f"]
    assert (fm["pending"], fm["backlog_entries"], fm["backlog_bytes"]) == (30, 0, 0)  # not in the table yet


def test_dead_letters_are_listed_before_the_sink_has_them(api: Api, stand: Stand) -> None:
    stand.validate()
    api.post(examples(0, 3))
    stand.work(fail=True)

    letters = api.http.get("/v1/datasets/ads/dead-letters", params={"fm": "f"}).json()["dead_letters"]

    assert sorted(letter["example_id"] for letter in letters) == ["e0", "e1", "e2"]
    assert {(letter["snapshot_id"], letter["reason"]) for letter in letters} == {("s1", "poison")}
    few = api.http.get("/v1/datasets/ads/dead-letters", params={"fm": "f", "limit": 1}).json()["dead_letters"]
    assert len(few) == 1
    assert api.http.get("/v1/datasets/ads/dead-letters", params={"fm": "nobody"}).status_code == 404


def test_once_there_are_enough_dead_letters_no_further_log_is_read(api: Api, stand: Stand, store: redis.Redis) -> None:
    stand.validate()
    api.post(examples(0, 50))
    stand.work(fail=True)
    api.http.app_state["service"].monitor.stop()  # it reads logs too
    store.config_resetstat()

    few = api.http.get("/v1/datasets/ads/dead-letters", params={"fm": "f", "limit": 3}).json()["dead_letters"]

    assert len(few) == 3
    assert store.info("commandstats")["cmdstat_xrange"]["calls"] == 1


def test_replaying_no_dead_letters_is_no_error(api: Api, stand: Stand) -> None:
    stand.validate()

    answer = api.http.post("/v1/datasets/ads/dead-letters/replay", json={"fm": "f"})

    assert (answer.status_code, answer.json()) == (200, {"replayed": 0})


def test_fixed_outputs_are_shown(api: Api, stand: Stand) -> None:
    stand.validate(trained_through=datetime(2026, 1, 1, tzinfo=UTC))

    fm = api.http.get(FM).json()

    assert fm["outputs"] == OUTPUTS.model_dump(mode="json")
    assert fm["trained_through"] == "2026-01-01T00:00:00Z"
