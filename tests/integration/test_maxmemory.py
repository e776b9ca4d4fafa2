"""A server at its maxmemory under living roles: ingest is refused, what was taken is worked off, ingest goes on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.conftest import Server, make_settings
from tests.declared import NOON, Declared
from tests.roles import Roles, beats, publish, wait_for
from tests.served import Api, serve

MIB = 1 << 20
ROWS = 100  # of a request; about 2 MB
ROOM = 12 * MIB


@pytest.fixture
def declared(own_server: Server, tmp_path: Path) -> Iterator[Declared]:
    with contextlib.closing(own_server.client()) as client:
        yield Declared(make_settings(own_server, tmp_path, max_memory_ratio=1.0), client)


@pytest.fixture
def roles(declared: Declared, tmp_path: Path) -> Iterator[Roles]:
    with contextlib.closing(Roles(declared.settings, tmp_path)) as roles:
        yield roles


def rows(number: int) -> pa.Table:
    """The number-th request."""
    names = [f"e{number * ROWS + i}" for i in range(ROWS)]
    return pa.table(
        {
            "example_id": names,
            "event_time": pa.array([NOON] * ROWS, pa.timestamp("us", "UTC")),
            "price": [float(i) for i in range(ROWS)],
            "user_id": [name * (20_000 // len(name)) for name in names],
        }
    )


def limit(declared: Declared, num_bytes: int) -> None:
    declared.client.config_set("maxmemory", num_bytes)


def used_bytes(declared: Declared) -> int:
    return int(declared.client.info("memory")["used_memory"])


def status(api: Api) -> dict[str, Any]:
    answer = api.http.get("/v1/status")
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["datasets"]["ads"])


def is_worked_off(api: Api) -> bool:
    found = status(api)
    return bool(found["in_log"] == 0 and found["fms"]["f"]["pending"] == 0)


def counts(declared: Declared) -> dict[str, int]:
    """How often worker and sink have beaten."""
    return {role: max(beat["count"] for beat in beats(declared, role)) for role in ("worker", "sink")}


def test_at_maxmemory_ingest_is_refused_and_everything_taken_is_worked_off(declared: Declared, roles: Roles) -> None:
    declared.declare_fm("f")
    processes = [roles.start("worker"), roles.start("sink")]
    publish(declared)
    with serve(declared.settings) as api:
        number = 0
        limit(declared, used_bytes(declared) + ROOM)
        while (answer := api.post(rows(number))).status_code == 202:
            number += 1
            assert number < 5000
        refused = [number]
        assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (429, "memory", True)
        assert int(answer.headers["Retry-After"]) > 0

        limit(declared, 1)  # whatever is freed, no room is made
        heard = counts(declared)
        wait_for(lambda: is_worked_off(api))
        wait_for(lambda: all(counts(declared)[role] > heard[role] + 3 for role in heard))
        assert api.post(rows(number + 1)).status_code == 429
        refused.append(number + 1)
        alive = {role["role"]: role["alive"] for role in api.http.get("/v1/status").json()["roles"]}
        assert (alive["worker"], alive["sink"]) == (True, True)

        limit(declared, 0)
        api.look()
        for each in refused:
            assert api.post(rows(each)).status_code == 202
        wait_for(lambda: is_worked_off(api))
        found = status(api)
        fm = found["fms"]["f"]
        assert found["distinct"] == (number + 2) * ROWS
        assert found["accepted"] == found["distinct"] + found["duplicates"] + found["conflicting"]
        assert (fm["scored"], fm["failed"], fm["pending"]) == (found["distinct"], 0, 0)
        assert [process.poll() for process in processes] == [None, None]
