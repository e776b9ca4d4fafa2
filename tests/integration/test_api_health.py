"""Readiness names what is wrong; a server that lost data, or may lose it, gets nothing."""

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from das_service.beats import forget
from das_service.folder import Folder
from das_service.logs.records import Mark, write_mark
from das_service.metrics import Metrics
from das_service.redis_client import run_script
from das_service.registry import Registry
from das_service.role import RoleContext, _start_probe
from das_service.settings import Settings
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.entries import Position
from tests.conftest import Server, make_settings
from tests.served import SPEC, Api, Stand, beat_as, examples, serve
from tests.spools import wait_until


def problems(api: Api) -> list[str]:
    """What /health/ready says after a fresh look."""
    api.look()
    answer = api.http.get("/health/ready")
    body = answer.json()
    assert (answer.status_code == 200) == body["ready"] == (not body["problems"])
    assert f"\ndas_ready {float(body['ready'])}\n" in api.http.get("/metrics").text
    return list(body["problems"])


def test_a_fresh_service_is_ready(settings: Settings) -> None:
    with serve(settings) as api:
        assert problems(api) == []


def test_a_dataset_needs_a_sink(api: Api, store: redis.Redis) -> None:
    (problem,) = problems(api)
    assert problem.startswith("no sink is alive")

    beat_as(store, "sink", count=1)

    assert problems(api) == []


def test_an_fm_that_scores_or_waits_for_validation_needs_a_worker(api: Api, store: redis.Redis) -> None:
    beat_as(store, "sink", count=1)
    api.declare_fm()
    assert problems(api) == []

    uri = f"{api.settings.snapshots_uri}/s1"
    api.http.post("/v1/datasets/ads/fms/f/snapshots", json={"snapshot_id": "s1", "uri": uri, "sha256": "a" * 64})
    (problem,) = problems(api)
    assert "no worker is alive for FM 'f' of dataset 'ads'" in problem
    assert "waits for validation" in problem

    Stand(api.settings, store).validate("s0")
    assert "stay unscored" in problems(api)[0]
    beat_as(store, "worker", count=1, fms=["ads/other"])
    assert len(problems(api)) == 1
    beat_as(store, "worker", count=2, fms=["ads/f"])
    assert problems(api) == []
    forget(store, "worker-test")
    assert len(problems(api)) == 1


def test_optional_fms_need_no_worker(api: Api, store: redis.Redis) -> None:
    beat_as(store, "sink", count=1)
    api.declare_fm(required=False)
    Stand(api.settings, store).validate("s0")

    assert problems(api) == []


def test_what_a_living_worker_says_of_itself_is_told(api: Api, store: redis.Redis) -> None:
    beat_as(store, "sink", count=1, problems=[])
    beat_as(store, "worker", count=1, fms=[], problems=["ads/f: the model does not load"])

    assert problems(api) == ["worker worker-test: ads/f: the model does not load"]


def test_little_disk_is_named(settings: Settings) -> None:
    with serve(settings.model_copy(update={"disk_reserve_bytes": 1 << 60})) as api:
        (problem,) = problems(api)
        assert "free bytes" in problem


def test_the_api_says_that_it_lives_and_goodbye(api: Api, store: redis.Redis) -> None:
    deadline = time.monotonic() + 5
    while not (beats := store.hgetall(keys.BEATS)):
        assert time.monotonic() < deadline
    assert b'"role": "api"' in next(iter(beats.values()))
    api.look()
    (role,) = api.http.get("/v1/status").json()["roles"]
    assert (role["role"], role["alive"], role["restarts"]) == ("api", True, 0)

    api.http.app_state["service"].monitor.stop()

    assert store.hgetall(keys.BEATS) == {}


@pytest.mark.parametrize(
    ("bind", "url"),
    [
        ("0.0.0.0:9000", f"http://{socket.gethostname()}:9000"),
        ("[::]:9000", f"http://{socket.gethostname()}:9000"),
        ("10.1.2.3:9000", "http://10.1.2.3:9000"),
        ("0.0.0.0:0", "http://api:8000"),
    ],
)
def test_a_process_bound_to_all_addresses_is_named_by_its_host(settings: Settings, bind: str, url: str) -> None:
    changes = {"bind": bind, "api_url": "http://api:8000"}
    with serve(settings.model_copy(update=changes)) as api:

        def urls() -> list[str]:
            api.look()
            return [role["probe_url"] for role in api.http.get("/v1/status").json()["roles"]]

        wait_until(lambda: urls() != [])
        assert urls() == [url]


def test_the_probe_of_a_background_role_is_named_by_its_host_too(settings: Settings, store: redis.Redis) -> None:
    everywhere = settings.model_copy(update={"probe_bind": "0.0.0.0:0"})
    context = RoleContext(everywhere, role="sink", instance="sink-1", client=store, metrics=Metrics("sink"))

    server = _start_probe(context, list)
    try:
        assert context.probe_url == f"http://{socket.gethostname()}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_what_a_supervisor_says_of_its_processes_is_preferred(api: Api, store: redis.Redis) -> None:
    beat_as(store, "sink", count=1, restarts=0)
    api.look()
    pid = next(role["pid"] for role in api.http.get("/v1/status").json()["roles"] if role["role"] == "sink")
    stated = [{"role": "sink", "pid": pid, "restarts": 3}, {"role": "worker", "pid": 1, "restarts": 1}]
    beat_as(store, "supervisor", count=1, roles=stated)
    api.look()

    roles = {role["role"]: role for role in api.http.get("/v1/status").json()["roles"]}

    assert (roles["sink"]["restarts"], roles["sink"]["alive"]) == (3, True)
    assert (roles["worker"]["restarts"], roles["worker"]["alive"]) == (1, False)
    assert "supervisor" not in roles


