"""Entries on their way through a worker: whatever happens between the server and the model, none is left in a hand."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import redis

from das_service.beats import Peer
from das_service.metrics import Metrics
from das_service.role import RoleContext
from fm_inference import delivery, lane
from fm_inference.delivery import Intake
from fm_inference.engine import Scored, TorchEngine
from fm_inference.lane import Lane, Loaded, Peers
from fm_inference.publishing import Outcome, Published, Publisher
from tests.conftest import Server, make_settings
from tests.declared import SPEC, Declared, examples
from tests.lanes import closed_form_engine

DEAD = {name: Peer(instance=name, role="worker", alive=False, info={}) for name in ("a", "b")}


@pytest.fixture
def declared(server: Server, tmp_path: Path) -> Iterator[Declared]:
    with contextlib.closing(server.client()) as client:
        declared = Declared(make_settings(server, tmp_path), client)
        declared.declare_fm("f")
        yield declared


def intake(declared: Declared, consumer: str) -> Intake:
    return Intake(declared.client, dataset="ads", fm="f", partitions=2, consumer=consumer, batch_rows=100)


@pytest.fixture
def lane_of(declared: Declared) -> Iterator[Callable[[str], Lane]]:
    """Gives a worker's lane; nothing of it runs."""
    lanes = []

    def make(consumer: str) -> Lane:
        context = RoleContext(
            declared.settings, role="worker", instance=consumer, client=declared.client, metrics=Metrics("worker")
        )
        lanes.append(Lane(context, dataset="ads", fm="f", partitions=2))
        return lanes[-1]

    yield make
    for each in lanes:
        for client in (each._guard, each._reads, each._client):
            client.close()


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
    declared: Declared, lane_of: Callable[[str], Lane], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(declared)
    heir = lane_of("c")
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


def test_what_a_former_process_of_this_name_left_is_suspect_and_what_comes_then_is_not(declared: Declared) -> None:
    hold(declared)
    heir = intake(declared, "a")
    left = heir.read(block_ms=1)
    declared.append(0, examples(100, 10))
    heir.recheck()
    assert [each.suspect for each in left] == [True, True]
    assert [(each.suspect, each.key) for each in heir.read(block_ms=100)] == [(False, (0, "examples", "1-2"))]


def test_what_a_former_process_of_this_name_left_is_tried_entry_by_entry(
    declared: Declared, lane_of: Callable[[str], Lane], tmp_path: Path
) -> None:
    hold(declared)
    heir = lane_of("a")
    engine = closed_form_engine(tmp_path, max_batch=100)
    heir.loaded = Loaded(engine=engine, publisher=cast(Publisher, None), spec=SPEC)
    reader = threading.Thread(target=heir.read_until_stopped)
    reader.start()
    first = heir._queue.get(timeout=60)
    heir._context.stopping.set()
    reader.join(60)
    assert (first.prepared, len(first.rows.deliveries)) == (None, 1)


@pytest.mark.parametrize(("seconds_ago", "is_taken"), [(0.0, True), (60.0, False)])
def test_a_peer_that_an_old_look_did_not_see_is_not_taken_for_dead(
    declared: Declared,
    lane_of: Callable[[str], Lane],
    monkeypatch: pytest.MonkeyPatch,
    *,
    seconds_ago: float,
    is_taken: bool,
) -> None:
    hold(declared)
    taken: list[delivery.Delivery] = []
    peers = Peers(by_instance={}, trust_absence=True, looked_at=time.monotonic() - seconds_ago)

    def keep(_: Loaded, deliveries: Sequence[delivery.Delivery]) -> None:
        taken.extend(deliveries)

    heir = lane_of("c")
    heir.peers = peers
    monkeypatch.setattr(heir, "_hand_over_singly", keep)
    heir._take_over(Loaded(engine=cast(TorchEngine, None), publisher=cast(Publisher, None), spec=SPEC))
    assert ids(taken) == (ALL if is_taken else [])


def test_an_entry_that_comes_back_while_its_refused_publish_is_noticed_is_not_left_in_a_hand(
    declared: Declared, lane_of: Callable[[str], Lane], monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(declared)
    worker = lane_of("c")
    worker.peers = Peers(by_instance=DEAD, trust_absence=False, looked_at=time.monotonic())
    worker._intake.read(block_ms=1)
    mine = worker._intake.take_over(DEAD, trust_absence=False)

    def refused(*_: object) -> list[Published]:
        """It was another's, who died then: the reader thread takes it over and finds it in hand."""
        name, group = "{ads.0}:examples", "fm:f"
        declared.client.xclaim(name, group, "a", 0, ["1-0"])
        assert worker._intake.take_over(DEAD, trust_absence=False) == []
        return [Published.NOT_OURS]

    monkeypatch.setattr(lane, "publish", refused)
    (one,) = [each for each in mine if each.key == (0, "examples", "1-0")]
    none = np.zeros(0, np.int64)
    scored = Scored(logits={}, embeddings={})
    outcome = Outcome(delivery=one, columns=pa.table({}), scored_rows=none, scored=scored, failed={})
    worker._publish(Loaded(engine=cast(TorchEngine, None), publisher=cast(Publisher, None), spec=SPEC), [outcome])
    assert ids(worker._intake.read(block_ms=1)) == [(0, "1-0")]
