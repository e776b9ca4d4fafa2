"""The sink: the one process that moves the logs of all datasets into their tables, and frees the logs.

A second sink stands by and takes over when the owner's beat stands still. An owner that was thought dead and comes
back is refused by the tables, looks again, and stands by.
"""

import logging
import time
from typing import Any

import pyarrow as pa
import redis

from das_service.beats import instance_name
from das_service.errors import UnavailableError
from das_service.folder import Folder
from das_service.logs.records import read_logs_file
from das_service.metrics import Metrics
from das_service.redis_client import UNREACHABLE, connect
from das_service.registry import Catalog, Registry, read_catalog, read_revision
from das_service.role import RoleContext, run_role
from das_service.settings import Settings
from das_service.sink.dataset_sink import DatasetSink
from das_service.sink.feed import FeedWork
from das_service.sink.ownership import Ownership
from das_service.tables.duck import Duck

log = logging.getLogger("das.sink")
_POLL_SECONDS = 0.1
_TEND_SECONDS = 1.0
_DRAIN_SHARE = 0.7
_SILENT_SECONDS = 30.0
_THREADS = 2


class Sink:
    """The sink of one process. run() has the only thread that changes anything."""

    def __init__(self, context: RoleContext) -> None:
        settings = context.settings
        self._context = context
        self._folder = Folder(settings.tables_uri, settings.storage_options)
        self._duck = Duck(memory_bytes=settings.duckdb_memory_bytes, threads=_THREADS)
        self._work = FeedWork(
            client=context.client,
            folder=self._folder,
            duck=self._duck,
            settings=settings,
            metrics=context.metrics,
        )
        self._ownership = Ownership(
            context.client,
            role="sink",
            instance=context.instance,
            dead_after_seconds=settings.dead_after_seconds,
        )
        self._catalog: Catalog | None = None
        self._datasets: dict[str, DatasetSink] = {}
        self._registry_problem = ""
        self._stepped_at = time.monotonic()
        self._tended_at = float("-inf")
        self._problems: list[str] = ["starting"]
        self._info: dict[str, Any] = {}

    def run(self) -> None:
        """Work until the process shall stop, then make the last commits."""
        while not self._context.stopping.is_set():
            if not self.step(now=time.monotonic()):
                self._context.stopping.wait(_POLL_SECONDS)
        self.drain(deadline=time.monotonic() + _DRAIN_SHARE * self._context.settings.drain_seconds)
        self.close()

    def step(self, *, now: float) -> bool:
        """Do what is due; give whether commits were made, so that more may be due. now: monotonic seconds."""
        self._stepped_at = time.monotonic()
        try:
            is_tending = now - self._tended_at >= _TEND_SECONDS
            if is_tending:
                self._tended_at = now
                self._look(now)
            if not self._ownership.is_mine:
                return False
            busy = [dataset.turn(now=now) for dataset in self._datasets.values()]
            if is_tending:
                for dataset in self._datasets.values():
                    dataset.tend(now=now, is_busy=any(busy))
                self._report(now)
        except (*UNREACHABLE, redis.exceptions.ResponseError) as error:  # the latter: it is busy, or can't write
            return self._stand_still(f"the server can't be used: {error}")
        except OSError as error:
            return self._stand_still(f"the tables' folder can't be used: {error}")
        return any(busy)

    def _stand_still(self, problem: str) -> bool:
        """Say what keeps everything from being done; the next look tries again."""
        self._problems = [problem]
        log.warning("%s", problem)
        return False

    def drain(self, *, deadline: float) -> None:
        """Commit what still waits, until nothing does or the deadline (monotonic seconds) has come; then let go."""
        try:
            while self._ownership.is_mine and time.monotonic() < deadline:
                now = time.monotonic()
                busy = [dataset.turn(now=now, draining=True) for dataset in self._datasets.values()]
                if not any(busy):
                    break
            self._ownership.release()
        except (*UNREACHABLE, redis.exceptions.ResponseError):
            log.warning("the server can't be used for the last commit; the log keeps the rows")

    def close(self) -> None:
        """Free what the process holds."""
        self._duck.close()

    def health(self) -> list[str]:
        """Give what is wrong, in words; a sink that stands by is well."""
        silent_seconds = time.monotonic() - self._stepped_at
        if silent_seconds > _SILENT_SECONDS:
            return [f"the sink has been at one step for {silent_seconds:.0f} s", *self._problems]
        return list(self._problems)

    def info(self) -> dict[str, Any]:
        """Give what goes into the beats."""
        return dict(self._info)

    def _look(self, now: float) -> None:
        """See who owns the role, and what is declared."""
        was_mine = self._ownership.is_mine
        is_mine = self._ownership.look(now=now)
        if is_mine != was_mine:
            log.info("the owner of the tables is %s", self._ownership.owner)
            for dataset in self._datasets.values():
                dataset.close()
        if not is_mine:
            self._problems = []
            self._info = {"standby": True, "owner": self._ownership.owner}
            return
        revision = read_revision(self._context.client)
        is_new = self._catalog is None or self._catalog.revision != revision
        catalog = self._catalog
        if catalog is None or is_new or self._registry_problem:
            self._registry_problem = self._check_registry()
            catalog = read_catalog(self._context.client)
        self._refresh(catalog, is_new=is_new)
        self._catalog = catalog  # now that all datasets have taken it over: whatever came between is tried again

    def _check_registry(self) -> str:
        """Give what is wrong with the registry, in words: a server that came back empty declares nothing."""
        try:
            Registry(self._context.client, self._folder).check()
        except UnavailableError as error:
            log.warning("%s", error)
            return str(error)
        return ""

    def _refresh(self, catalog: Catalog, *, is_new: bool) -> None:
        for name, spec in catalog.datasets.items():
            dataset = self._datasets.get(name)
            if dataset is None:
                dataset = self._datasets[name] = DatasetSink(self._work, name, spec)
            if is_new or dataset.problems or not dataset.is_complete:
                dataset.refresh(catalog, read_logs_file(self._folder, name))

    def _report(self, now: float) -> None:
        found = [problem for dataset in self._datasets.values() for problem in dataset.problems]
        self._problems = [self._registry_problem, *found] if self._registry_problem else found
        self._info = {
            "standby": False,
            "datasets": {name: dataset.info(now=now) for name, dataset in self._datasets.items()},
        }


def main(settings: Settings) -> int:
    """Run the sink until it is told to stop or a thread of it dies; give the exit code."""
    pa.set_cpu_count(_THREADS)
    pa.set_io_thread_count(_THREADS)
    context = RoleContext(
        settings,
        role="sink",
        instance=instance_name(settings, "sink"),
        client=connect(settings),
        metrics=Metrics("sink"),
    )
    sink = Sink(context)
    return run_role(context, {"sink": sink.run}, health=sink.health, info=sink.info)