@pytest.fixture
def everysec(store: redis.Redis) -> Iterator[None]:
    """A server that fsyncs once a second."""
    store.config_set("appendfsync", "everysec")
    yield
    store.config_set("appendfsync", "always")


def test_a_server_that_may_lose_acknowledged_rows_gets_none(settings: Settings, everysec: None) -> None:
    with serve(settings) as api:
        api.declare()
        answer = api.post(examples(0, 1))
        assert (answer.status_code, answer.json()["code"]) == (503, "not_durable")
        assert "appendfsync is everysec, not always" in answer.json()["detail"]
        assert any("appendfsync" in problem for problem in problems(api))
        assert 'das_log_durability_info{mode="weaker"} 1.0' in api.http.get("/metrics").text
        assert api.logged_rows() == []


def test_relaxed_durability_is_accepted_and_shown(settings: Settings, everysec: None) -> None:
    with serve(settings.model_copy(update={"durability": "relaxed"})) as api:
        api.declare()
        assert api.post(examples(0, 1)).status_code == 202
        assert api.http.get("/health/ready").json()["durability"] == "relaxed"


def test_gauges_say_what_lies_in_the_logs(api: Api, stand: Stand) -> None:
    api.post(examples(0, 10))
    api.http.app_state["service"].monitor._oldest_at = -1e9
    api.look()

    metrics = api.http.get("/metrics").text
    assert 'das_log_backlog_entries{dataset="ads",group="fm:f",kind="examples"} 2.0' in metrics
    assert 'das_log_backlog_entries{dataset="ads",group="sink",kind="examples"} 2.0' in metrics
    assert 'das_log_backlog_bytes{dataset="ads",kind="examples"} 0.0' not in metrics
    assert 'das_log_oldest_age_seconds{dataset="ads",kind="examples"} 0.0\n' not in metrics


@pytest.fixture
def own_api(own_server: Server, tmp_path: Path) -> Iterator[Api]:
    """The API on a server of the test's own, with dataset `ads` and ten rows."""
    with serve(make_settings(own_server, tmp_path)) as api:
        api.declare()
        assert api.post(examples(0, 10)).status_code == 202
        yield api


def test_a_server_that_is_down_is_503_and_named_and_serves_again_when_back(own_api: Api, own_server: Server) -> None:
    own_server.kill()

    answer = own_api.post(examples(10, 1))
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert "Retry-After" in answer.headers
    assert own_api.http.get("/v1/datasets").status_code == 503
    assert any("can't be used" in problem for problem in problems(own_api))

    own_server.start()
    own_api.look()

    assert own_api.post(examples(10, 1)).status_code == 202
    assert len(own_api.logged_rows()) == 11


def test_a_server_that_came_back_empty_gets_nothing(own_api: Api, own_server: Server) -> None:
    own_api.http.app_state["service"].monitor.stop()  # so that the connection itself has to notice
    own_server.kill()
    shutil.rmtree(own_server.folder)
    own_server.start()

    answer = own_api.post(examples(10, 1))

    assert (answer.status_code, answer.json()["code"]) == (503, "log_lost")
    assert (
        own_api.http.put("/v1/datasets/other", json={"features": [{"name": "a", "type": "float"}]}).status_code == 503
    )
    with own_server.client() as client:
        assert client.keys("*") in ([], [keys.PROBE.encode()])


def test_a_server_that_came_back_older_gets_nothing(own_api: Api, own_server: Server, tmp_path: Path) -> None:
    own_api.http.app_state["service"].monitor.stop()
    shutil.copytree(own_server.folder, tmp_path / "older")
    own_api.post(examples(10, 10))
    positions = {partition: Position(epoch=1, seq=1) for partition in range(2)}
    tables = Folder(own_api.settings.tables_uri)
    write_mark(tables, "ads", "examples", Mark(version=1, positions=positions, rows=20))
    own_server.kill()
    shutil.rmtree(own_server.folder)
    shutil.copytree(tmp_path / "older", own_server.folder)
    own_server.start()

    answer = own_api.post(examples(30, 10))

    assert (answer.status_code, answer.json()["code"]) == (503, "log_rewound")
    with own_server.client() as client:
        assert [client.xlen(keys.log("ads", partition, "examples")) for partition in range(2)] == [1, 1]
    assert any("log_rewound" in problem for problem in problems(own_api))


def test_a_log_that_vanished_is_noticed_and_nothing_is_papered_over(api: Api, store: redis.Redis) -> None:
    api.post(examples(0, 10))
    store.delete(keys.log("ads", 1, "examples"))
    api.look()

    answer = api.post(examples(10, 10))

    assert (answer.status_code, answer.json()["code"]) == (503, "log_lost")
    assert "das recover" in answer.json()["detail"]
    assert store.exists(keys.log("ads", 1, "examples")) == 0
    assert api.http.put("/v1/datasets/ads/fms/f", json={}).status_code == 503


def test_a_registry_that_was_changed_and_not_copied_is_copied(api: Api, store: redis.Redis) -> None:
    run_script(store, "swap", [keys.REGISTRY], ["dataset/cut", "", DatasetSpec.model_validate(SPEC).model_dump_json()])

    api.look()

    assert "dataset/cut" in Registry(store, Folder(api.settings.tables_uri)).read_copy()


def test_a_damaged_file_beside_the_tables_is_named(api: Api) -> None:
    (Path(api.settings.tables_uri) / "ads" / "_das" / "logs.json").write_text("{")

    assert any("damaged" in problem for problem in problems(api))
    assert api.post(examples(0, 1)).status_code == 503
