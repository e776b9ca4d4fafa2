"""What becomes of a registered snapshot: judged once, by its own faults alone, and tried again when a machine fails."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from das_service.beats import Peer
from das_service.folder import Folder
from das_service.registry import Registry, SnapshotRecord
from fm_inference.repository import Repository
from fm_inference.validator import Machine, Validator
from tests.conftest import Server, make_settings
from tests.declared import Declared

# One kind of server is enough: what is asked of it here is tested on both with the worker.
pytestmark = pytest.mark.parametrize("shared_server", ["valkey"], indirect=True)


@dataclass
class Clock:
    """Monotonic seconds that a test moves."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Stand:
    """One worker's validator on a real server."""

    declared: Declared
    instance: str = "w1"
    is_stopping: bool = False
    clock: Clock = field(default_factory=Clock)
    validator: Validator = field(init=False)

    def __post_init__(self) -> None:
        machine = Machine(
            instance=self.instance, device="cpu", bf16=False, is_stopping=lambda: self.is_stopping, clock=self.clock
        )
        repository = Repository(Folder(self.declared.settings.snapshots_uri))
        registry = Registry(self.declared.client, self.declared.folder)
        self.validator = Validator(registry, repository, machine, self.declared.folder)

    def validate(self, **peers: Peer) -> bool:
        return self.validator.validate_next(self.declared.catalog, peers)

    def snapshot(self, snapshot_id: str = "s1") -> SnapshotRecord:
        return self.declared.catalog.snapshot("ads", "f", snapshot_id)


@pytest.fixture
def declared(server: Server, tmp_path: Path) -> Iterator[Declared]:
    with contextlib.closing(server.client()) as client:
        declared = Declared(make_settings(server, tmp_path), client)
        declared.declare_fm("f")
        yield declared


def test_a_store_that_is_away_rejects_nothing_and_is_tried_again_ever_later(declared: Declared) -> None:
    stand = Stand(declared)
    declared.register("f", "s1")
    store = Path(declared.settings.snapshots_uri)
    away = store.rename(store.with_name("away"))
    for pause in (1.0, 2.0, 4.0):
        assert stand.validate()
        waiting = stand.snapshot()
        assert (waiting.state, waiting.validator) == ("validating", None)
        assert waiting.reasons == (f"not judged yet, and tried again: the snapshot store {store} is not there",)
        assert not stand.validate()
        stand.clock.now += pause
    away.rename(store)
    assert stand.validate()
    assert (stand.snapshot().state, stand.snapshot().reasons) == ("validated", ())


def test_a_snapshot_put_off_by_one_worker_is_free_for_another(declared: Declared) -> None:
    first, second = Stand(declared), Stand(declared, instance="w2")
    declared.register("f", "s1")
    store = Path(declared.settings.snapshots_uri)
    away = store.rename(store.with_name("away"))
    assert first.validate()
    away.rename(store)
    assert second.validate(w1=Peer(instance="w1", role="worker", alive=True, info={}))
    assert first.snapshot().state == "validated"


def test_a_snapshot_that_the_store_does_not_have_is_rejected_and_the_next_is_judged(declared: Declared) -> None:
    stand = Stand(declared)
    folder = declared.register("f", "s1")
    declared.register("f", "s2")
    shutil.rmtree(folder)
    assert stand.validate()
    assert stand.snapshot().reasons == (f"there is no snapshot folder {folder}",)
    assert stand.validate()
    assert (stand.snapshot().state, stand.snapshot("s2").state) == ("rejected", "validated")


def test_a_worker_that_stops_leaves_the_snapshot_to_others(declared: Declared) -> None:
    stand = Stand(declared, is_stopping=True)
    declared.register("f", "s1")
    assert stand.validate()
    assert (stand.snapshot().state, stand.snapshot().validator) == ("validating", None)


def test_a_snapshot_that_a_living_worker_is_at_is_left_to_it(declared: Declared) -> None:
    declared.register("f", "s1")
    first, second = Stand(declared), Stand(declared, instance="w2")
    first.validator._take(("ads", "f", "s1"), first.snapshot())
    assert not second.validate(w1=Peer(instance="w1", role="worker", alive=True, info={}))
    assert second.validate(w1=Peer(instance="w1", role="worker", alive=False, info={}))
    assert second.snapshot().state == "validated"
