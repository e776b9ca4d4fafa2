"""The API's background look at everything that it depends on, once a second; what it finds decides admission.

Two threads: one beats, so that peers see this process; one looks. The death of either ends the process. Requests read
the newest `Findings`; nothing here waits for a request, and no request waits for a look.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import redis

from das_service.beats import BEAT_SECONDS, Observer, Peer, beat, forget, reachable_url
from das_service.errors import DasError, DiskReserveError, OverloadedError, UnavailableError
from das_service.folder import Folder, free_bytes
from das_service.logs.backlog import DatasetBacklog, log_kinds, read_backlog, read_oldest
from das_service.logs.log_guard import CatalogCache, LogGuard, Verdict
from das_service.metrics import Metrics
from das_service.redis_client import UNREACHABLE, durability_problems
from das_service.registry import Catalog
from das_service.role import exit_now
from das_service.settings import Settings

log = logging.getLogger("das.monitor")

LOOK_SECONDS = 1.0
DURABILITY_SECONDS = 60.0
OLDEST_SECONDS = 5.0
STALE_SECONDS = 5.0
PEER_DEAD_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the last look found. looked_at: monotonic seconds; unreachable: why there was no look, '' if there was."""

    looked_at: float
    unreachable: str = ""
    peers: Mapping[str, Peer] = field(default_factory=dict)
    verdict: Verdict | None = None
    catalog: Catalog | None = None
    durability_problems: tuple[str, ...] | None = None
    disk_problem: str = ""
    memory_ratio: float | None = None
    backlogs: Mapping[str, DatasetBacklog] = field(default_factory=dict)


