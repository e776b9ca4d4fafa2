"""I9 inside the worker: a thread that dies or hangs is said, and ends the process where it must."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import redis

from das_service.metrics import Metrics
from das_service.redis_client import connect
from das_service.registry import FmRecord, SnapshotRecord, fm_field, snapshot_field
from das_service.role import RoleContext
from das_service.settings import Settings
from fm_inference.engine import Prepared, Scored
from fm_inference.lane import Lane, Loaded
from fm_inference.publishing import Outcome
from fm_inference.worker import Worker
from schemas import keys
from tests.declared import NOON, SPEC, Declared, examples
from tests.feeding import OUTPUTS
from tests.lanes import at_work, closed_form_engine, declare_scored, loaded_for


@pytest.fixture
def context(settings: Settings) -> RoleContext:
    return RoleContext(settings, role="worker", instance="w1", client=connect(settings), metrics=Metrics("worker"))


@pytest.fixture
def lane(context: RoleContext) -> Lane:
    return Lane(context, dataset="ads", fm="f", partitions=1)


def boom() -> None:
    raise ValueError("boom")


@pytest.mark.parametrize("target", [boom, lambda: None], ids=["raises", "returns"])
def test_a_lane_thread_that_ends_is_said_at_once_and_ends_the_worker(
    context: RoleContext, lane: Lane, target: object
) -> None:
    worker = Worker(context)
    thread = threading.Thread(target=worker._guard, args=(lane, target), name="score ads/f")
    thread.start()
    thread.join()
    assert worker.problems() == ["thread score ads/f died; the process ends"]
    assert context.stopping.is_set()
    with pytest.raises(RuntimeError, match="thread score ads/f died"):
        worker.manage_until_stopped()


def test_a_lane_thread_that_ends_because_the_role_stops_is_no_death(context: RoleContext, lane: Lane) -> None:
    worker = Worker(context)
    context.stopping.set()
    worker._guard(lane, lambda: None)
    worker.manage_until_stopped()
    assert worker.problems() == []


def test_a_model_that_hangs_is_said(context: RoleContext, lane: Lane) -> None:
    worker = Worker(context)
    worker._lanes["ads", "f"] = lane
    lane.busy_since = time.monotonic() - 60
    assert worker.problems() == []
    lane.busy_since = time.monotonic() - 1000
    (problem,) = worker.problems()
    assert problem.startswith("ads/f: the model has been at one batch for 100")


def test_a_worker_that_cannot_read_the_tables_folder_says_so_and_goes_on(
    context: RoleContext, lane: Lane, tmp_path: Path
) -> None:
    Declared(context.settings, context.client).declare_fm("f")
    worker = Worker(context)
    worker._lanes["ads", "f"] = lane
    copy = tmp_path / "tables" / "_das" / "registry.json"
    kept = copy.rename(tmp_path / "kept")
    copy.mkdir()  # reading it is an OSError
    with pytest.raises(Exception, match="can't be read"):
        lane._reads.ping()
    assert "the tables' folder can't be read" in worker.problems()[0]
    worker._look()
    assert lane.halted
    copy.rmdir()
    kept.rename(copy)
    worker._look()
    assert (lane.halted, lane._reads.ping()) == ("", True)


def test_a_worker_raises_a_generation_that_whoever_withdrew_a_snapshot_could_not(context: RoleContext) -> None:
    declared = Declared(context.settings, context.client)
    declared.declare_fm("f")
    snapshot = SnapshotRecord(
        snapshot_id="s1", uri="/nowhere", sha256="0", state="validated", trained_through=NOON, registered_at=NOON
    )
    declared.registry.change(snapshot_field("ads", "f", "s1"), SnapshotRecord, lambda _: snapshot)
    change = {"outputs": OUTPUTS, "snapshots": ("s1",), "active": "s1", "generation": 3}
    declared.registry.change(fm_field("ads", "f"), FmRecord, lambda old: old.model_copy(update=change))
    worker = Worker(context)
    worker._lanes["ads", "f"] = Lane(context, dataset="ads", fm="f", partitions=2)
    worker._follow()
    assert [context.client.get(keys.generation("ads", p, "f")) for p in range(SPEC.partitions)] == [b"3", b"3"]


class PublishingLate(Lane):
    """A lane that publishes its first batch only once the model has begun the second."""

    forwards, waited_in_vain, second = 0, False, threading.Event()

    def _forward(self, loaded: Loaded, prepared: Prepared) -> Scored:
        self.forwards += 1
        if self.forwards == 2:
            self.second.set()
        return super()._forward(loaded, prepared)

    def _publish(self, loaded: Loaded, outcomes: Sequence[Outcome]) -> None:
        self.waited_in_vain |= not self.second.wait(30)
        super()._publish(loaded, outcomes)


def test_a_batch_is_scored_while_the_one_before_it_is_published(
    settings: Settings, store: redis.Redis, tmp_path: Path
) -> None:
    engine = closed_form_engine(tmp_path, max_batch=64)
    declared = declare_scored(settings.model_copy(update={"batch_rows": 1}), store, "ads", engine)
    for first in (0, 10):
        declared.append(0, examples(first, 10))
    with at_work(declared, engine, PublishingLate) as lane:
        pass
    assert isinstance(lane, PublishingLate)
    assert (lane.forwards, lane.waited_in_vain, lane.rows_scored) == (2, False, 20)


class PublishingNothing(Lane):
    """A lane that has a defect."""

    def _publish(self, *_: object) -> None:
        raise ValueError("boom")


def test_a_defect_in_publishing_ends_the_worker(settings: Settings, store: redis.Redis, tmp_path: Path) -> None:
    engine = closed_form_engine(tmp_path, max_batch=64)
    declared = declare_scored(settings, store, "ads", engine)
    declared.append(0, examples(0, 10))
    context = RoleContext(declared.settings, role="worker", instance="w", client=store, metrics=Metrics("worker"))
    lane = PublishingNothing(context, dataset="ads", fm="f", partitions=declared.spec.partitions)
    lane.loaded = loaded_for(declared, engine)
    worker = Worker(context)
    targets = [lane.read_until_stopped, lambda: worker._guard(lane, lane.score_until_stopped)]
    threads = [threading.Thread(target=target, name="score ads/f") for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert worker.problems() == ["thread score ads/f died; the process ends"]
