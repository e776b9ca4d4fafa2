"""Who is alive: every process raises a counter each second; an observer trusts its own monotonic clock alone.

Wall clocks jump and leases with them, so death is told by a counter that stands still for some seconds of the
observer's monotonic time, seen in looks that succeeded: a server that was away makes nobody dead.
"""

import json
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis

from das_service.redis_client import run_script
from das_service.settings import Settings
from schemas import keys

BEAT_SECONDS = 1.0
_FORGET_SECONDS = 60.0


def instance_name(settings: Settings, role: str) -> str:
    """Give this process's name among its peers."""
    return settings.instance or f"{role}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"


def reachable_url(host: str, port: int) -> str:
    """Give where a person finds what listens there: on this machine by name, where it listens on all addresses."""
    bound_to_all = host.strip("[]") in {"", "0.0.0.0", "::"}  # noqa: S104 - compared, not bound
    return f"http://{socket.gethostname() if bound_to_all else host}:{port}"


def beat(client: redis.Redis, instance: str, *, role: str, count: int, info: Mapping[str, Any]) -> None:
    """Say that this process is alive, and what peers and people should know of it."""
    record = {"role": role, "count": count, "pid": os.getpid(), **info}
    run_script(client, "put_field", [keys.BEATS], [instance, json.dumps(record)])


def forget(client: redis.Redis, instance: str) -> None:
    """Say that this process ends."""
    client.hdel(keys.BEATS, instance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A process as an observer sees it."""

    instance: str
    role: str
    alive: bool
    info: dict[str, Any]


@dataclass(slots=True)
class _Seen:
    raw: bytes
    changed_at: float


class Observer:
    """Watches the beats. One owner thread."""

    def __init__(self, *, dead_after_seconds: float) -> None:
        self._dead_after_seconds = dead_after_seconds
        self._seen: dict[str, _Seen] = {}
        self._looked_at: float | None = None

    def look(self, client: redis.Redis, *, now: float) -> dict[str, Peer]:
        """Give the processes by instance; `now` is monotonic seconds."""
        beats = {name.decode(): raw for name, raw in client.hgetall(keys.BEATS).items()}
        blind = self._looked_at is not None and now - self._looked_at > max(2.0, self._dead_after_seconds / 2)
        for instance, raw in beats.items():
            seen = self._seen.get(instance)
            if seen is None or seen.raw != raw:
                self._seen[instance] = _Seen(raw, now)
            elif blind:
                seen.changed_at = now
        self._looked_at = now
        for instance in [name for name in self._seen if name not in beats]:
            del self._seen[instance]
        self._bury(client, now)
        return {
            instance: Peer(
                instance=instance,
                role=(info := json.loads(seen.raw))["role"],
                alive=now - seen.changed_at < self._dead_after_seconds,
                info=info,
            )
            for instance, seen in self._seen.items()
        }

    def _bury(self, client: redis.Redis, now: float) -> None:
        for instance, seen in list(self._seen.items()):
            if now - seen.changed_at > _FORGET_SECONDS:
                client.hdel(keys.BEATS, instance)
                del self._seen[instance]
