"""After each kind of loss a real worker and the sink bring every example to an outcome, once, and all are counted."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from das_service.recover import recover
from schemas import keys
from tests.conftest import Server, make_settings
from tests.declared import SPEC, Declared
from tests.feeding import Feeding, names
from tests.integration.test_recover import Rewind
from tests.roles import Roles, beats, publish, wait_for

STEPS = 400


class Service:
    """A worker process, a sink that is stepped by hand, and checks of what they say."""

    def __init__(self, server: Server, folder: Path, feeding: Feeding, workers: Roles) -> None:
        self.rewind = Rewind(server, folder / "copy")
        self.feeding = feeding
        self.declared = Declared(feeding.settings, feeding.client)
        self.declared.declare_fm("f")
        self.sink = feeding.sink()
        workers.start()
        publish(self.declared)

    def post(self, first: int, last: int) -> None:
        self.feeding.post_ids(first, last, chunk_rows=7)

    def wait_until_scored(self) -> None:
        wait_for(lambda: self.declared.pending("f") == 0)

    def wait_until_said_scored(self, num_rows: int) -> None:
        wait_for(lambda: self.rows_scored() == num_rows)

    def commit(self) -> None:
        self.feeding.run(self.sink, steps=6)

    def drain(self) -> dict[str, Any]:
        """Let both work until nothing waits, and check the accounts at each step; give the status at the end."""
        for _ in range(STEPS):
            self.feeding.run(self.sink, steps=1)
            status = self.feeding.status()
            fm = status["fms"]["f"]
            places = ("distinct", "duplicates", "conflicting", "diverted", "in_log")
            assert status["accepted"] == sum(status[place] for place in places)
            assert fm["scored"] + fm["failed"] + fm["pending"] >= status["distinct"]
            if status["in_log"] == fm["pending"] == 0:
                return status
        pytest.fail(f"not drained: {status}")

    def rows_scored(self) -> int:
        """Give how many rows the worker says that it published."""
        return sum(beat["lanes"]["ads/f"]["rows_scored"] for beat in beats(self.declared))


@pytest.fixture
def service(own_server: Server, tmp_path: Path) -> Iterator[Service]:
    with contextlib.closing(own_server.client()) as client:
        feeding = Feeding(make_settings(own_server, tmp_path, commit_seconds=0.5), client, spec=SPEC)
        with contextlib.closing(feeding), contextlib.closing(Roles(feeding.settings, tmp_path)) as workers:
            yield Service(own_server, tmp_path, feeding, workers)


def lose_the_scored_log(service: Service, first: int) -> int:
    """Examples and online values survive; what the worker said last does not."""
    service.post(first, first + 100)
    service.wait_until_scored()
    for partition in range(SPEC.partitions):
        service.feeding.client.delete(keys.log("ads", partition, "scored:f"))
    return 100


def lose_the_scored_log_of_committed_examples(service: Service, first: int) -> int:
    """The same in one partition, after the sink has committed the examples."""
    service.post(first, first + 100)
    service.wait_until_scored()
    service.feeding.client.delete(keys.log("ads", 1, "scored:f"))
    service.commit()  # goes on where it can, and says what it can't
    return 100


def rewind_the_server(service: Service, first: int) -> int:
    """The server is back in the past, the tables are not."""
    service.post(first, first + 50)
    service.rewind.keep()
    service.post(first + 50, first + 100)
    service.wait_until_scored()
    service.commit()
    service.rewind.put_back()
    return 100


def lose_the_server(service: Service, first: int) -> int:
    """Nothing is left but the tables; they lack the newest examples, which are given up, and some scores."""
    service.post(first, first + 100)
    service.commit()
    service.post(first + 100, first + 120)
    service.feeding.client.flushall()
    return 100


def test_after_each_loss_every_example_is_scored_once_and_accounted_for(service: Service) -> None:
    service.post(0, 100)
    service.wait_until_scored()
    service.commit()
    expected = names(0, 100)
    losses: list[tuple[Callable[[Service, int], int], bool]] = [
        (lose_the_scored_log, True),
        (lose_the_scored_log_of_committed_examples, True),
        (rewind_the_server, False),
        (lose_the_server, False),
    ]
    for number, (lose, is_all_online) in enumerate(losses, start=1):
        first = 1000 * number
        survived = lose(service, first)
        recover(service.feeding.settings)
        service.post(50, 60)  # repeats in other chunks
        service.post(first + 500, first + 550)
        status = service.drain()
        expected = sorted([*expected, *names(first, first + survived), *names(first + 500, first + 550)])
        assert service.feeding.ids("examples") == expected
        assert service.feeding.ids("supervision/f") == expected
        fm = status["fms"]["f"]
        assert (status["distinct"], fm["scored"], fm["failed"], fm["diverted"]) == (len(expected), len(expected), 0, 0)
        assert (status["duplicates"], status["conflicting"], service.sink.health()) == (10 * number, 0, [])
        if is_all_online:  # nothing was scored a second time
            service.wait_until_said_scored(len(expected))
            assert online_logits(service) == stored_logits(service)


def stored_logits(service: Service) -> dict[str, float]:
    return {row["example_id"]: row["click__logit"] for row in service.feeding.rows("supervision/f")}


def online_logits(service: Service) -> dict[str, float]:
    found = {}
    for example_id in service.feeding.ids("examples"):
        partition = int.from_bytes(keys.digests([example_id.encode()])[8:], "little") % SPEC.partitions
        value = service.declared.online(partition, "f", example_id)
        assert value is not None
        found[example_id] = float(value["click__logit"])
    return found
