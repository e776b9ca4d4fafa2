"""A lane of a worker in this process: real logs, a real engine, no validation."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import redis

from das_service.metrics import Metrics
from das_service.redis_client import has_msetex
from das_service.registry import FmRecord, fm_field
from das_service.role import RoleContext
from das_service.settings import Settings
from fm_inference.engine import TorchEngine, load_engine
from fm_inference.lane import Lane, Loaded
from fm_inference.publishing import Publisher
from tests.declared import SPEC, Declared
from tests.fakes import export_closed_form


def closed_form_engine(folder: Path, *, max_batch: int) -> TorchEngine:
    """Snapshot s1 of FM `f`: the closed form over tests.declared.SPEC."""
    manifest = export_closed_form(folder / "s1", SPEC, fm="f", snapshot_id="s1", max_batch=max_batch)
    return load_engine(folder / "s1", manifest, device="cpu")


def declare_scored(settings: Settings, client: redis.Redis, dataset: str, engine: TorchEngine) -> Declared:
    """Declare a dataset with FM `f`, whose outputs are fixed."""
    declared = Declared(settings, client, dataset=dataset)
    declared.declare_fm("f")
    changes = {"outputs": engine.manifest.outputs.columns(), "snapshots": ("s1",)}
    declared.registry.change(fm_field(dataset, "f"), FmRecord, lambda old: old.model_copy(update=changes))
    return declared


def loaded_for(declared: Declared, engine: TorchEngine) -> Loaded:
    """Give snapshot s1 as a lane of consumer `w` has it."""
    publisher = Publisher(
        dataset=declared.dataset, fm="f", consumer="w", snapshot_id="s1", snapshot_number=0, trained_through_us=0,
        generation=0, epoch=1, ttl_seconds=3600, outputs=engine.manifest.outputs.columns(),
        has_msetex=has_msetex(declared.client),
    )  # fmt: skip
    return Loaded(engine=engine, publisher=publisher, spec=declared.spec)


@contextlib.contextmanager
def at_work(declared: Declared, engine: TorchEngine, kind: type[Lane] = Lane) -> Iterator[Lane]:
    """Run the lane of FM `f`; in the end it works off what lies in the log."""
    context = RoleContext(
        declared.settings, role="worker", instance="w", client=declared.client, metrics=Metrics("worker")
    )
    lane = kind(context, dataset=declared.dataset, fm="f", partitions=declared.spec.partitions)
    lane.loaded = loaded_for(declared, engine)
    threads = [threading.Thread(target=target) for target in (lane.read_until_stopped, lane.score_until_stopped)]
    for thread in threads:
        thread.start()
    try:
        yield lane
        deadline = time.monotonic() + 60
        while declared.pending("f"):
            assert time.monotonic() < deadline
    finally:
        context.stopping.set()
        for thread in threads:
            thread.join(30)
