"""Where every row is: `GET /v1/status`, and `das status`.

accepted = distinct + duplicates + conflicting + in_log, where in_log is what the sink has not committed yet. Per FM,
scored and failed (and not scored since) are what its tables hold; pending is what lies in its logs, scored or not,
before that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from das_service.folder import Folder
from das_service.logs.records import EXAMPLES, Mark, dead_log, read_mark, rescore_log, scored_log, table_of_log
from das_service.logs.streams import LogCounters, read_counters
from das_service.metrics import package_version
from das_service.redis_client import ScriptCall, run_scripts, script
from das_service.registry import Catalog, FmRecord
from das_service.settings import Settings
from das_service.watch.monitor import Findings
from das_service.watch.readiness import readiness_problems
from schemas import keys

Counters = Mapping[tuple[int, str], LogCounters]
_NOTHING = Mark(version=-1, positions={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """What a group has yet to finish in all partitions of a log. oldest_us: None if nothing."""

    entries: int = 0
    rows: int = 0
    num_bytes: int = 0
    oldest_us: int | None = None


def service_status(findings: Findings, settings: Settings, *, now: float) -> dict[str, Any]:
    """Give the parts of the status that the monitor knows. now: monotonic seconds."""
    problems = readiness_problems(findings, settings, now=now)
    return {
        "version": package_version(),
        "durability": settings.durability,
        "ready": not problems,
        "problems": problems,
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
    """Give how far a dataset's rows are. Marks are read before the counters, so that nothing seems to be missing."""
    spec = catalog.spec(dataset)
    partitions = range(spec.partitions)
    fms = catalog.fms.get(dataset, {})
    kinds = [EXAMPLES, *[kind for fm in fms for kind in (scored_log(fm), dead_log(fm), rescore_log(fm))]]
    marks = {kind: _mark(tables, dataset, kind) for kind in kinds}
    unfinished = _unfinished(client, dataset, partitions, list(fms))
    counters = read_counters(client, dataset, partitions, kinds)
    examples = marks[EXAMPLES]
    repeated = sum(counted.repeated_rows for (_, kind), counted in counters.items() if kind == EXAMPLES)
    in_log = _not_committed(counters, marks, EXAMPLES)
    duplicates = examples.duplicates + repeated
    return {
        "dataset": dataset,
        "accepted": examples.rows + duplicates + examples.conflicting + in_log,
        "distinct": examples.rows,
        "duplicates": duplicates,
        "conflicting": examples.conflicting,
        "in_log": in_log,
        "backlog_bytes": sum(counted.kept_bytes for counted in counters.values()),
        "fms": {
            record.fm: _fm_status(catalog, dataset, record, counters, marks, unfinished[record.fm], now_us)
            for record in fms.values()
        },
    }


def _mark(tables: Folder, dataset: str, kind: str) -> Mark:
    table = table_of_log(kind)
    return (None if table is None else read_mark(tables, dataset, table)) or _NOTHING


def _not_committed(counters: Counters, marks: Mapping[str, Mark], kind: str) -> int:
    logged = sum(counted.rows for (_, name), counted in counters.items() if name == kind)
    mark = marks[kind]
    return max(0, logged - mark.rows - mark.duplicates - mark.conflicting)


def _fm_status(
    catalog: Catalog,
    dataset: str,
    record: FmRecord,
    counters: Counters,
    marks: Mapping[str, Mark],
    unfinished: Mapping[str, Unfinished],
    now_us: int,
) -> dict[str, Any]:
    fm = record.fm
    active = catalog.snapshots.get(dataset, {}).get(fm, {}).get(record.active or "")
    scored = marks[scored_log(fm)].rows
    failed = max(0, marks[dead_log(fm)].rows - marks[scored_log(fm)].mended)
    published = _not_committed(counters, marks, scored_log(fm)) + _not_committed(counters, marks, dead_log(fm))
    pending = published + sum(work.rows for work in unfinished.values())
    total = scored + failed + pending
    oldest = [work.oldest_us for work in unfinished.values() if work.oldest_us is not None]
    return {
        "fm": fm,
        "required": record.required,
        "active": record.active,
        "trained_through": None if active is None else active.trained_through,
        "scored": scored,
        "failed": failed,
        "pending": pending,
        "coverage": scored / total if total else None,
        "backlog_entries": sum(work.entries for work in unfinished.values()),
        "backlog_bytes": sum(work.num_bytes for work in unfinished.values()),
        "oldest_age_seconds": max(0.0, (now_us - min(oldest)) / 1e6) if oldest else 0.0,
    }


def _unfinished(
    client: redis.Redis, dataset: str, partitions: range, fms: Sequence[str]
) -> dict[str, dict[str, Unfinished]]:
    """Give what each FM has yet to finish, by kind of log."""
    asked = [(fm, kind, p) for fm in fms for kind in (EXAMPLES, rescore_log(fm)) for p in partitions]
    calls = [
        ScriptCall(
            script("unfinished"), [keys.counters(dataset, p), keys.log(dataset, p, kind)], [kind, keys.group(fm)]
        )
        for fm, kind, p in asked
    ]
    found: dict[str, dict[str, Unfinished]] = {fm: {} for fm in fms}
    for (fm, kind, _), reply in zip(asked, run_scripts(client, calls) if calls else [], strict=True):
        if isinstance(reply, redis.exceptions.ResponseError):
            continue  # the log is not made yet
        if isinstance(reply, Exception):
            raise reply
        entries, rows, num_bytes = (int(part) for part in reply[:3])
        before = found[fm].get(kind, Unfinished())
        times = [time for time in (before.oldest_us, int(reply[3]) if reply[3] else None) if time is not None]
        found[fm][kind] = Unfinished(
            entries=before.entries + entries,
            rows=before.rows + rows,
            num_bytes=before.num_bytes + num_bytes,
            oldest_us=min(times) if times else None,
        )
    return found
