"""docs/operations.md has an entry for each alert, and names only commands and services that exist."""

import re

import yaml

from tests.docker.commands import find_command
from tests.docker.compose import read_compose
from tests.docker.dockerfile import DOCKERFILE, ROOT

OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
ALERTS = yaml.safe_load((DOCKERFILE.parent / "alerts.yml").read_text())["groups"][0]["rules"]


def test_every_alert_has_an_entry_and_every_entry_an_alert() -> None:
    entries = re.findall(r"^### (.+)$", OPERATIONS, re.MULTILINE)
    assert entries == [rule["alert"] for rule in ALERTS]
    assert [rule["annotations"]["runbook"] for rule in ALERTS] == [
        f"docs/operations.md#{name.lower()}" for name in entries
    ]


def test_an_entry_says_how_grave_it_is_and_what_to_do() -> None:
    entries = dict(re.findall(r"^### (\w+)\n\n(.+?)(?=\n### |\Z)", OPERATIONS, re.MULTILINE | re.DOTALL))
    for rule in ALERTS:
        grave = {"page": "Page. ", "ticket": "Ticket. "}[rule["labels"]["severity"]]
        assert entries[rule["alert"]].startswith(grave)
    # DasIngestRefused and DasCoverageLow send the reader on to another entry, by code and by status
    silent = [name for name, text in entries.items() if "Do:" not in text]
    assert silent == ["DasIngestRefused", "DasCoverageLow"]


def test_every_command_exists_with_its_options() -> None:
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", OPERATIONS, re.DOTALL)).splitlines()
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```sh\n.*?```", "", OPERATIONS, flags=re.DOTALL))
    found = [re.search(r"(?:^| )(?:das|run .* api) ([a-z].*)$", line) for line in [*blocks, *inline]]
    lines = [match[1].split() for match in found if match]
    assert len(lines) > 10
    for words in lines:
        parameters = find_command(words).params
        known = {option for parameter in parameters for option in [*parameter.opts, *parameter.secondary_opts]}
        assert {word for word in words if word.startswith("--")} <= known, words


def test_every_service_exists() -> None:
    options = r"(?: -e DAS_TOKEN| --no-deps| --rm| --tail \d+| --since \w+| -v \S+)*"
    named = re.findall(rf"dc (?:exec|logs|restart|ps|run){options} ([a-z-]+)", OPERATIONS)
    assert len(named) > 10
    assert set(named) <= set(read_compose()["services"])


def test_every_link_leads_to_a_heading() -> None:
    headings = {
        re.sub("[^a-z ]", "", text.lower()).replace(" ", "-") for text in re.findall("^#+ (.+)$", OPERATIONS, re.M)
    }
    assert set(re.findall(r"\]\(#([a-z-]+)\)", OPERATIONS)) <= headings
