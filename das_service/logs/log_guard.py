"""Whether the server still has what it acknowledged: looked at each second and on every new connection, before its use.

A server that came back empty, older or with a lost log gets nothing: one problem in any dataset, or a registry behind
its copy, stops all changes until a human ran `das recover`.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import redis

from das_service.errors import DasError, UnavailableError
from das_service.folder import Folder
from das_service.logs.records import DATASET_LOGS, read_logs_file, read_mark, table_of_log
from das_service.logs.streams import LogProblem, check_logs, refuse_problems
from das_service.registry import Catalog, Registry, asked_revision, parse_catalog, read_catalog, read_revision
from schemas.entries import Position

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """What an append to a dataset is checked against: epoch, logs, and per kind of log how far its table has it."""

    epoch: int
    logs: tuple[str, ...]
    positions: Mapping[str, Mapping[int, Position | None]]

    def committed(self, kind: str) -> dict[int, int]:
        """Give per partition the committed sequence number of this epoch, if there is one."""
        return {p: at.seq for p, at in self.positions[kind].items() if at is not None and at.epoch == self.epoch}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What one look found. registry_error: what is wrong with the registry; problems: with logs."""

    registry_error: UnavailableError | None
    problems: tuple[LogProblem, ...]
    floors: Mapping[str, Floor]

    def refuse_problems(self) -> None:
        """Raise for the first problem.

        Raises:
            UnavailableError: log_lost or log_rewound.
        """
        if self.registry_error is not None:
            raise _again(self.registry_error)
        refuse_problems(self.problems)


class LogGuard:
    """Keeps the newest verdict. `probe` is a client without this guard as its on_connect."""

    def __init__(self, probe: redis.Redis, folder: Folder) -> None:
        self._probe = probe
        self._folder = folder
        self._registry = Registry(probe, folder)
        self._lock = threading.Lock()
        self._looked_at = -1.0
        self._verdict: Verdict | None = None

    def look(self) -> Verdict:
        """Compare the server with what lies beside the tables, now.

        Raises:
            redis.exceptions.ConnectionError: The server is gone.
            OSError: The folder can't be read.
            UnavailableError: damaged: a file beside the tables can't be parsed.
        """
        wanted_at = time.monotonic()
        with self._lock:
            if self._verdict is None or self._looked_at < wanted_at:
                started_at = time.monotonic()
                try:
                    self._verdict = self._compare()
                except (ValueError, KeyError) as error:
                    raise UnavailableError(f"a file beside the tables is damaged: {error!r}", code="damaged") from error
                self._looked_at = started_at
            return self._verdict

    def refuse_connection(self) -> None:
        """Look, and raise if anything is wrong: for redis_client.connect(on_connect=...).

        Raises:
            UnavailableError: log_lost or log_rewound, or the folder can't be read.
        """
        self._look_or_refuse().refuse_problems()

    def floor(self, dataset: str) -> Floor:
        """Give what appends to a dataset are checked against.

        Raises:
            UnavailableError: log_lost or log_rewound, or the dataset's logs are not made yet.
        """
        verdict = self._verdict or self._look_or_refuse()
        verdict.refuse_problems()
        if dataset not in verdict.floors:
            verdict = self._look_or_refuse()
            verdict.refuse_problems()
        floor = verdict.floors.get(dataset)
        if floor is None:
            raise UnavailableError(f"the logs of dataset {dataset!r} are not made yet: PUT the dataset again")
        return floor

    def refuse_registry(self) -> None:
        """Raise if the server's registry was lost: snapshot numbers in online values would mean others.

        Raises:
            UnavailableError: log_lost or log_rewound.
        """
        verdict = self._verdict or self._look_or_refuse()
        if verdict.registry_error is not None:
            raise _again(verdict.registry_error)

    def _look_or_refuse(self) -> Verdict:
        try:
            return self.look()
        except OSError as error:
            raise UnavailableError(f"the tables' folder can't be read: {error}") from error

    def _compare(self) -> Verdict:
        try:
            self._registry.check()
        except UnavailableError as error:
            return Verdict(registry_error=error, problems=(), floors={})
        copied = parse_catalog(self._registry.read_copy())
        if copied.revision < read_revision(self._probe):  # whoever changed it was cut before it could copy
            self._registry.copy()
            copied = parse_catalog(self._registry.read_copy())
        problems, floors = [], {}
        for dataset in copied.datasets:
            problems += check_logs(self._probe, self._folder, dataset)
            floor = _read_floor(self._folder, dataset)
            if floor is not None:
                floors[dataset] = floor
        return Verdict(registry_error=None, problems=tuple(problems), floors=floors)


def _read_floor(folder: Folder, dataset: str) -> Floor | None:
    logs = read_logs_file(folder, dataset)
    if logs is None:
        return None
    marks = {kind: read_mark(folder, dataset, table_of_log(kind) or kind) for kind in DATASET_LOGS}
    positions = {kind: {} if mark is None else mark.positions for kind, mark in marks.items()}
    return Floor(epoch=logs.epoch, logs=logs.logs, positions=positions)


def _again(error: UnavailableError) -> UnavailableError:
    """Give a fresh exception of the same meaning: raising one object from many threads mixes their tracebacks."""
    return UnavailableError(error.detail, code=error.code)


class CatalogCache:
    """The registry as this process last read it; one small read tells whether it still holds."""

    def __init__(self, client: redis.Redis, guard: LogGuard) -> None:
        self._client = client
        self._guard = guard
        self._catalog: Catalog | None = None

    def current(self) -> Catalog:
        """Give the registry as it is now.

        Raises:
            UnavailableError: log_lost or log_rewound.
        """
        self._guard.refuse_registry()
        known = self._catalog
        revision = read_revision(self._client)
        if known is None or revision != known.revision:
            if known is not None and revision < known.revision:
                self._guard.look().refuse_problems()
            known = self._catalog = read_catalog(self._client)
        return known

    def use(self, function: Callable[[Catalog], _R]) -> tuple[Catalog, _R]:
        """Give the registry as it is now, and what the function makes of it.

        It works on what is known while the server is asked whether that still holds; if not, what it has made or raised
        is forgotten, and it is called again.

        Raises:
            UnavailableError: log_lost or log_rewound. And what the function raises, if what it was called with holds.
        """
        known = self._catalog
        if known is not None:
            self._guard.refuse_registry()
            with asked_revision(self._client) as revision:
                try:
                    made = function(known)
                except DasError:
                    if revision() == known.revision:
                        raise
                else:
                    if revision() == known.revision:
                        return known, made
                    del made  # else the caller would have two at once
        known = self.current()
        return known, function(known)

    def last(self) -> Catalog | None:
        """Give the registry as last read, None before the first time."""
        return self._catalog
