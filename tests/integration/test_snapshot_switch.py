"""Snapshots are switched while examples stream in: none is lost, none is scored twice, and the pause is measured."""

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from das_service.settings import Settings
from das_service.snapshot_folder import manifest_sha256
from loadtest.switch import longest_gap_seconds
from schemas.dataset import DatasetSpec
from tests.conftest import Server, make_settings
from tests.fakes import export_closed_form
from tests.roles import Roles, wait_for
from tests.served import NOON, SPEC, Api, examples_table, serve

FM = "/v1/datasets/ads/fms/f"
CHUNK, CHUNKS = 200, 150


@pytest.fixture
def settings(own_server: Server, tmp_path: Path) -> Settings:
    return make_settings(own_server, tmp_path)


@pytest.fixture
def api(settings: Settings, tmp_path: Path) -> Iterator[Api]:
    """The API with a worker and a sink, and FM f with snapshots s1 (active) and s2."""
    with contextlib.closing(Roles(settings, tmp_path)) as roles, serve(settings) as api:
        api.declare()
        api.declare_fm()
        roles.start("worker")
        roles.start("sink")
        for number, name in enumerate(("s1", "s2")):
            folder = Path(settings.snapshots_uri) / "ads" / "f" / name
            folder.parent.mkdir(parents=True, exist_ok=True)
            export_closed_form(
                folder, DatasetSpec.model_validate(SPEC), fm="f", snapshot_id=name, shift=float(number),
                trained_through=NOON.replace(month=1),
            )  # fmt: skip
            body = {"snapshot_id": name, "uri": str(folder), "sha256": manifest_sha256(folder)}
            assert api.http.post(f"{FM}/snapshots", json=body).status_code == 202
        wait_for(lambda: states(api) == ["validated"] * 2)
        assert activate(api, "s1") == 200
        yield api


def states(api: Api) -> list[str]:
    return [snapshot["state"] for snapshot in api.http.get(f"{FM}/snapshots").json()["snapshots"]]


def activate(api: Api, name: str) -> int:
    status: int = api.http.put(f"{FM}/active", json={"snapshot_id": name}).status_code
    return status


def at_work(api: Api, role: str = "snapshot") -> Any:
    """The snapshot that the worker has loaded; role "shadow": the one that it has loaded as the shadow."""
    peers = api.http.app_state["service"].monitor.findings.peers.values()
    lanes = [peer.info["lanes"] for peer in peers if peer.role == "worker" and peer.info.get("lanes")]
    return lanes[0]["ads/f"][role] if lanes else None


def all_at_work(api: Api) -> list[str]:
    """The snapshot of each worker that lives."""
    peers = api.http.app_state["service"].monitor.findings.peers.values()
    return [p.info["lanes"]["ads/f"]["snapshot"] for p in peers if p.role == "worker" and p.info.get("lanes")]


def all_scraped(api: Api) -> list[list[str]]:
    """What each worker that lives tells Prometheus to have at work."""
    peers = api.http.app_state["service"].monitor.findings.peers.values()
    texts = [httpx.get(f"{p.info['probe_url']}/metrics").text for p in peers if p.role == "worker"]
    return [re.findall(r'das_worker_snapshot_info{dataset="ads",fm="f",snapshot="(\w+)"} 1.0', text) for text in texts]


def supervision(api: Api) -> pa.Table:
    table = DeltaTable(f"{api.settings.tables_uri}/ads/supervision/f")
    return pa.table(table.to_pyarrow_table(columns=["example_id", "snapshot_id", "available_at", "_is_shadow"]))


def fm_status(api: Api) -> dict[str, Any]:
    found: dict[str, Any] = api.http.get("/v1/datasets/ads/status").json()["fms"]["f"]
    return found


