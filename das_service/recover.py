"""`das recover`: begin a later epoch after the server lost its logs, or part of them.

What the tables hold and what the surviving logs hold is kept: the sink commits surviving entries of the old epoch,
then goes on with the new one. What was acknowledged and is in neither is given up, and said. Which log positions an
FM's outcomes may be missing of is written down; the sink looks them up and feeds them (sink/rescore_plan.py).

Order: registry, server, reaches, and last logs.json, whose epoch makes the logs usable again. Until then every role
refuses them, so that recovery may be cut anywhere and run again. Of two at once, in whatever kind of store, one raises
the epoch that both saw, and the other gives up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import redis

from das_service.errors import ConflictError, UnavailableError
from das_service.folder import Folder
from das_service.logs.backlog import read_ranges
from das_service.logs.records import (
    EXAMPLES,
    LogsFile,
    Mark,
    fm_logs,
    read_logs_file,
    read_mark,
    rescore_log,
    table_of_log,
    write_logs_file,
)
from das_service.logs.streams import (
    NOT_COUNTED,
    LogCounters,
    LogProblem,
    check_logs,
    raise_generation,
    read_counters,
    show_planned,
)
from das_service.redis_client import connect, run_script
from das_service.registry import Catalog, FmRecord, Registry, parse_catalog, read_revision
from das_service.settings import Settings
from das_service.sink.rescore import keep_starts
from das_service.sink.rescore_plan import Loss, Reach, write_loss
from das_service.tables.offline_store import TableReader, table_place
from schemas import keys
from schemas.entries import Position, parse_position

_REPORT_ENTRIES = 16  # read at once, whole: each may have 4 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class LogReport:
    """What became of one log of a partition. Entry ids; None: there is none."""

    dataset: str
    partition: int
    log: str
    problem: str
    committed: str | None
    server_had: str | None
    surviving_entries: int

    def __str__(self) -> str:
        return (
            f"{self.dataset}/{self.partition} {self.log}: {self.problem}; the table has it up to "
            f"{self.committed or 'nothing'}, the server had it up to {self.server_had or 'nothing'}, "
            f"{self.surviving_entries} entries survive there"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a recovery found and did.

    epochs: the new one of each dataset. rescoring: per FM how many event days are to be looked through.
    """

    registry_restored: bool
    epochs: dict[str, int]
    logs: tuple[LogReport, ...]
    rescoring: dict[str, int]

    def __str__(self) -> str:
        lines = ["the registry was restored from its copy"] if self.registry_restored else []
        lines += [f"dataset {dataset} goes on in epoch {epoch}" for dataset, epoch in self.epochs.items()]
        lines += [str(report) for report in self.logs]
        lines += [f"FM {fm}: {days} event days are looked through again" for fm, days in self.rescoring.items()]
        lines.append("acknowledged rows that neither the tables nor a surviving log has are given up")
        return "\n".join(lines)


def recover(settings: Settings) -> Report:
    """Begin a later epoch of every dataset whose logs are lost or rewound, and give what was found.

    Raises:
        ConflictError: Nothing is lost (nothing_lost), or another recovery is at work (busy).
        redis.exceptions.ConnectionError: The server is not there.
    """
    client = connect(settings)
    folder = Folder(settings.tables_uri, settings.storage_options)
    registry = Registry(client, folder)
    restored = _restore_registry(client, registry)
    catalog = parse_catalog(registry.read_copy())
    problems = {dataset: check_logs(client, folder, dataset) for dataset in catalog.datasets}
    damaged = sorted(dataset for dataset, found in problems.items() if found)
    if not restored and not damaged:
        raise ConflictError("the server has all that the tables say it must have", code="nothing_lost")
    epochs: dict[str, int] = {}
    reports: list[LogReport] = []
    rescoring: dict[str, int] = {}
    for dataset in damaged:
        recovery = _DatasetRecovery(client, folder, catalog, dataset)
        reports += recovery.report(problems[dataset])
        rescoring |= recovery.run()
        epochs[dataset] = recovery.epoch
    return Report(registry_restored=restored, epochs=epochs, logs=tuple(reports), rescoring=rescoring)


def _restore_registry(client: redis.Redis, registry: Registry) -> bool:
    try:
        registry.check()
    except UnavailableError:
        fields = registry.read_copy()
        revision = int(fields["revision"]) + 1
        pipeline = client.pipeline(transaction=True)
        pipeline.delete(keys.REGISTRY)
        pipeline.hset(keys.REGISTRY, mapping={**fields, "revision": str(revision)})
        pipeline.execute()
        registry.copy()
        return read_revision(client) == revision
    return False


