"""The atomic publish on both servers: whatever two workers do in whatever order, each chunk is published once."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from das_service.redis_client import has_msetex, run_script
from das_service.registry import FmRecord, fm_field
from fm_inference.delivery import Delivery, Intake
from fm_inference.engine import Scored
from fm_inference.publishing import Outcome, Published, Publisher, publish
from fm_inference.rows import read_rows
from schemas import keys
from schemas.snapshot import OutputColumns
from tests.conftest import Server, make_settings
from tests.declared import SPEC, Declared, examples

OUTPUTS = OutputColumns(tasks=("click",), embeddings={"hidden": (2, "float16")})
NUM_CHUNKS, CHUNK_ROWS = 6, 3


@pytest.fixture
def declared(server: Server, tmp_path: Path) -> Iterator[Declared]:
    with contextlib.closing(server.client()) as client:
        yield declare(server, tmp_path, client)


def declare(server: Server, folder: Path, client: redis.Redis) -> Declared:
    declared = Declared(make_settings(server, folder), client)
    declared.declare_fm("f")
    declared.registry.change(fm_field("ads", "f"), FmRecord, lambda r: r.model_copy(update={"outputs": OUTPUTS}))
    return declared


def publisher(declared: Declared, consumer: str, **changes: int) -> Publisher:
    values = {
        "dataset": "ads", "fm": "f", "consumer": consumer, "snapshot_id": "s1", "snapshot_number": 0,
        "trained_through_us": 0, "generation": 0, "epoch": 1, "ttl_seconds": 60, "outputs": OUTPUTS,
        "has_msetex": has_msetex(declared.client),
    }  # fmt: skip
    return Publisher(**{**values, **changes})


def outcome(declared: Declared, delivery: Delivery, value: float, failed: dict[int, str] | None = None) -> Outcome:
    rows = read_rows(declared.client, "ads", "f", SPEC, [delivery])
    scored_rows = np.array([r for r in range(rows.columns.num_rows) if r not in (failed or {})])
    scored = Scored(
        logits={"click": np.full(len(scored_rows), value, np.float32)},
        embeddings={"hidden": np.full((len(scored_rows), 4), int(value), np.uint8)},
    )
    return Outcome(delivery=delivery, columns=rows.columns, scored_rows=scored_rows, scored=scored, failed=failed or {})


def intake(declared: Declared, consumer: str) -> Intake:
    return Intake(declared.client, dataset="ads", fm="f", partitions=2, consumer=consumer, batch_rows=CHUNK_ROWS * 2)


def read_one(declared: Declared) -> Delivery:
    """Give the one entry that waits, in the hands of consumer `a`."""
    reader = intake(declared, "a")
    deliveries = reader.read(block_ms=100) or reader.read(block_ms=100)
    (delivery,) = deliveries
    return delivery


class TwoWorkers:
    """Workers a and b on the same logs, who may read, take each other's entries over, and publish."""

    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        self.held: dict[str, list[Delivery]] = {"a": [], "b": []}
        self.readers = {name: intake(declared, name) for name in self.held}

    def step(self, worker: str, action: str) -> None:
        if action == "read":
            self.held[worker] += self.readers[worker].read(block_ms=1)
        elif action == "steal":
            self.claim("b" if worker == "a" else "a", worker)
            self.readers[worker].recheck()
        elif self.held[worker]:
            self.publish(worker, [self.held[worker].pop(0)], 1.0 if worker == "a" else 2.0)

    def claim(self, dead: str, heir: str) -> None:
        for partition in range(2):
            stream = keys.log("ads", partition, "examples")
            run_script(self.declared.client, "claim", [stream], ["fm:f", dead, heir, 100])

    def publish(self, worker: str, deliveries: list[Delivery], value: float) -> None:
        outcomes = [outcome(self.declared, delivery, value) for delivery in deliveries]
        publish(self.declared.client, publisher(self.declared, worker), outcomes)

    def finish(self) -> None:
        """Let a third worker publish all that is left."""
        last = intake(self.declared, "c")
        for other in "ab":
            self.claim(other, "c")
        while deliveries := last.read(block_ms=1) + last.read(block_ms=1):
            self.publish("c", deliveries, 3.0)
            last.finished(deliveries)