def test_a_switch_under_load_loses_nothing_and_doubles_nothing(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    switched = threading.Event()
    posted: list[str] = []

    def post_until_switched() -> None:
        while not switched.is_set() or len(posted) < CHUNK * CHUNKS:
            rows = examples_table(len(posted), CHUNK)
            answer = api.post(rows)
            assert (answer.status_code, answer.json()["rejected"]) == (202, 0), answer.text
            posted.extend(rows["example_id"].to_pylist())

    poster = threading.Thread(target=post_until_switched)
    poster.start()
    try:
        for step in (
            lambda: activate(api, "s2") == 200,
            lambda: api.http.put(f"{FM}/shadow", json={"snapshot_id": "s1", "share": 0.5}).status_code == 200,
            lambda: api.http.post(f"{FM}/rollback").json()["snapshot_id"] == "s1",
            lambda: activate(api, "s2") == 200,
            lambda: api.http.post(f"{FM}/snapshots/s1/retire").status_code == 200,
        ):
            assert step()
            wanted = api.http.get(f"{FM}/active").json()["snapshot_id"]
            wait_for(lambda name=wanted: at_work(api) == name)
            before = len(posted)
            wait_for(lambda floor=before: fm_status(api)["scored"] > floor + CHUNK)  # some of them by this snapshot
    finally:
        switched.set()
        poster.join(120)
    wait_for(lambda: (fm_status(api)["scored"], fm_status(api)["pending"]) == (len(posted), 0))

    rows = supervision(api)
    outcomes = [row for row in rows.to_pylist() if not row["_is_shadow"]]
    shadows = [row for row in rows.to_pylist() if row["_is_shadow"]]
    assert sorted(row["example_id"] for row in outcomes) == sorted(posted)
    assert {row["snapshot_id"] for row in outcomes} == {"s1", "s2"}
    assert {row["snapshot_id"] for row in shadows} <= {"s1"}
    pairs = [(row["example_id"], row["snapshot_id"]) for row in rows.to_pylist()]
    assert len(set(pairs)) == len(pairs)
    status = fm_status(api)
    assert (status["scored"], status["failed"], status["pending"]) == (len(posted), 0, 0)
    assert states(api) == ["retired", "active"]
    gap = longest_gap_seconds(rows.filter(pa.array([not row["_is_shadow"] for row in rows.to_pylist()])))
    with capsys.disabled():
        print(f"\n{len(posted)} examples, longest gap between two publishes {gap:.3f} s")


@pytest.mark.parametrize("own_server", ["valkey"], indirect=True)
def test_a_stored_shadow_is_served_by_no_join_also_after_it_became_the_active_one(api: Api) -> None:
    api.http.put(f"{FM}/shadow", json={"snapshot_id": "s2", "share": 1.0})
    wait_for(lambda: at_work(api, "shadow") == "s2")
    api.post(examples_table(0, 400))
    wait_for(lambda: fm_status(api)["scored"] == 400 and supervision(api).num_rows == 800)
    assert activate(api, "s2") == 200
    rows = [{"example_id": f"e{i}", "event_time": "2026-03-01T12:00:00Z"} for i in range(400)]

    answer = api.http.post("/v1/datasets/ads/supervision/augment", json={"fms": ["f"], "rows": rows})

    assert answer.status_code == 200, answer.text
    assert {row["f__snapshot_id"] for row in answer.json()["rows"]} == {"s1"}
    assert {row["f__snapshot_id"] for row in api.lookup([f"e{i}" for i in range(400)])} == {"s1"}
    assert fm_status(api)["scored"] == 400


@pytest.mark.parametrize("own_server", ["valkey"], indirect=True)
def test_two_workers_switch_together(api: Api, settings: Settings, tmp_path: Path) -> None:
    """Once both say that they have it, nothing comes from another snapshot any more; and none is lost or doubled."""
    (tmp_path / "second").mkdir()
    with contextlib.closing(Roles(settings, tmp_path / "second")) as roles:
        roles.start("worker")
        wait_for(lambda: all_at_work(api) == ["s1", "s1"])
        posted: list[str] = []
        for name in ("s2", "s1"):
            post_some(api, posted)
            assert activate(api, name) == 200
            post_some(api, posted)
            wait_for(lambda wanted=name: all_at_work(api) == [wanted] * 2)
            assert all_scraped(api) == [[name]] * 2
            after = set(post_some(api, posted))
            wait_for(lambda: (fm_status(api)["scored"], fm_status(api)["pending"]) == (len(posted), 0))
            wait_for(lambda: supervision(api).num_rows == len(posted))
            rows = supervision(api).to_pylist()
            assert {row["snapshot_id"] for row in rows if row["example_id"] in after} == {name}
        assert sorted(row["example_id"] for row in rows) == sorted(posted)


def post_some(api: Api, posted: list[str]) -> list[str]:
    """Post some chunks more; give their ids."""
    first = len(posted)
    for _ in range(20):
        rows = examples_table(len(posted), CHUNK)
        assert api.post(rows).status_code == 202
        posted += rows["example_id"].to_pylist()
    return posted[first:]
