"""Why the service is not ready, in plain words: what the monitor found, and a write to the server now."""

import time

import redis

from das_service.errors import DasError
from das_service.registry import Catalog
from das_service.settings import Settings
from das_service.watch.monitor import STALE_SECONDS, Findings
from schemas import keys


def readiness_problems(findings: Findings, settings: Settings, *, now: float) -> list[str]:
    """Give what is wrong, the gravest first; empty when ready. now: monotonic seconds."""
    if findings.unreachable:
        return [f"the Redis or Valkey server or the tables' folder can't be used: {findings.unreachable}"]
    problems = []
    if now - findings.looked_at > STALE_SECONDS:
        problems.append(f"the last look at the dependencies was {now - findings.looked_at:.0f} s ago")
    problems += _log_problems(findings)
    if settings.durability == "fsync" and findings.durability_problems:
        problems.append(f"the server may lose what it acknowledges: {'; '.join(findings.durability_problems)}")
    if findings.disk_problem:
        problems.append(findings.disk_problem)
    if findings.memory_ratio is not None and findings.memory_ratio > settings.max_memory_ratio:
        problems.append(f"the online store uses {findings.memory_ratio:.0%} of its maxmemory")
    if findings.catalog is not None:
        problems += _absent_roles(findings, findings.catalog)
    return problems + _told_by_peers(findings)


def _log_problems(findings: Findings) -> list[str]:
    if findings.verdict is None:
        return []
    try:
        findings.verdict.refuse_problems()
    except DasError as error:
        return [f"{error.code}: {error.detail}"]
    return []


def _absent_roles(findings: Findings, catalog: Catalog) -> list[str]:
    """Give which roles lack a living process: a sink once there is a dataset, a worker for FMs that need one."""
    alive = [peer for peer in findings.peers.values() if peer.alive]
    problems = []
    if catalog.datasets and not any(peer.role == "sink" for peer in alive):
        problems.append("no sink is alive: rows stay in the log and do not reach the tables")
    served = {name for peer in alive if peer.role == "worker" for name in peer.info.get("fms", ())}
    for dataset, record in catalog.iter_fms():
        snapshots = catalog.snapshots.get(dataset, {}).get(record.fm, {})
        awaits = any(snapshot.state == "validating" for snapshot in snapshots.values())
        needs_worker = record.required and (record.active is not None or awaits)
        if needs_worker and f"{dataset}/{record.fm}" not in served:
            work = "its examples stay unscored" if record.active is not None else "its snapshot waits for validation"
            problems.append(f"no worker is alive for FM {record.fm!r} of dataset {dataset!r}: {work}")
    return problems


def _told_by_peers(findings: Findings) -> list[str]:
    """Give what living workers and sinks say is wrong with themselves."""
    return [
        f"{peer.role} {peer.instance}: {problem}"
        for peer in findings.peers.values()
        if peer.alive
        for problem in peer.info.get("problems", ())
    ]


def service_notices(findings: Findings) -> list[str]:
    """Give what living processes say is wrong and keeps no row from being taken, scored or committed."""
    return [
        f"{peer.role} {peer.instance}: {notice}"
        for peer in findings.peers.values()
        if peer.alive
        for notice in peer.info.get("notices", ())
    ]


def write_probe(client: redis.Redis) -> str | None:
    """Write to the server now; give why that failed, None if it did not."""
    try:
        client.set(keys.PROBE, str(time.time_ns()), ex=3600)
    except redis.exceptions.RedisError as error:
        return f"the Redis or Valkey server does not take a write: {str(error)[:200] or type(error).__name__}"
    return None
