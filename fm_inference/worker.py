"""The worker role: one process per device, a lane per FM, engines that follow the registry without a restart.

Stateless: what it holds is pending in the logs. The manager thread alone loads engines and starts lanes; the validator
thread runs new snapshots in a child process first.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis

from das_service.beats import Observer, instance_name
from das_service.errors import DasError
from das_service.folder import Folder
from das_service.logs.records import read_logs_file
from das_service.logs.streams import raise_generation
from das_service.metrics import Metrics
from das_service.redis_client import UNREACHABLE, connect, has_msetex
from das_service.registry import Catalog, FmRecord, Registry, SnapshotRecord, read_catalog, read_revision
from das_service.role import RoleContext, run_role
from das_service.settings import Settings
from das_service.snapshot_folder import SnapshotError
from fm_inference.engine import MACHINE_ERRORS, TorchEngine
from fm_inference.lane import Lane, Loaded, Peers, refusal
from fm_inference.publishing import Publisher, microseconds
from fm_inference.repository import Repository
from fm_inference.shadow import Shadow
from fm_inference.validator import Machine, Validator

log = logging.getLogger("das.worker")
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0
_RETRY_LOAD_SECONDS = 5.0
_STUCK_SECONDS = 120.0
_GIVE_WAY_SECONDS = 0.0002


class Worker:
    """Keeps a lane for each declared FM and gives it the active snapshot."""

    def __init__(self, context: RoleContext) -> None:
        settings = context.settings
        self._context = context
        self._tables = Folder(settings.tables_uri, settings.storage_options)
        self._repository = Repository(Folder(settings.snapshots_uri, settings.storage_options))
        machine = Machine(
            instance=context.instance, device=settings.device, bf16=settings.bf16, is_stopping=context.stopping.is_set
        )
        probe = Registry(connect(settings), self._tables)
        registry = Registry(connect(settings, on_connect=probe.check), self._tables)
        self._validator = Validator(registry, self._repository, machine, self._tables)
        self._observer = Observer(dead_after_seconds=settings.dead_after_seconds)
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._failures: dict[tuple[str, str], tuple[float, str]] = {}
        self._shadow_failures: dict[tuple[str, str], tuple[float, str]] = {}
        self._peers = Peers(by_instance={}, trust_absence=False)
        self._catalog: Catalog | None = None
        self._away = ""
        self._started_at = time.monotonic()
        self._dead: list[str] = []
        self._has_msetex: bool | None = None
        self._changed = threading.Event()

    # ---- what others see

    def problems(self) -> list[str]:
        """Give what keeps this worker from scoring, in plain words."""
        found = [f"thread {name} died; the process ends" for name in self._dead]
        found += [self._away] if self._away else []
        found += [f"{lane.name}: {lane.halted}" for lane in list(self._lanes.values()) if lane.halted]
        found += list(self._stuck_lanes())
        found += [f"{dataset}/{fm}: {reason}" for (dataset, fm), (_, reason) in list(self._failures.items())]
        return found

    def notices(self) -> list[str]:
        """Give what is wrong and keeps no row from being scored: the troubles of shadows, in plain words."""
        lanes = list(self._lanes.values())
        found = [f"{lane.name}: {lane.shadower.problem}" for lane in lanes if lane.shadower.problem]
        return found + [f"{dataset}/{fm}: {why}" for (dataset, fm), (_, why) in list(self._shadow_failures.items())]

    def _stuck_lanes(self) -> Iterator[str]:
        now = time.monotonic()
        for lane in list(self._lanes.values()):
            since = lane.busy_since
            if since is not None and now - since > _STUCK_SECONDS:
                yield f"{lane.name}: the model has been at one batch for {now - since:.0f} s"

    def info(self) -> dict[str, Any]:
        """Give what goes into the beats."""
        lanes = {
            lane.name: {
                "snapshot": lane.loaded.publisher.snapshot_id if lane.loaded else None,
                "device": str(lane.loaded.engine.device) if lane.loaded else None,
                "shadow": lane.shadower.shadow.publisher.snapshot_id if lane.shadower.shadow else None,
                "rows_scored": lane.rows_scored,
                "halted": lane.halted,
            }
            for lane in list(self._lanes.values())
        }
        return {"fms": sorted(lanes), "lanes": lanes, "problems": self.problems(), "notices": self.notices()}

    # ---- manager thread

    def manage_until_stopped(self) -> None:
        """Follow the registry: start lanes, load engines, lift halts; watch the peers.

        Raises:
            RuntimeError: A lane's thread died.
        """
        looked_at = 0.0
        while not self._context.stopping.is_set():
            try:
                if time.monotonic() - looked_at >= _LOOK_SECONDS:
                    looked_at = time.monotonic()
                    self._look()
                self._follow()
                self._away = ""
            except UNREACHABLE as error:
                self._away = f"the server can't be reached ({error})"
            except (redis.exceptions.ResponseError, OSError) as error:
                self._away = f"the server or the tables' folder can't be used ({error})"
            except DasError as error:
                self._away = error.detail
            self._changed.wait(_POLL_SECONDS)
            self._changed.clear()
        self._join_lanes()
        self._repository.close()
        if self._dead:
            raise RuntimeError(f"thread {self._dead[0]} died")

    def _look(self) -> None:
        now = time.monotonic()
        by_instance = self._observer.look(self._context.client, now=now)
        watched_enough = now - self._started_at > 2 * self._context.settings.dead_after_seconds
        self._peers = Peers(by_instance=by_instance, trust_absence=watched_enough, looked_at=now)
        for lane in self._lanes.values():
            lane.peers = self._peers
        if any(lane.halted for lane in self._lanes.values()):
            self._catalog = read_catalog(self._context.client)
            for lane in self._lanes.values():
                self._lift_halt(self._catalog, lane)
        if self._catalog is not None:
            self._repository.keep(self._at_work(self._catalog))

    def _lift_halt(self, catalog: Catalog, lane: Lane) -> None:
        if not lane.halted or refusal(self._context.client, self._tables, lane.dataset):
            return
        self._load(catalog, lane.dataset, catalog.fm(lane.dataset, lane.fm), again=True)
        lane.resume()

    def _at_work(self, catalog: Catalog) -> list[SnapshotRecord]:
        """Give the snapshots that score, or that shall."""
        found = []
        for (dataset, fm), lane in self._lanes.items():
            record = catalog.fms.get(dataset, {}).get(fm)
            wanted = {lane.loaded.publisher.snapshot_id if lane.loaded else None}
            wanted |= {record.active, record.shadow} if record else set()
            records = catalog.snapshots.get(dataset, {}).get(fm, {})
            found += [records[snapshot_id] for snapshot_id in wanted if snapshot_id in records]
        return found

    def _follow(self) -> None:
        if self._catalog is None or read_revision(self._context.client) != self._catalog.revision:
            self._catalog = read_catalog(self._context.client)
        for dataset, record in self._catalog.iter_fms():
            if dataset not in self._catalog.datasets:  # others must not wait for it
                continue
            if (dataset, record.fm) not in self._lanes:
                self._start_lane(self._catalog, dataset, record.fm)
            self._load(self._catalog, dataset, record, again=False)
        for dataset, record in self._catalog.iter_fms():  # later: what scores for all comes first
            if (dataset, record.fm) in self._lanes:
                self._load_shadow(self._catalog, dataset, record)

    def _start_lane(self, catalog: Catalog, dataset: str, fm: str) -> None:
        partitions = catalog.spec(dataset).partitions
        lane = Lane(self._context, dataset=dataset, fm=fm, partitions=partitions, hurry=self._changed.set)
        lane.peers = self._peers
        self._lanes[dataset, fm] = lane
        targets = {
            "read": lane.read_until_stopped,
            "score": lane.score_until_stopped,
            "shadow": lane.shadower.score_until_stopped,
        }
        for name, target in targets.items():
            thread = threading.Thread(target=self._guard, args=(lane, target), name=f"{name} {lane.name}", daemon=True)
            lane.threads.append(thread)
            thread.start()

    def _guard(self, lane: Lane, target: Callable[[], None]) -> None:
        """Run a lane's thread; its end ends the process, also while the manager is loading a model for minutes."""
        try:
            target()
            is_dead = not lane.is_stopping()
        except BaseException:
            log.exception("%s: a thread died", lane.name)
            is_dead = True
        if is_dead:
            self._dead.append(threading.current_thread().name)
            self._context.stopping.set()

    def _join_lanes(self) -> None:
        deadline = time.monotonic() + self._context.settings.drain_seconds
        for lane in self._lanes.values():
            for thread in lane.threads:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _load(self, catalog: Catalog, dataset: str, record: FmRecord, *, again: bool) -> None:
        """Give the lane what the registry says is active; the one in use stays until the new one is warm."""
        lane = self._lanes[dataset, record.fm]
        key, now = (dataset, record.fm), time.monotonic()
        failed_at, _ = self._failures.get(key, (-_RETRY_LOAD_SECONDS, ""))
        if record.active is None or now - failed_at < _RETRY_LOAD_SECONDS:
            return
        logs = read_logs_file(self._tables, dataset) if lane.loaded is None or again else None
        epoch = logs.epoch if logs is not None else (lane.loaded.publisher.epoch if lane.loaded else None)
        if epoch is None:
            return
        wanted = self._publisher(catalog, dataset, record, record.active, epoch)
        if again or lane.loaded is None or lane.loaded.publisher.generation != wanted.generation:
            self._raise_generation(catalog, dataset, record)
        if lane.loaded is not None and (lane.loaded.publisher, lane.loaded.spec) == (wanted, catalog.spec(dataset)):
            return
        try:
            engine = self._engine(catalog, dataset, record, lane)
        except (SnapshotError, *MACHINE_ERRORS) as error:
            self._failures[key] = (now, f"snapshot {record.active} can't be loaded: {error}")
            log.warning("%s: %s", lane.name, self._failures[key][1])
            return
        self._failures.pop(key, None)
        at_work = self._context.metrics.worker_snapshot
        if lane.loaded is not None and lane.loaded.publisher.snapshot_id != record.active:
            lane.former = lane.loaded
            at_work.remove(*key, lane.former.publisher.snapshot_id)
        lane.loaded = Loaded(engine=engine, publisher=wanted, spec=catalog.spec(dataset))
        at_work.labels(*key, record.active).set(1)
        log.info("%s: snapshot %s is at work on %s", lane.name, record.active, engine.device)

    def _load_shadow(self, catalog: Catalog, dataset: str, record: FmRecord) -> None:
        """Give the lane the shadow that the registry names, once an active snapshot is at work; failing is no trouble.

        It takes the place of the former snapshot that is kept warm for a roll-back: no more than two are at rest.
        One that ended is let go of at once; one that is activated hands its engine on (`_engine`).
        """
        lane, key, now = self._lanes[dataset, record.fm], (dataset, record.fm), time.monotonic()
        shadower, loaded = lane.shadower, lane.loaded
        if lane.former is not None and (record.shadow or lane.former.publisher.snapshot_id in record.retired):
            lane.former = None
        if record.shadow is None or loaded is None:
            shadower.shadow, shadower.problem = None, ""
            self._shadow_failures.pop(key, None)
            return
        failed_at, _ = self._shadow_failures.get(key, (-_RETRY_LOAD_SECONDS, ""))
        wanted = self._publisher(catalog, dataset, record, record.shadow, loaded.publisher.epoch)
        present = shadower.shadow
        is_there = present is not None and (present.publisher, present.share) == (wanted, record.shadow_share)
        if is_there or now - failed_at < _RETRY_LOAD_SECONDS:
            return
        try:
            if present is None or present.publisher.snapshot_id != record.shadow:
                shadower.shadow = None  # else the one before would score on, and take the memory, while this one loads
                engine = self._load_engine(catalog, dataset, record.fm, record.shadow)
            else:
                engine = present.engine
        except (SnapshotError, *MACHINE_ERRORS) as error:
            why = f"snapshot {record.shadow} can't be loaded for the shadow: {error}"
            self._shadow_failures[key] = (now, why)
            log.warning("%s: %s", lane.name, why)
            return
        self._shadow_failures.pop(key, None)
        shadower.shadow = Shadow(engine=engine, publisher=wanted, share=record.shadow_share)
        log.info(
            "%s: snapshot %s scores %.2f of the examples in the shadow", lane.name, record.shadow, record.shadow_share
        )

    def _raise_generation(self, catalog: Catalog, dataset: str, record: FmRecord) -> None:
        """Let the server know the registry's generation: who raised that may have been cut, or the server rewound."""
        raise_generation(
            self._context.client, dataset, partitions=catalog.spec(dataset).partitions, fm=record.fm,
            generation=record.generation,
        )  # fmt: skip

    def _engine(self, catalog: Catalog, dataset: str, record: FmRecord, lane: Lane) -> TorchEngine:
        if lane.loaded is not None and lane.loaded.publisher.snapshot_id == record.active:
            return lane.loaded.engine
        for warm in (lane.former, lane.shadower.shadow):
            if warm is not None and warm.publisher.snapshot_id == record.active:
                return warm.engine
        lane.former = None  # two are at work while this one loads: a third might not fit
        return self._load_engine(catalog, dataset, record.fm, record.active or "")

    def _load_engine(self, catalog: Catalog, dataset: str, fm: str, snapshot_id: str) -> TorchEngine:
        settings = self._context.settings
        snapshot = catalog.snapshot(dataset, fm, snapshot_id)
        with _giving_way():
            return self._repository.load(snapshot, device=settings.device, bf16=settings.bf16)

    def _publisher(self, catalog: Catalog, dataset: str, record: FmRecord, snapshot_id: str, epoch: int) -> Publisher:
        snapshot = catalog.snapshot(dataset, record.fm, snapshot_id)
        if record.outputs is None or snapshot.trained_through is None:
            raise RuntimeError(f"{dataset}/{record.fm}: snapshot {snapshot_id} is at work and was never validated")
        return Publisher(
            dataset=dataset,
            fm=record.fm,
            consumer=self._context.instance,
            snapshot_id=snapshot.snapshot_id,
            snapshot_number=record.snapshots.index(snapshot.snapshot_id),
            trained_through_us=microseconds(snapshot.trained_through),
            generation=record.generation,
            epoch=epoch,
            ttl_seconds=catalog.spec(dataset).online_ttl_seconds,
            outputs=record.outputs,
            has_msetex=self._msetex(),
        )

    def _msetex(self) -> bool:
        if self._has_msetex is None:
            self._has_msetex = has_msetex(self._context.client)
        return self._has_msetex

    # ---- validator thread

    def validate_until_stopped(self) -> None:
        """Validate registered snapshots as they come."""
        while not self._context.stopping.is_set():
            catalog, found = self._catalog, False
            if catalog is not None:
                try:
                    found = self._validator.validate_next(catalog, self._peers.by_instance)
                except (redis.exceptions.RedisError, OSError) as error:
                    log.warning("the registry can't be changed to validate snapshots: %s", error)
                    found = True  # wait longer
                except DasError as error:
                    log.warning("%s", error.detail)
            if not found:
                self._context.stopping.wait(_POLL_SECONDS)
            else:  # let the manager see the new revision before looking again
                self._context.stopping.wait(2 * _POLL_SECONDS)


@contextmanager
def _giving_way() -> Iterator[None]:
    """Let the lanes have the interpreter at once, as long as this lasts: each of their many calls would wait for it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_GIVE_WAY_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def main(settings: Settings) -> int:
    """Run a worker until SIGTERM; give the exit code."""
    context = RoleContext(
        settings,
        role="worker",
        instance=instance_name(settings, "worker"),
        client=connect(settings),
        metrics=Metrics("worker"),
    )
    worker = Worker(context)
    threads = {"manager": worker.manage_until_stopped, "validator": worker.validate_until_stopped}
    return run_role(context, threads, health=worker.problems, info=worker.info)