@given(steps=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["read", "steal", "publish"])), max_size=40))
@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_interleaving_of_two_workers_publishes_each_chunk_once(
    shared_server: Server, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]
) -> None:
    with contextlib.closing(shared_server.client()) as client:
        client.flushall()
        declared = declare(shared_server, tmp_path_factory.mktemp("interleaving"), client)
        for i in range(NUM_CHUNKS):
            declared.append(i % 2, examples(i * CHUNK_ROWS, CHUNK_ROWS))
        workers = TwoWorkers(declared)
        for worker, action in steps:
            workers.step(worker, action)
        workers.finish()

        scored = {row["example_id"]: row["click__logit"] for row in declared.scored("f")}
        ids = [f"e{i}" for i in range(NUM_CHUNKS * CHUNK_ROWS)]
        assert sorted(row["example_id"] for row in declared.scored("f")) == sorted(ids)
        assert declared.pending("f") == 0
        online = [declared.online(i // CHUNK_ROWS % 2, "f", name) for i, name in enumerate(ids)]
        assert [value["click__logit"] for value in online if value is not None] == [scored[name] for name in ids]


def test_a_publish_that_is_sent_twice_changes_nothing_the_second_time(declared: Declared) -> None:
    declared.append(0, examples(0, 3))
    delivery = read_one(declared)
    first = publish(declared.client, publisher(declared, "a"), [outcome(declared, delivery, 1.0)])
    again = publish(declared.client, publisher(declared, "a"), [outcome(declared, delivery, 2.0)])
    assert (first, again) == ([Published.DONE], [Published.NOT_OURS])
    assert [row["click__logit"] for row in declared.scored("f")] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"generation": 7}, Published.WITHDRAWN),
        ({"epoch": 2}, Published.OTHER_EPOCH),
        ({"consumer": "z"}, Published.NOT_OURS),
    ],
)
def test_a_publisher_that_knows_another_state_leaves_no_trace(
    declared: Declared, change: dict[str, int], answer: Published
) -> None:
    declared.append(0, examples(0, 3))
    delivery = read_one(declared)
    arguments = {"consumer": "a", **change}
    assert publish(declared.client, publisher(declared, **arguments), [outcome(declared, delivery, 1.0)]) == [answer]
    assert (declared.scored("f"), declared.online(0, "f", "e1"), declared.pending("f")) == ([], None, 1)


def test_a_lost_scored_log_leaves_the_entry_pending(declared: Declared) -> None:
    declared.append(0, examples(0, 3))
    delivery = read_one(declared)
    declared.client.delete(keys.log("ads", 0, "scored:f"))
    result = publish(declared.client, publisher(declared, "a"), [outcome(declared, delivery, 1.0)])
    assert (result, declared.online(0, "f", "e1"), declared.pending("f")) == ([Published.LOST], None, 1)


def test_the_first_score_stands_and_a_failure_gives_way(declared: Declared) -> None:
    declared.append(0, examples(0, 2))
    delivery = read_one(declared)
    publish(declared.client, publisher(declared, "a"), [outcome(declared, delivery, 1.0, failed={1: "boom"})])
    declared.append(0, examples(0, 3))
    delivery = read_one(declared)
    publish(declared.client, publisher(declared, "a"), [outcome(declared, delivery, 2.0)])
    online = [declared.online(0, "f", f"e{i}") for i in range(3)]
    assert [value["click__logit"] for value in online if value is not None] == [1.0, 2.0, 2.0]
    assert [row["example_id"] for row in declared.dead("f")] == ["e1"]


def test_a_full_server_refuses_new_chunks_and_still_publishes(declared: Declared) -> None:
    declared.append(0, examples(0, 3))
    delivery = read_one(declared)
    ready = outcome(declared, delivery, 1.0)
    declared.client.config_set("maxmemory", 1)
    try:
        result = publish(declared.client, publisher(declared, "a"), [ready])
        with pytest.raises(Exception, match="maxmemory"):
            declared.append(0, examples(3, 3))
    finally:
        declared.client.config_set("maxmemory", 0)
    assert result == [Published.DONE]
