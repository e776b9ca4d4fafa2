"""Entries on their way through a worker: whatever happens between the server and the model, none is left in a hand."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from das_service.beats import Peer
from das_service.metrics import Metrics
from das_service.role import RoleContext
from fm_inference import delivery, lane
from fm_inference.delivery import Intake
from fm_inference.engine import TorchEngine
from fm_inference.lane import Lane, Loaded
from fm_inference.publishing import Publisher
from tests.conftest import Server, make_settings
from tests.declared import SPEC, Declared, examples

DEAD = {name: Peer(instance=name, role="worker", alive=False, info={}) for name in ("a", "b")}


@pytest.fixture
def declared(server: Server, tmp_path: Path) -> Iterator[Declared]:
    with contextlib.closing(server.client()) as client:
        declared = Declared(make_settings(server, tmp_path), client)
        declared.declare_fm("f")
        yield declared


def intake(declared: Declared, consumer: str) -> Intake:
    return Intake(declared.client, dataset="ads", fm="f", partitions=2, consumer=consumer, batch_rows=100)


def hold(declared: Declared) -> None:
    """Let consumers `a` and `b`, who die then, hold entries of both partitions."""
    for number, consumer in enumerate(("a", "b")):
        for partition in range(2):
            declared.append(partition, examples(20 * number + 10 * partition, 10))
        reader = intake(declared, consumer)
        assert len(reader.read(block_ms=100) + reader.read(block_ms=100)) == 2


def cut(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, *, after: int) -> None:
    """Let calls of a function find the server gone once, after some that went well."""
    whole, calls = getattr(module, name), iter(range(1000))

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == after:
            raise redis.exceptions.ConnectionError("gone")
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, name, sometimes)


def ids(deliveries: list[delivery.Delivery]) -> list[tuple[int, str]]:
    return sorted((each.partition, each.entry.position.entry_id) for each in deliveries)


ALL = [(0, "1-0"), (0, "1-1"), (1, "1-0"), (1, "1-1")]


@pytest.mark.parametrize("after", range(5))
def test_a_server_that_goes_away_during_a_takeover_leaves_no_entry_in_a_hand(
    declared: Declared, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    hold(declared)
    heir = intake(declared, "c")
    heir.read(block_ms=1)
    cut(monkeypatch, delivery, "run_script", after=after)
    taken: list[delivery.Delivery] = []
    with contextlib.suppress(redis.exceptions.ConnectionError):
        taken = heir.take_over(DEAD, trust_absence=False)
    heir.recheck()
    while own := heir.read(block_ms=1):
        taken += own
    assert ids([*taken, *heir.take_over(DEAD, trust_absence=False)]) == ALL


def test_a_server_that_goes_away_before_an_entry_is_handed_over_leaves_none_in_a_hand(
    declared: Declared, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(declared)
    context = RoleContext(
        declared.settings, role="worker", instance="c", client=declared.client, metrics=Metrics("worker")
    )
    heir = Lane(context, dataset="ads", fm="f", partitions=2)
    loaded = Loaded(engine=cast(TorchEngine, None), publisher=cast(Publisher, None), spec=SPEC)
    taken = heir._intake.take_over(DEAD, trust_absence=False)
    cut(monkeypatch, lane, "read_rows", after=0)
    with pytest.raises(redis.exceptions.ConnectionError):
        heir._hand_over_singly(loaded, taken)
    heir._intake.recheck()
    found: list[delivery.Delivery] = []
    while own := heir._intake.read(block_ms=1):
        found += own
    assert ids(found) == ids(taken) == ALL


def test_a_server_that_goes_away_while_an_unreadable_entry_is_passed_by_leaves_none_in_a_hand(
    declared: Declared, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def count_one() -> None:
        nonlocal count
        count += 1

    declared.append(0, examples(0, 10))
    declared.client.xadd("{ads.0}:examples", {"v": "1"}, id="1-1")
    reader = Intake(
        declared.client, dataset="ads", fm="f", partitions=2, consumer="a", batch_rows=100, count_unreadable=count_one
    )
    found = reader.read(block_ms=100) + reader.read(block_ms=100)
    cut(monkeypatch, declared.client, "xack", after=0)
    with pytest.raises(redis.exceptions.ConnectionError):
        reader.read(block_ms=1)
    reader.recheck()
    assert ids(found + reader.read(block_ms=1)) == [(0, "1-0")]
    assert reader.read(block_ms=1) == []
    assert (count, declared.client.xpending("{ads.0}:examples", "fm:f")["pending"]) == (1, 1)


def test_an_entry_of_a_later_version_waits_for_a_worker_of_that_version(declared: Declared) -> None:
    declared.client.xadd("{ads.0}:examples", {"v": "2"}, id="1-0")
    reader = intake(declared, "a")
    for _ in range(3):
        assert reader.read(block_ms=1) == []
        reader.recheck()
    assert declared.client.xpending("{ads.0}:examples", "fm:f")["pending"] == 1
