"""Activating, shadowing, rolling back and retiring snapshots over HTTP, and the log of who did it."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import redis

from das_service import declarations
from das_service.audit import AUDIT_ENTRIES, Note, read_audit
from das_service.errors import DasError
from das_service.folder import Folder
from das_service.registry import Catalog, FmRecord, Registry, SnapshotRecord, fm_field, read_catalog, snapshot_field
from das_service.settings import Settings
from schemas import keys
from tests.served import NOON, Api, Stand, examples, serve

FM = "/v1/datasets/ads/fms/f"
SNAPSHOTS = ("s1", "s2", "s3")


@pytest.fixture
def life(api: Api, stand: Stand) -> Api:
    """FM f with validated snapshots s1 (active), s2 and s3."""
    for name in SNAPSHOTS:
        stand.validate(name)
    stand.registry.change(fm_field("ads", "f"), FmRecord, lambda old: old.model_copy(update={"active": "s1"}))
    return api


def activate(api: Api, name: str, **headers: str) -> Any:
    return api.http.put(f"{FM}/active", json={"snapshot_id": name}, headers=headers)


def states(api: Api) -> list[str]:
    return [snapshot["state"] for snapshot in api.http.get(f"{FM}/snapshots").json()["snapshots"]]


def told(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def generations(store: redis.Redis) -> list[int]:
    return [int(store.get(keys.generation("ads", partition, "f"))) for partition in range(2)]


# ---- retiring


def test_a_retired_snapshot_scores_no_more_and_what_it_said_stays_readable(life: Api, stand: Stand) -> None:
    life.post(examples(0, 3))
    stand.work()
    activate(life, "s2")

    answer = life.http.post(f"{FM}/snapshots/s1/retire")

    assert (answer.status_code, answer.json()["state"]) == (200, "retired")
    assert states(life) == ["retired", "active", "validated"]
    assert told(activate(life, "s1")) == (409, "retired")
    assert told(life.http.put(f"{FM}/shadow", json={"snapshot_id": "s1"})) == (409, "retired")
    assert {row["f__snapshot_id"] for row in life.lookup(["e0", "e1", "e2"])} == {"s1"}


def test_retiring_keeps_late_batches_from_being_published_and_again_changes_nothing(
    life: Api, store: redis.Redis
) -> None:
    activate(life, "s2")
    assert generations(store) == [0, 0]

    first = life.http.post(f"{FM}/snapshots/s1/retire")
    assert generations(store) == [1, 1]
    store.set(keys.generation("ads", 1, "f"), 0)  # the first was cut
    again = life.http.post(f"{FM}/snapshots/s1/retire")

    assert (first.json(), generations(store)) == (again.json(), [1, 1])


def test_what_is_at_work_is_not_retired(life: Api) -> None:
    life.http.put(f"{FM}/shadow", json={"snapshot_id": "s2"})

    assert told(life.http.post(f"{FM}/snapshots/s1/retire")) == (409, "is_active")
    assert told(life.http.post(f"{FM}/snapshots/s2/retire")) == (409, "is_shadow")
    assert told(life.http.post(f"{FM}/snapshots/s9/retire")) == (404, "unknown_snapshot")
    assert states(life) == ["active", "shadow", "validated"]


# ---- rolling back


def test_a_roll_back_is_one_call_and_withdraws_the_present_one(life: Api, store: redis.Redis) -> None:
    activate(life, "s2")

    answer = life.http.post(f"{FM}/rollback")

    assert answer.json() == {"snapshot_id": "s1", "generation": 1}
    assert answer.headers["ETag"] == life.http.get(f"{FM}/active").headers["ETag"]
    assert (generations(store), states(life)) == ([1, 1], ["active", "validated", "validated"])


def test_there_is_no_roll_back_without_a_former_one_that_may_score(life: Api) -> None:
    assert told(life.http.post(f"{FM}/rollback")) == (409, "nothing_to_roll_back_to")
    activate(life, "s2")
    life.http.post(f"{FM}/snapshots/s1/retire")

    answer = life.http.post(f"{FM}/rollback")

    assert told(answer) == (409, "nothing_to_roll_back_to")
    assert "those before it are retired (s1)" in answer.json()["detail"]


def test_a_roll_back_decided_on_another_state_is_refused(life: Api) -> None:
    before = life.http.get(f"{FM}/active").headers["ETag"]
    activate(life, "s2")
    activate(life, "s3")

    assert told(life.http.post(f"{FM}/rollback", headers={"If-Match": before})) == (412, "lost_race")
    assert life.http.get(f"{FM}/active").json()["snapshot_id"] == "s3"


# ---- two at once


def test_of_two_activations_decided_on_one_state_one_wins_and_the_other_is_told(life: Api) -> None:
    for _ in range(5):
        etag = life.http.get(f"{FM}/active").headers["ETag"]
        barrier = Barrier(2)

        def race(name: str, etag: str = etag, barrier: Barrier = barrier) -> int:
            barrier.wait(30)
            status: int = activate(life, name, **{"If-Match": etag}).status_code
            return status

        with ThreadPoolExecutor(2) as pool:
            done = {name: pool.submit(race, name) for name in ("s2", "s3")}
            found = {name: future.result(60) for name, future in done.items()}

        (winner,) = [name for name, status in found.items() if status == 200]
        assert sorted(found.values()) == [200, 412]
        assert life.http.get(f"{FM}/active").json()["snapshot_id"] == winner
        activate(life, "s1")


def test_an_activation_without_if_match_that_another_overtakes_is_told(
    life: Api, settings: Settings, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = declarations.Declarations(store, Folder(settings.tables_uri), settings.snapshots_uri)
    overtaken: list[str] = []

    def overtaken_once(client: redis.Redis) -> Catalog:
        seen = read_catalog(client)
        if not overtaken:
            overtaken.append("s3")
            assert activate(life, "s3").status_code == 200
        return seen

    monkeypatch.setattr(declarations, "read_catalog", overtaken_once)
    with pytest.raises(DasError, match="its active snapshot is 's3'") as caught:
        mine.activate("ads", "f", "s2", if_match=None, who="me")

    assert (caught.value.http_status, caught.value.code) == (412, "lost_race")
    assert read_catalog(store).fm("ads", "f").active == "s3"


def test_a_retirement_that_comes_between_wins_over_the_activation(
    life: Api, settings: Settings, store: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = declarations.Declarations(store, Folder(settings.tables_uri), settings.snapshots_uri)
    retired: list[int] = []

    def retired_once(client: redis.Redis) -> Catalog:
        seen = read_catalog(client)
        if not retired:
            retired.append(1)
            assert life.http.post(f"{FM}/snapshots/s2/retire").status_code == 200
        return seen

    monkeypatch.setattr(declarations, "read_catalog", retired_once)
    with pytest.raises(DasError, match="retired") as caught:
        mine.activate("ads", "f", "s2", if_match=None, who="me")

    assert (caught.value.http_status, caught.value.code) == (409, "retired")


# ---- the shadow


def test_a_shadow_is_set_replaced_and_ended(life: Api) -> None:
    assert life.http.get(f"{FM}/shadow").json() == {"snapshot_id": None, "share": 0.0}
    first = life.http.put(f"{FM}/shadow", json={"snapshot_id": "s2", "share": 0.25})
    assert first.json() == life.http.get(f"{FM}/shadow").json() == {"snapshot_id": "s2", "share": 0.25}
    assert states(life) == ["active", "shadow", "validated"]
    fm = life.http.get(FM).json()
    assert (fm["shadow"], fm["shadow_share"]) == ("s2", 0.25)

    second = life.http.put(
        f"{FM}/shadow", json={"snapshot_id": "s3"}, headers={"If-Match": first.headers["ETag"]}
    )  # fmt: skip
    assert second.json() == {"snapshot_id": "s3", "share": 0.1}
    ended = life.http.delete(f"{FM}/shadow", headers={"If-Match": second.headers["ETag"]})
    assert (ended.status_code, ended.json()) == (200, {"snapshot_id": None, "share": 0.0})
    assert states(life) == ["active", "validated", "validated"]


def test_a_change_of_the_shadow_decided_on_another_state_is_refused(life: Api) -> None:
    before = {"If-Match": life.http.get(f"{FM}/shadow").headers["ETag"]}
    life.http.put(f"{FM}/shadow", json={"snapshot_id": "s2"})

    assert told(life.http.put(f"{FM}/shadow", json={"snapshot_id": "s3"}, headers=before)) == (412, "lost_race")
    assert told(life.http.delete(f"{FM}/shadow", headers=before)) == (412, "lost_race")
    assert life.http.get(f"{FM}/shadow").json()["snapshot_id"] == "s2"


def test_only_a_validated_snapshot_beside_an_active_one_is_a_shadow(api: Api, life: Api, stand: Stand) -> None:
    uri = f"{api.settings.snapshots_uri}/s4"
    api.http.post(f"{FM}/snapshots", json={"snapshot_id": "s4", "uri": uri, "sha256": "a" * 64})

    assert told(life.http.put(f"{FM}/shadow", json={"snapshot_id": "s4"})) == (409, "not_validated")
    assert told(life.http.put(f"{FM}/shadow", json={"snapshot_id": "s1"})) == (409, "is_active")
    assert told(life.http.put(f"{FM}/shadow", json={"snapshot_id": "s9"})) == (404, "unknown_snapshot")
    for share in (0, 1.5, -1, "much"):
        assert told(life.http.put(f"{FM}/shadow", json={"snapshot_id": "s2", "share": share})) == (422, "invalid_body")
    stand.registry.change(fm_field("ads", "f"), FmRecord, lambda old: old.model_copy(update={"active": None}))
    assert told(life.http.put(f"{FM}/shadow", json={"snapshot_id": "s2"})) == (409, "no_active")


def test_a_shadow_that_is_activated_ends_as_a_shadow(life: Api) -> None:
    life.http.put(f"{FM}/shadow", json={"snapshot_id": "s2"})

    activate(life, "s2")

    assert states(life) == ["validated", "active", "validated"]
    assert life.http.get(f"{FM}/shadow").json()["snapshot_id"] is None


def test_the_metrics_show_shadow_and_retired(life: Api) -> None:
    life.http.put(f"{FM}/shadow", json={"snapshot_id": "s2"})
    life.http.post(f"{FM}/snapshots/s3/retire")
    life.look()

    text = life.http.get("/metrics").text

    for name, state in (("s1", "active"), ("s2", "shadow"), ("s3", "retired")):
        assert f'das_snapshot_info{{dataset="ads",fm="f",snapshot="{name}",state="{state}"}} 1.0' in text


# ---- the audit log


def test_the_audit_log_says_who_did_what_and_what_changed(api: Api) -> None:
    began = datetime.now(UTC)
    api.declare_fm()
    place = {"uri": f"{api.settings.snapshots_uri}/s1", "sha256": "a" * 64}
    api.http.post(f"{FM}/snapshots", json={"snapshot_id": "s1", **place})
    api.http.put(FM, json={"required": False})
    api.http.put(FM, json={"required": False})  # changes nothing

    entries = api.http.get(f"{FM}/audit").json()["entries"]

    assert all(began <= datetime.fromisoformat(entry.pop("at")) <= datetime.now(UTC) for entry in entries)
    declared = {"required": True, "active": None, "shadow": None, "shadow_share": 0.0, "generation": 0}
    registered = {"uri": place["uri"], "sha256": place["sha256"], "state": "validating", "reasons": []}
    assert entries == [
        {"who": "loopback", "what": "declare", "snapshot_id": None, "before": {}, "after": declared},
        {"who": "loopback", "what": "register", "snapshot_id": "s1", "before": {}, "after": registered},
        {"who": "loopback", "what": "declare", "snapshot_id": None, "before": {"required": True},
         "after": {"required": False}},
    ]  # fmt: skip
    assert told(api.http.get("/v1/datasets/ads/fms/g/audit")) == (404, "unknown_fm")


def test_every_step_of_a_snapshots_life_is_in_the_audit_log(life: Api) -> None:
    life.http.put(f"{FM}/shadow", json={"snapshot_id": "s2", "share": 0.5})
    life.http.delete(f"{FM}/shadow")
    activate(life, "s2")
    life.http.post(f"{FM}/rollback")
    life.http.post(f"{FM}/snapshots/s3/retire")
    activate(life, "s3")  # refused

    entries = life.http.get(f"{FM}/audit").json()["entries"][1:]

    assert [(e["what"], e["snapshot_id"], e["before"], e["after"]) for e in entries] == [
        ("shadow", "s2", {"shadow": None, "shadow_share": 0.0}, {"shadow": "s2", "shadow_share": 0.5}),
        ("end_shadow", "s2", {"shadow": "s2", "shadow_share": 0.5}, {"shadow": None, "shadow_share": 0.0}),
        ("activate", "s2", {"active": "s1"}, {"active": "s2"}),
        ("roll_back", "s1", {"active": "s2", "generation": 0}, {"active": "s1", "generation": 1}),
        ("retire", "s3", {"state": "validated"}, {"state": "retired"}),
    ]


def test_the_audit_log_names_the_token(life: Api, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps([{"name": "fm-team", "sha256": digest, "scopes": ["admin", "read"]}]))
    with serve(life.settings.model_copy(update={"tokens_file": path})) as api:
        api.http.headers["Authorization"] = "Bearer secret"
        activate(api, "s2")
        last = api.http.get(f"{FM}/audit").json()["entries"][-1]

    assert (last["who"], last["what"]) == ("fm-team", "activate")


def test_the_audit_log_keeps_the_last_changes_and_lies_beside_the_tables_too(
    life: Api, store: redis.Redis, settings: Settings
) -> None:
    registry = Registry(store, Folder(settings.tables_uri))
    for number in range(AUDIT_ENTRIES + 4):
        registry.change(
            fm_field("ads", "f"),
            FmRecord,
            lambda old, n=number: old.model_copy(update={"shadow_share": float(n + 1)}),
            note=lambda _: Note(dataset="ads", fm="f", who="w", what="shadow"),
        )

    entries = read_audit(store, "ads", "f")
    copied = [name for name in registry.read_copy() if name.startswith("audit/ads/f/")]

    assert [entry["after"]["shadow_share"] for entry in entries] == [float(n + 1) for n in range(4, AUDIT_ENTRIES + 4)]
    assert len(copied) == AUDIT_ENTRIES + 1


def test_a_change_that_others_overtake_leaves_one_entry(store: redis.Redis, settings: Settings) -> None:
    registry = Registry(store, Folder(settings.tables_uri))
    record = SnapshotRecord(snapshot_id="s", uri="/s", sha256="0" * 64, registered_at=NOON)
    field = snapshot_field("ads", "f", "s")
    registry.change(field, SnapshotRecord, lambda _: record)
    seen: list[str] = []

    def update(stored: SnapshotRecord) -> SnapshotRecord:
        seen.append(stored.state)
        if len(seen) == 1:
            registry.change(field, SnapshotRecord, lambda old: old.model_copy(update={"validator": "other"}))
        return stored.model_copy(update={"state": "validated"})

    registry.change(
        field, SnapshotRecord, update, note=lambda _: Note(dataset="ads", fm="f", who="w", what="validate")
    )  # fmt: skip

    assert (len(seen), [entry["after"] for entry in read_audit(store, "ads", "f")]) == (2, [{"state": "validated"}])
