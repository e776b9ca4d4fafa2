"""Where every row is: `GET /v1/status`, and `das status`.

accepted = distinct + duplicates + conflicting + diverted + in_log, where in_log is what lies behind the table's
positions, and diverted what `dead_chunks` holds because the table would not take it. Per FM, scored and failed (and not
scored since) are what its tables hold; pending is what lies in its logs, scored or not, before that, and what it has
still to be fed from the examples table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import redis

from das_service.folder import Folder
from das_service.logs.backlog import Reader, Unfinished, read_unfinished, sum_unfinished
from das_service.logs.records import (
    EXAMPLES,
    Mark,
    dead_log,
    read_mark,
    rescore_log,
    scored_log,
    table_of_log,
    watermark_name,
)
from das_service.logs.streams import NOT_COUNTED, LogCounters, read_counters
from das_service.metrics import package_version
from das_service.registry import Catalog, FmRecord
from das_service.settings import Settings
from das_service.watch.monitor import Findings
from das_service.watch.readiness import readiness_problems, service_notices
from schemas import keys
from schemas.tables import CLOSED, LATE_LABELS

_NOTHING = Mark(version=-1, positions={})
_TRIES = 5


def service_status(findings: Findings, settings: Settings, *, now: float) -> dict[str, Any]:
    """Give the parts of the status that the monitor knows. now: monotonic seconds."""
    problems = readiness_problems(findings, settings, now=now)
    return {
        "version": package_version(),
        "durability": settings.durability,
        "ready": not problems,
        "problems": problems,
        "notices": service_notices(findings),
        "roles": roles(findings),
    }


def roles(findings: Findings) -> list[dict[str, Any]]:
    """Give the processes of the service; pid and restarts as their supervisor knows them, where there is one."""
    seen = [
        {
            "role": peer.role,
            "instance": peer.instance,
            "pid": peer.info.get("pid"),
            "restarts": peer.info.get("restarts", 0),
            "alive": peer.alive,
            "probe_url": peer.info.get("probe_url", ""),
        }
        for peer in sorted(findings.peers.values(), key=lambda peer: (peer.role, peer.instance))
        if peer.role != "supervisor"
    ]
    for peer in findings.peers.values():
        if peer.role == "supervisor" and peer.alive:
            for stated in peer.info.get("roles", ()):
                _merge(seen, stated)
    return seen


def _merge(seen: list[dict[str, Any]], stated: Mapping[str, Any]) -> None:
    """Let what a supervisor states of one of its processes stand over what that process said."""
    for entry in seen:
        if entry["role"] == stated.get("role") and entry["pid"] == stated.get("pid"):
            entry["restarts"] = stated.get("restarts", entry["restarts"])
            return
    # The server does not beat: that this answer could be made says that it lives.
    is_server = stated.get("role") == "valkey"
    instance = "valkey" if is_server else f"{stated.get('role')} (no beat)"
    alive = is_server and stated.get("pid") is not None
    seen.append({"instance": instance, "alive": alive, "probe_url": "", "restarts": 0, **stated})


def dataset_status(
    client: redis.Redis, tables: Folder, catalog: Catalog, dataset: str, *, now_us: int
) -> dict[str, Any]:
    """Give how far a dataset's rows are.

    Rows move on while they are counted, so each place is looked at before the one that they move to: marks, whose
    positions say where a table ends and its log begins, then plans, the logs that FMs read, and the logs that they
    write. A row may be counted in two places for a moment, never in none.
    """
    partitions = range(catalog.spec(dataset).partitions)
    fms = catalog.fms.get(dataset, {})
    look = _look(client, tables, dataset, partitions, list(fms))
    for _ in range(_TRIES):
        if look.is_one_moment:
            break
        look = _look(client, tables, dataset, partitions, list(fms))
    examples = look.marks[EXAMPLES]
    in_log = look.waiting[EXAMPLES].rows
    duplicates = examples.duplicates + sum(look.counters[p, EXAMPLES].repeated_rows for p in look.partitions(EXAMPLES))
    return {
        "dataset": dataset,
        "accepted": examples.rows + duplicates + examples.conflicting + examples.diverted + in_log,
        "distinct": examples.rows,
        "duplicates": duplicates,
        "conflicting": examples.conflicting,
        "diverted": examples.diverted,
        "in_log": in_log,
        **_closing_status(tables, dataset, partitions),
        "backlog_bytes": sum(counted.kept_bytes for counted in look.counters.values()),
        "fms": {record.fm: _fm_status(catalog, dataset, record, look, now_us) for record in fms.values()},
    }


def _closing_status(tables: Folder, dataset: str, partitions: range) -> dict[str, Any]:
    """Give how many rows are closed, how many labels came too late, and the lowest watermark, None before the first."""
    closed = read_mark(tables, dataset, CLOSED) or _NOTHING
    late = read_mark(tables, dataset, LATE_LABELS) or _NOTHING
    reached = [closed.numbers.get(watermark_name(partition)) for partition in partitions]
    known = [at for at in reached if at is not None]
    lowest = min(known) if len(known) == len(reached) else None
    return {
        "closed": closed.rows,
        "late_labels": late.rows,
        "watermark": None if lowest is None else datetime.fromtimestamp(0, UTC) + timedelta(microseconds=lowest),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """waiting: by kind, what the sink has not committed. unfinished: by FM, what it has not finished."""

    marks: Mapping[str, Mark]
    counters: Mapping[tuple[int, str], LogCounters]
    unfinished: Mapping[str, Unfinished]
    waiting: Mapping[str, Unfinished]

    @property
    def is_one_moment(self) -> bool:
        """Whether nothing was committed and freed between the look at the marks and that at the logs."""
        return all(work.follows for work in self.waiting.values())

    def partitions(self, kind: str) -> list[int]:
        """Give the partitions in which a kind of log exists."""
        return [partition for partition, name in self.counters if name == kind]

    def num_planned(self, fm: str) -> int:
        """Give how many rows an FM has still to be fed, NOT_COUNTED if that is not known."""
        kind = rescore_log(fm)
        planned = [self.counters[partition, kind].planned for partition in self.partitions(kind)]
        return NOT_COUNTED if NOT_COUNTED in planned else sum(planned)


def _look(client: redis.Redis, tables: Folder, dataset: str, partitions: range, fms: Sequence[str]) -> _Look:
    written = [EXAMPLES, *[kind for fm in fms for kind in (scored_log(fm), dead_log(fm))]]
    marks = {kind: read_mark(tables, dataset, table_of_log(kind) or kind) or _NOTHING for kind in written}
    counters = read_counters(client, dataset, partitions, [*written, *map(rescore_log, fms)])
    readers = [
        (fm, Reader(partition=p, kind=kind, group=keys.group(fm)))
        for fm in fms
        for kind in (EXAMPLES, rescore_log(fm))
        for p in partitions
    ]
    sinks = [Reader(partition=p, kind=kind, after=marks[kind].positions.get(p)) for kind in written for p in partitions]
    found = read_unfinished(client, dataset, [*[reader for _, reader in readers], *sinks])
    held, waiting = found[: len(readers)], found[len(readers) :]
    return _Look(
        marks=marks,
        counters=counters,
        unfinished={
            fm: sum_unfinished(work for (name, _), work in zip(readers, held, strict=True) if name == fm) for fm in fms
        },
        waiting={
            kind: sum_unfinished(work for sink, work in zip(sinks, waiting, strict=True) if sink.kind == kind)
            for kind in written
        },
    )


def _fm_status(catalog: Catalog, dataset: str, record: FmRecord, look: _Look, now_us: int) -> dict[str, Any]:
    fm, work = record.fm, look.unfinished[record.fm]
    active = catalog.snapshots.get(dataset, {}).get(fm, {}).get(record.active or "")
    scored_mark, dead_mark = look.marks[scored_log(fm)], look.marks[dead_log(fm)]
    scored, diverted = scored_mark.outcome_rows, scored_mark.diverted + dead_mark.diverted
    failed = max(0, dead_mark.rows - dead_mark.mended - scored_mark.mended)
    pending = look.waiting[scored_log(fm)].rows + look.waiting[dead_log(fm)].rows + work.rows
    planned = look.num_planned(fm)
    if planned == NOT_COUNTED:  # what was lost is not known yet: it is among what has no outcome
        pending = max(pending, look.marks[EXAMPLES].rows - scored - failed - diverted)
    else:
        pending += planned
    total = scored + failed + pending + diverted
    return {
        "fm": fm,
        "required": record.required,
        "active": record.active,
        "trained_through": None if active is None else active.trained_through,
        "scored": scored,
        "failed": failed,
        "pending": pending,
        "diverted": diverted,
        "coverage": scored / total if total else None,
        "backlog_entries": work.entries,
        "backlog_bytes": work.num_bytes,
        "oldest_age_seconds": 0.0 if work.oldest_us is None else max(0.0, (now_us - work.oldest_us) / 1e6),
    }
