"""docker/compose.yaml as data, with its variables filled in."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from tests.docker.dockerfile import ROOT

COMPOSE = ROOT / "docker" / "compose.yaml"
ROLES = ("api", "sink", "worker", "worker-gpu")
ASKED_FOR = {"TOKENS_FILE": "/somewhere/tokens.json", "GRAFANA_PASSWORD": "a-password"}
_VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<how>:[-?])(?P<rest>[^}]*)\}")


def read_compose(environment: Mapping[str, str] = ASKED_FOR) -> dict[str, Any]:
    """Give what the file says; a variable that it asks for and does not get is a KeyError."""

    def fill(found: re.Match[str]) -> str:
        name, how, rest = found["name"], found["how"], found["rest"]
        return environment.get(name, rest) if how == ":-" else environment[name]

    return dict(yaml.safe_load(_VARIABLE.sub(fill, COMPOSE.read_text())))


def target_of(service: Mapping[str, Any]) -> str:
    """Give the target of the Dockerfile that a service runs."""
    return str(service["build"]["target"])
