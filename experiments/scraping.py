"""What the service's processes count: the text that Prometheus scrapes, read."""

import re
from typing import Final

import httpx

from das_service.client import Client

_SAMPLE: Final = re.compile(r"^(?P<name>[a-z_]+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$")


def scrape(client: Client) -> list[tuple[str, str]]:
    """Give each process's role and its metrics as text; a role of several processes comes several times."""
    roles = [role for role in client.status()["roles"] if role["probe_url"]]
    return [(role["role"], httpx.get(f"{role['probe_url']}/metrics", timeout=10).text) for role in roles]


def scrape_workers(client: Client) -> list[str]:
    """Give the metrics of each worker as text."""
    return [text for role, text in scrape(client) if role == "worker"]


def metric_sum(text: str, name: str, **labels: str) -> float:
    """Give the sum of a metric's samples whose labels include these, from the text that Prometheus scrapes."""
    total = 0.0
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is not None and match["name"] == name:
            found = dict(re.findall(r'(\w+)="([^"]*)"', match["labels"] or ""))
            if labels.items() <= found.items():
                total += float(match["value"])
    return total
