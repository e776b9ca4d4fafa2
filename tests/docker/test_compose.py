"""The compose file says what its schema allows, and names only what exists in the images, the CLI and the settings."""

import json
import re
import subprocess
import sys
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml

from das_service.settings import Settings, load_settings
from das_service.up.embedded import server_arguments
from tests.docker.commands import find_command
from tests.docker.compose import ASKED_FOR, COMPOSE, ROLES, read_compose, target_of
from tests.docker.dockerfile import DOCKERFILE, TARGETS, Dockerfile

DOCKER = DOCKERFILE.parent


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return read_compose()


def test_it_is_valid_against_the_compose_specification() -> None:
    checker = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(checker, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_what_is_secret_is_asked_for() -> None:
    for name in ASKED_FOR:
        with pytest.raises(KeyError, match=name):
            read_compose({other: value for other, value in ASKED_FOR.items() if other != name})


@pytest.mark.parametrize("service", ROLES)
def test_a_role_runs_its_target_with_a_command_of_the_cli(
    compose: dict[str, Any], dockerfile: Dockerfile, service: str
) -> None:
    composed = compose["services"][service]
    assert target_of(composed) in TARGETS
    assert (COMPOSE.parent / composed["build"]["context"] / composed["build"]["dockerfile"]).resolve() == DOCKERFILE
    assert composed["command"] == dockerfile.exec_form(target_of(composed), "CMD")
    assert find_command(composed["command"]).name == composed["command"][0]
    built_with = {rest.partition("=")[0] for rest in dockerfile.all(dockerfile.builder(target_of(composed)), "ARG")}
    assert set(composed["build"].get("args", {})) == built_with


@pytest.mark.parametrize("service", ROLES)
def test_a_role_is_set_by_variables_that_exist(
    compose: dict[str, Any], dockerfile: Dockerfile, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    composed = compose["services"][service]
    environment = {**dockerfile.environment(target_of(composed)), **composed["environment"]}
    for name, value in environment.items():
        if name.startswith("DAS_"):
            monkeypatch.setenv(name, value)
    settings = load_settings(environment)
    given = {name.removeprefix("DAS_").lower() for name in environment if name.startswith("DAS_")}
    assert given <= set(Settings.model_fields)
    assert settings.redis_url.get_secret_value() == "redis://valkey:6379/0"
    assert settings.drain_seconds < float(composed["stop_grace_period"].removesuffix("s"))


def test_the_profiles_choose_the_worker(compose: dict[str, Any]) -> None:
    profiles = {name: service["profiles"] for name, service in compose["services"].items() if "profiles" in service}
    assert profiles == {"worker": ["cpu"], "worker-gpu": ["gpu"]}
    (device,) = compose["services"]["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_the_server_keeps_what_it_acknowledges_as_the_embedded_one_does(compose: dict[str, Any]) -> None:
    words = compose["services"]["valkey"]["command"]
    embedded = server_arguments(PurePosixPath("/data"), port=6379)
    there, here = (dict(zip(given[::2], given[1::2], strict=True)) for given in (words[1:], embedded))
    of_the_place = {"--maxmemory", "--protected-mode", "--port", "--bind", "--dir", "--daemonize", "--loglevel",
                    "--tcp-backlog", "--aof-load-truncated", "--latency-tracking"}  # fmt: skip
    assert {name: there[name] for name in there.keys() - of_the_place} == {
        name: here[name] for name in here.keys() - of_the_place
    }
    assert (there["--appendonly"], there["--appendfsync"], there["--maxmemory-policy"]) == (
        "yes", "always", "noeviction",
    )  # fmt: skip


@pytest.mark.parametrize("service", ROLES)
def test_a_role_listens_where_its_image_and_prometheus_expect_it(
    compose: dict[str, Any], dockerfile: Dockerfile, service: str
) -> None:
    composed = compose["services"][service]
    bind = composed["environment"]["DAS_BIND" if service == "api" else "DAS_PROBE_BIND"]
    (exposed,) = dockerfile.all(target_of(composed), "EXPOSE")
    jobs = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    scraped = {found["names"][0]: found["port"] for job in jobs for found in job["dns_sd_configs"]}
    names = [service, *composed.get("networks", {}).get("default", {}).get("aliases", [])]
    assert bind == f"0.0.0.0:{exposed}"
    assert [scraped[name] for name in names if name in scraped] == [int(exposed)]
    assert [port.rpartition(":")[2] for port in composed.get("ports", [])] == (["8000"] if service == "api" else [])


def test_every_address_in_a_setting_is_that_of_a_service(compose: dict[str, Any]) -> None:
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    environments = [compose["services"][service]["environment"] for service in ROLES]
    settings = [value for environment in environments for value in environment.values()]
    addresses = {tuple(found) for text in [*settings, source["datasources"][0]["url"]]
                 for found in re.findall(r"//([a-z-]+):(\d+)", text)}  # fmt: skip
    assert addresses == {("valkey", "6379"), ("api", "8000"), ("prometheus", "9090")}
    assert {name for name, _ in addresses} <= set(compose["services"])


def test_what_is_published_is_published_on_the_loopback_interface(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert sorted(ports) == ["127.0.0.1:3000:3000", "127.0.0.1:8000:8000", "127.0.0.1:9090:9090"]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Where a service's volumes and secrets lie in its container, and where they come from."""
    places = dict(reversed(volume.split(":")[:2]) for volume in service["volumes"])
    return places | {f"/run/secrets/{name}": name for name in service.get("secrets", [])}


@pytest.mark.parametrize("service", ROLES)
def test_every_path_in_a_setting_lies_in_a_volume_or_is_a_secret(compose: dict[str, Any], service: str) -> None:
    composed = compose["services"][service]
    paths = [value for value in composed["environment"].values() if value.startswith("/")]
    places = mounts(composed)
    assert paths
    assert [path for path in paths if not any(PurePosixPath(path).is_relative_to(place) for place in places)] == []
    assert set(places.values()) <= {*compose["volumes"], *compose["secrets"]}


@pytest.mark.parametrize("service", ["prometheus", "grafana"])
def test_every_file_that_is_mounted_is_there_and_read(compose: dict[str, Any], service: str) -> None:
    places = mounts(compose["services"][service])
    files = {place: DOCKER / source for place, source in places.items() if source.startswith(".")}
    assert [source for source in files.values() if not source.exists()] == []
    if service == "prometheus":
        assert sorted(files) == ["/etc/prometheus/alerts.yml", "/etc/prometheus/prometheus.yml"]
        return
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/das.yaml").read_text())["providers"][0]
    assert sorted(files) == [provider["options"]["path"], "/etc/grafana/provisioning"]


def test_the_dashboard_asks_the_source_that_is_provisioned() -> None:
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    (board,) = (json.loads(path.read_text()) for path in (DOCKER / "grafana/dashboards").glob("*.json"))
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    asked = [panel["datasource"] for panel in panels] + [t["datasource"] for panel in panels for t in panel["targets"]]
    assert {(one["type"], one["uid"]) for one in asked} == {(source["type"], source["uid"])}
