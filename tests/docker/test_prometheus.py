"""A real Prometheus, with our configuration, on a real service: it finds the roles and what they count."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
import yaml

from das_service.client import Client
from das_service.metrics import Metrics
from das_service.snapshot_publish import publish_snapshot
from das_service.up.embedded import free_port
from das_service.up.supervisor import RunningService, running_service
from schemas.dataset import DatasetSpec
from tests.conftest import ROOT
from tests.docker.programs import PROMETHEUS, needs_prometheus

pytestmark = needs_prometheus

DOCKER = ROOT / "docker"
BOARD = json.loads((DOCKER / "grafana" / "dashboards" / "das.json").read_text())
RULES = yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"][0]["rules"]
PANELS = [(panel["title"], target["expr"], target["legendFormat"])
          for panel in BOARD["panels"] for target in panel.get("targets", [])]  # fmt: skip
EXPRESSIONS = [*[(title, expression) for title, expression, _ in PANELS],
               *[(rule["alert"], rule["expr"]) for rule in RULES]]  # fmt: skip
# Counters with labels that are made when the first row is counted; while all is well nothing is.
SILENT_WHILE_ALL_IS_WELL = ("das_fm_wasted_rows_total", "das_dead_chunks_total")
SPEC = {
    "features": [{"name": "price", "type": "float"}],
    "tasks": [{"name": "click", "label_window_seconds": 3600}],
    "partitions": 2,
}
ROWS = 3_000
WAIT_SECONDS = 90.0


@dataclass(frozen=True)
class Prometheus:
    """Asks a Prometheus by its HTTP API."""

    http: httpx.Client

    def ask(self, path: str, **params: str) -> Any:
        answer = self.http.get(f"/api/v1/{path}", params=params).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        return list(self.ask("query", query=expression.replace("$__rate_interval", "1m"))["result"])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that has taken, refused, recognised, scored, committed and handed out rows."""
    folder = tmp_path_factory.mktemp("up")
    with running_service(folder=folder / "das", env_overrides={"DAS_COMMIT_SECONDS": "0.3"}) as running:
        with Client(running.url) as client:
            send_and_look_up(client, running, folder / "s1")
        yield running


def send_and_look_up(client: Client, running: RunningService, exported: Path) -> None:
    from das_service.settings import load_settings
    from tests.fakes import export_closed_form

    client.put_dataset("ads", SPEC)
    export_closed_form(exported, DatasetSpec.model_validate(SPEC))
    settings = load_settings({}, snapshots_uri=str(running.folder.snapshots))
    publish_snapshot(client, settings, "ads", exported, activate=True)
    rows = examples_table(ROWS)
    for table in (rows, rows):
        assert client.ingest("ads", table, wait="scored", timeout_seconds=60).scored
    bad = examples_table(2).set_column(0, "example_id", pa.array(["", "good"]))
    assert client.ingest("ads", bad).rejected == 1
    client.lookup("ads", rows["example_id"].to_pylist(), fms=["closed"])


def examples_table(number: int) -> pa.Table:
    times = pa.array([datetime.now(UTC)] * number, pa.timestamp("us", "UTC"))
    return pa.table({"example_id": [f"e{i}" for i in range(number)], "event_time": times, "price": [1.5] * number})


@pytest.fixture(scope="module")
def prometheus(service: RunningService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus with docker/prometheus.yml, told the roles' addresses where a compose network would resolve them."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DOCKER / name) for name in config["rule_files"]]
    with Client(service.url) as client:
        urls = {role["role"]: role["probe_url"] for role in client.status()["roles"]} | {"api": service.url}
    for job in config["scrape_configs"]:
        (found,) = job.pop("dns_sd_configs")
        (name,) = found["names"]
        job["static_configs"] = [{"targets": [urls[name].removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    arguments = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                 f"--web.listen-address={address}"]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([str(PROMETHEUS), *arguments], cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://{address}") as http:
            wait_until(lambda: is_ready(http), (folder / "log").read_text)
            yield Prometheus(http)
    finally:
        process.terminate()
        process.wait(WAIT_SECONDS)


def is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/-/ready").is_success
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], object], state: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, state()
        time.sleep(0.1)


def metrics_of(expression: str) -> set[str]:
    """The metrics that an expression names, histograms by their own name."""
    found = set(re.findall(r"\b(?:das_\w+|up|ALERTS)\b", expression))
    return {re.sub("_(bucket|sum|count)$", "", name) for name in found}


def labels_of(expression: str) -> set[str]:
    """The labels that an expression selects or groups by."""
    grouped = [name for names in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for name in names.split(", ")]
    return {name for name in [*grouped, *re.findall(r"[{,](\w+)=", expression)] if name}


def test_it_returns_the_rows_that_were_ingested(prometheus: Prometheus) -> None:
    wanted = {"accepted": ROWS + 1, "repeated": ROWS, "rejected": 1}

    def found() -> dict[str, float]:
        result = prometheus.query("sum by (result) (das_ingest_rows_total)")
        return {series["metric"]["result"]: float(series["value"][1]) for series in result}

    wait_until(lambda: found() == wanted, found)


def test_it_finds_every_role_up_and_ready(prometheus: Prometheus) -> None:
    def found() -> set[tuple[str, str]]:
        return {
            (one["metric"]["job"], one["value"][1]) for name in ("up", "das_ready") for one in prometheus.query(name)
        }

    wait_until(lambda: found() == {("api", "1"), ("sink", "1"), ("worker", "1")}, found)


def test_every_metric_of_a_rule_or_a_panel_is_in_a_scrape(prometheus: Prometheus) -> None:
    named = {metric for _, expression in EXPRESSIONS for metric in metrics_of(expression)} - {"up", "ALERTS"}
    assert len(named) > 15
    wait_until(lambda: named <= set(prometheus.ask("metadata")), lambda: named - set(prometheus.ask("metadata")))


def test_every_panel_shows_something(prometheus: Prometheus) -> None:
    silent = [one for _, one, _ in PANELS if any(name in one for name in SILENT_WHILE_ALL_IS_WELL)]

    def empty() -> list[str]:
        return [one for _, one, _ in PANELS if not prometheus.query(one)]

    wait_until(lambda: empty() == silent, empty)


def test_every_label_belongs_to_a_metric_of_its_expression() -> None:
    labels: dict[str, set[str]] = {"up": set(), "ALERTS": {"alertstate"}}
    labels |= {name: set(one._labelnames) for name, one in Metrics("any").registry._names_to_collectors.items()}
    foreign = {}
    for title, expression in EXPRESSIONS:
        metrics = metrics_of(expression)
        known = {"job", "instance", "le"}.union(*(labels[metric] for metric in metrics))
        foreign |= {title: extra} if (extra := labels_of(expression) - known) else {}
    assert foreign == {}


def test_a_legend_names_labels_that_its_panel_groups_by() -> None:
    unknown = {title: set(re.findall(r"{{(\w+)}}", legend)) - labels_of(one) for title, one, legend in PANELS}
    assert {title: names for title, names in unknown.items() if names} == {}


def test_the_rules_are_loaded_and_none_fires(prometheus: Prometheus) -> None:
    def evaluated() -> list[dict[str, Any]]:
        return [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: {rule["health"] for rule in evaluated()} == {"ok"}, evaluated)
    assert {rule["name"] for rule in evaluated()} == {rule["alert"] for rule in RULES}
    assert [rule["name"] for rule in evaluated() if rule["state"] == "firing"] == []