class _DatasetRecovery:
    """The recovery of one dataset. epoch: the one that begins."""

    def __init__(self, client: redis.Redis, folder: Folder, catalog: Catalog, dataset: str) -> None:
        recorded = read_logs_file(folder, dataset)
        if recorded is None:
            raise ConflictError(f"dataset {dataset} has no record of its logs", code="nothing_lost")
        self._client = client
        self._folder = folder
        self._dataset = dataset
        self._recorded: LogsFile = recorded
        self._fms: dict[str, FmRecord] = catalog.fms.get(dataset, {})
        self._partitions = range(recorded.partitions)
        self._before = read_counters(client, dataset, self._partitions, recorded.logs)
        self._epochs = [client.hget(keys.counters(dataset, p), "epoch") or b"" for p in self._partitions]
        marks = [read_mark(folder, dataset, table) for table in map(table_of_log, recorded.logs) if table is not None]
        known = [recorded.epoch, *(int(seen) for seen in self._epochs if seen), *(mark.epoch for mark in marks if mark)]
        self.epoch = 1 + max(known)

    def report(self, problems: Sequence[LogProblem]) -> list[LogReport]:
        """Give what is wrong with each log, and what of it is left."""
        return [self._report_log(problem, self._before.get((problem.partition, problem.log))) for problem in problems]

    def run(self) -> dict[str, int]:
        """Make the logs usable in the new epoch; give how many event days each FM is to look through again."""
        losses = {fm: self._loss(fm) for fm in self._fms}
        for partition in self._partitions:
            self._make_logs(partition)
        examples = TableReader(table_place(self._folder, self._dataset, EXAMPLES))
        examples.refresh()
        touched = {}
        for fm, record in self._fms.items():
            self._make_groups(fm, record)
            write_loss(self._folder, self._dataset, fm, losses[fm])
            show_planned(self._client, self._dataset, fm, [NOT_COUNTED] * len(self._partitions))
            touched[f"{self._dataset}/{fm}"] = len(losses[fm].touched(examples.days))
        with self._folder.locked(f"{self._dataset}/_das/logs.json"):
            if read_logs_file(self._folder, self._dataset) != self._recorded:
                raise self._overtaken()
            write_logs_file(self._folder, self._dataset, replace(self._recorded, epoch=self.epoch))
        return touched

    def _overtaken(self) -> ConflictError:
        return ConflictError(
            f"another `das recover` is at work on dataset {self._dataset}: wait until it has ended; if `das status` "
            "still says then that a log is lost or rewound, run it again",
            code="busy",
        )

    def _report_log(self, problem: LogProblem, found: LogCounters | None) -> LogReport:
        table = table_of_log(problem.log)
        mark: Mark | None = None if table is None else read_mark(self._folder, self._dataset, table)
        committed = None if mark is None else mark.positions.get(problem.partition)
        had = None if found is None or found.last < 0 else Position(epoch=found.epoch, seq=found.last)
        name = keys.log(self._dataset, problem.partition, problem.log)
        start = "-" if committed is None else f"({committed.entry_id}"
        surviving = 0
        while entries := self._client.xrange(name, min=start, max="+", count=_REPORT_ENTRIES):
            surviving += len(entries)
            start = f"({entries[-1][0].decode()}"
        return LogReport(
            dataset=self._dataset,
            partition=problem.partition,
            log=problem.log,
            problem=f"{problem.code}, {problem.detail}",
            committed=None if committed is None else committed.entry_id,
            server_had=None if had is None else had.entry_id,
            surviving_entries=surviving,
        )

    def _make_logs(self, partition: int) -> None:
        counters = keys.counters(self._dataset, partition)
        kinds = sorted({*self._recorded.logs, *(kind for fm in self._fms for kind in fm_logs(fm))})
        logs = [keys.log(self._dataset, partition, kind) for kind in kinds]
        epochs = [self.epoch, self._epochs[partition]]
        if not run_script(self._client, "raise_epoch", [counters, *logs], [*epochs, *kinds]):
            raise self._overtaken()
        for kind in kinds:
            names = [counters, keys.log(self._dataset, partition, kind)]
            run_script(self._client, "create_log", names, [kind, self.epoch])

    def _make_groups(self, fm: str, record: FmRecord) -> None:
        """Give an FM the groups that are missing, from the beginning of what there is, and its generation."""
        starts = keep_starts(self._client, self._folder, self._dataset, len(self._partitions), fm)
        for partition in self._partitions:
            counters = keys.counters(self._dataset, partition)
            start = starts.get(partition, Position(epoch=1, seq=0)).entry_id
            for kind in (EXAMPLES, rescore_log(fm)):
                name = keys.log(self._dataset, partition, kind)
                names = [counters, name, keys.generation(self._dataset, partition, fm)]
                place = self._before_first(name)
                run_script(self._client, "create_group", names, [keys.group(fm), fm, kind, place, start])
        raise_generation(
            self._client, self._dataset, partitions=len(self._partitions), fm=fm, generation=record.generation
        )  # fmt: skip

    def _before_first(self, name: str) -> str:
        """Give the place before the first entry that a log holds."""
        first = self._client.xrange(name, count=1)
        at = parse_position(first[0][0]) if first else None
        return "0" if at is None or at.seq == 0 else Position(epoch=at.epoch, seq=at.seq - 1).entry_id

    def _loss(self, fm: str) -> Loss:
        """Give which examples no log brings to the FM any more; asked before anything is changed."""
        starts = keep_starts(self._client, self._folder, self._dataset, len(self._partitions), fm)
        end = Position(epoch=self.epoch, seq=0).number
        reaches = []
        for partition in self._partitions:
            start = starts.get(partition, Position(epoch=1, seq=0)).number
            reaches.append(Reach(start=start, end=end, pending=tuple(self._still_to_come(partition, fm))))
        return Loss(epoch=self.epoch, reaches=tuple(reaches))

    def _still_to_come(self, partition: int, fm: str) -> list[tuple[int, int]]:
        """Give the log positions of the surviving examples log that the FM has not finished; all if it has no group."""
        name = keys.log(self._dataset, partition, EXAMPLES)
        first, last = self._client.xrange(name, count=1), self._client.xrevrange(name, count=1)
        if not first or not last:
            return []
        bounds = parse_position(first[0][0]).number, parse_position(last[0][0]).number
        ranges = read_ranges(self._client, self._dataset, partition, EXAMPLES, keys.group(fm), last=bounds[1])
        return [bounds] if ranges is None else ranges
