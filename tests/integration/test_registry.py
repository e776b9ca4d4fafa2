"""The registry and what lies beside the tables, changed by several at once."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from das_service.folder import Folder
from das_service.logs import records, streams
from das_service.registry import FmRecord, Registry, asked_revision, fm_field, read_catalog, read_revision
from das_service.settings import Settings
from schemas import keys
from tests.conftest import Server
from tests.served import SPEC, Api, serve

WRITERS, CHANGES = 4, 12


@pytest.fixture
def clients(server: Server) -> Iterator[list[redis.Redis]]:
    """A client for each writer."""
    with ExitStack() as stack:
        yield [stack.enter_context(server.client()) for _ in range(WRITERS)]


def test_the_copy_beside_the_tables_never_goes_back_and_ends_at_the_servers_revision(
    clients: list[redis.Redis], settings: Settings
) -> None:
    folder = Folder(settings.tables_uri)
    is_over = threading.Event()
    seen: list[int] = []

    def change(writer: int) -> None:
        registry = Registry(clients[writer], folder)
        for number in range(CHANGES):
            registry.change(
                fm_field("ads", f"f{writer}"), FmRecord, lambda _, n=number: FmRecord(fm=f"f{n}", required=True)
            )

    def watch() -> None:
        registry = Registry(clients[0], folder)
        while not is_over.is_set():
            seen.append(int(registry.read_copy().get("revision", 0)))

    with ThreadPoolExecutor(WRITERS + 1) as pool:
        watcher = pool.submit(watch)
        try:
            for writer in [pool.submit(change, writer) for writer in range(WRITERS)]:
                writer.result(60)
        finally:
            is_over.set()
        watcher.result(60)

    assert seen == sorted(seen)
    assert len(set(seen)) > WRITERS
    assert int(Registry(clients[0], folder).read_copy()["revision"]) == read_revision(clients[0]) == WRITERS * CHANGES


def test_fms_that_are_declared_at_once_by_two_services_all_get_their_logs(
    settings: Settings, clients: list[redis.Redis]
) -> None:
    fms = [f"f{number}" for number in range(6)]
    with serve(settings) as one, serve(settings) as other, ThreadPoolExecutor(len(fms)) as pool:
        one.declare()
        assert {api.http.get("/nothing").status_code for api in (one, other)} == {
            404
        }  # each app makes its routes first
        barrier = threading.Barrier(len(fms))

        def declare(api: Api, fm: str) -> None:
            barrier.wait(30)
            api.declare_fm(fm)

        for done in [pool.submit(declare, (one, other)[place % 2], fm) for place, fm in enumerate(fms)]:
            done.result(60)

    client, folder = clients[0], Folder(settings.tables_uri)
    assert sorted(read_catalog(client).fms["ads"]) == fms
    logs = [*records.DATASET_LOGS, *[kind for fm in fms for kind in records.fm_logs(fm)]]
    recorded = json.loads((Path(settings.tables_uri) / "ads" / "_das" / "logs.json").read_text())
    assert sorted(recorded["logs"]) == sorted(logs)
    partitions = range(SPEC["partitions"])
    assert set(streams.read_counters(client, "ads", partitions, logs)) == {
        (p, kind) for p in partitions for kind in logs
    }
    groups = streams.read_groups(client, "ads", partitions, "examples")
    assert {p: set(found) for p, found in groups.items()} == {p: {keys.group(fm) for fm in fms} for p in partitions}
    assert {client.get(keys.generation("ads", p, fm)) for p in partitions for fm in fms} == {b"0"}
    assert streams.check_logs(client, folder, "ads") == []


def test_an_answer_that_nobody_waits_for_is_not_taken_for_the_next_one(clients: list[redis.Redis]) -> None:
    asking, pausing, *_ = clients
    asking.hset(keys.REGISTRY, "revision", 7)
    pausing.client_pause(300)  # nothing is answered before the next question

    with pytest.raises(ZeroDivisionError), asked_revision(asking):
        raise ZeroDivisionError
    assert asking.get("nothing") is None

    with asked_revision(asking) as revision:
        assert revision() == 7
    assert asking.get("nothing") is None