class Monitor:
    """Owns the two threads and the newest findings. `probe` is a client of their own."""

    def __init__(
        self, settings: Settings, *, probe: redis.Redis, guard: LogGuard, metrics: Metrics, instance: str
    ) -> None:
        self._settings = settings
        self._probe = probe
        self._guard = guard
        self._metrics = metrics
        self._instance = instance
        self._cache = CatalogCache(probe, guard)
        self._observer = Observer(dead_after_seconds=min(PEER_DEAD_SECONDS, settings.dead_after_seconds))
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._durability_at = self._oldest_at = -1e9
        self._oldest: dict[str, dict[str, int]] = {}
        self.findings = Findings(looked_at=time.monotonic(), unreachable="the first look is not over")

    def start(self) -> None:
        """Look once, then start the threads."""
        self.look()
        for name, target in (("monitor", self._look_until_stopped), ("beat", self._beat_until_stopped)):
            thread = threading.Thread(target=self._guarded, args=(name, target), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End the threads and say goodbye to the peers."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(5.0)
        try:
            forget(self._probe, self._instance)
        except UNREACHABLE:
            log.warning("the server can't be reached to say goodbye")

    def look(self) -> None:
        """Look at everything once, and set `findings`."""
        now = time.monotonic()
        try:
            self.findings = self._look(now)
        except UNREACHABLE as error:
            self._durability_at = -1e9
            self.findings = replace(
                self.findings, looked_at=now, unreachable=str(error).split("\n", 1)[0] or type(error).__name__
            )
        except (DasError, OSError, redis.exceptions.ResponseError) as error:
            self.findings = replace(self.findings, looked_at=now, unreachable=str(error))
        self._set_gauges(self.findings)

    def _look(self, now: float) -> Findings:
        peers = self._observer.look(self._probe, now=now)
        verdict = self._guard.look()
        durability = self.findings.durability_problems
        if durability is None or now - self._durability_at >= DURABILITY_SECONDS:
            durability = tuple(durability_problems(self._probe))
            self._durability_at = now
        catalog = None if verdict.registry_error else self._cache.current()
        backlogs = {}
        if catalog is not None:
            for dataset in catalog.datasets:
                backlogs[dataset] = read_backlog(self._probe, catalog, dataset, verdict.floors.get(dataset))
            self._look_at_oldest(catalog, now)
        return Findings(
            looked_at=now,
            peers=peers,
            verdict=verdict,
            catalog=catalog,
            durability_problems=durability,
            disk_problem=disk_problem(self._settings),
            memory_ratio=memory_ratio(self._probe),
            backlogs={
                dataset: replace(backlog, oldest_us=self._oldest.get(dataset, {}))
                for dataset, backlog in backlogs.items()
            },
        )

    def _look_at_oldest(self, catalog: Catalog, now: float) -> None:
        if now - self._oldest_at < OLDEST_SECONDS:
            return
        self._oldest_at = now
        self._oldest = {
            dataset: read_oldest(self._probe, dataset, spec.partitions, log_kinds(catalog, dataset))
            for dataset, spec in catalog.datasets.items()
        }

    def _set_gauges(self, findings: Findings) -> None:
        mode = self._settings.durability if not findings.durability_problems else "weaker"
        for each in ("fsync", "relaxed", "weaker", "unknown"):
            known = "unknown" if findings.durability_problems is None else mode
            self._metrics.durability.labels(each).set(1 if each == known else 0)
        now_us = time.time_ns() // 1000
        for dataset, backlog in findings.backlogs.items():
            for kind, num_bytes in backlog.kept_bytes.items():
                self._metrics.backlog_bytes.labels(dataset, kind).set(num_bytes)
                taken_us = backlog.oldest_us.get(kind)
                age = 0.0 if taken_us is None else max(0.0, (now_us - taken_us) / 1e6)
                self._metrics.oldest_age_seconds.labels(dataset, kind).set(age)
            for (kind, reader), entries in backlog.unfinished.items():
                self._metrics.backlog_entries.labels(dataset, kind, reader).set(entries)
        if findings.catalog is not None:
            self._set_snapshot_gauges(findings.catalog)

    def _set_snapshot_gauges(self, catalog: Catalog) -> None:
        self._metrics.snapshot.clear()
        for dataset, record in catalog.iter_fms():
            for snapshot_id in catalog.snapshots.get(dataset, {}).get(record.fm, {}):
                state = catalog.snapshot(dataset, record.fm, snapshot_id).state
                self._metrics.snapshot.labels(dataset, record.fm, snapshot_id, state).set(1)

    def _look_until_stopped(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            self.look()

    def _beat_until_stopped(self) -> None:
        count = 0
        host, _, port = self._settings.bind.rpartition(":")
        probe_url = reachable_url(host, int(port)) if int(port) else self._settings.api_url
        info = {"restarts": self._settings.restarts, "probe_url": probe_url}
        while True:
            count += 1
            try:
                beat(self._probe, self._instance, role="api", count=count, info=info)
            except (*UNREACHABLE, redis.exceptions.ResponseError):
                log.warning("the server can't take a beat")
            if self._stopping.wait(BEAT_SECONDS):
                return

    def _guarded(self, name: str, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException:
            log.exception("thread %s of the API died; the process ends", name)
            exit_now(1)


def disk_problem(settings: Settings) -> str:
    """Give which disk has less free than the reserve, '' if none."""
    tables = Folder(settings.tables_uri).path
    for what, path in (("the tables", tables), ("the server's log", settings.log_folder)):
        if path is not None and (free := free_bytes(path)) < settings.disk_reserve_bytes:
            return f"the disk of {what} ({path}) has {free} free bytes; {settings.disk_reserve_bytes} are the reserve"
    return ""


def memory_ratio(client: redis.Redis) -> float | None:
    """Give the used share of maxmemory, None if there is no maxmemory."""
    memory = client.info("memory")
    limit = int(memory.get("maxmemory", 0))
    return int(memory["used_memory"]) / limit if limit else None


def refuse_ingest(findings: Findings, settings: Settings, dataset: str) -> None:
    """Raise if rows can't be taken now, with the reason that an operator would want to read.

    Raises:
        UnavailableError: not_durable: the server may lose what it acknowledges.
        DiskReserveError: Too little disk is free.
        OverloadedError: memory or backlog, naming what holds things up.
    """
    if findings.unreachable:
        raise UnavailableError(f"the server or the tables' folder can't be used: {findings.unreachable}")
    if settings.durability == "fsync" and findings.durability_problems:
        raise UnavailableError(
            f"the server may lose what it acknowledges: {'; '.join(findings.durability_problems)}. Mend that, or set "
            "DAS_DURABILITY=relaxed to accept it",
            code="not_durable",
            retry_after_seconds=30,
        )
    if findings.disk_problem:
        raise DiskReserveError(findings.disk_problem)
    backlog = findings.backlogs.get(dataset)
    if findings.memory_ratio is not None and findings.memory_ratio > settings.max_memory_ratio:
        holder = "" if backlog is None else f"; {backlog.holder()}"
        raise OverloadedError(
            f"the online store uses {findings.memory_ratio:.0%} of its maxmemory, ingest stops at "
            f"{settings.max_memory_ratio:.0%}{holder}",
            code="memory",
            retry_after_seconds=5,
        )
    if backlog is not None and backlog.total_bytes > settings.max_backlog_bytes:
        raise OverloadedError(
            f"the logs of dataset {dataset!r} hold {backlog.total_bytes} bytes, {settings.max_backlog_bytes} are "
            f"allowed; {backlog.holder()}",
            retry_after_seconds=2,
        )
