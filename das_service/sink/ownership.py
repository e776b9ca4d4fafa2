"""Who plays a role that only one process may play, while the others stand by.

The owner is named in the server. It is replaced when its beat stands still or has gone, by the observer's own
monotonic clock. This is about liveness alone: what an owner that was wrongly thought dead still does is refused by the
tables themselves.
"""

import redis

from das_service.beats import Observer
from das_service.redis_client import run_script
from schemas import keys

_ABSENT_SECONDS = 2.0


class Ownership:
    """One process's view of who owns a role. One thread; look about once a second."""

    def __init__(self, client: redis.Redis, *, role: str, instance: str, dead_after_seconds: float) -> None:
        self._client = client
        self._key = keys.owner(role)
        self._instance = instance
        self._observer = Observer(dead_after_seconds=dead_after_seconds)
        self._absent: tuple[str, float] | None = None
        self.owner = ""

    @property
    def is_mine(self) -> bool:
        """Whether this process was the owner at the last look."""
        return self.owner == self._instance

    def look(self, *, now: float) -> bool:
        """Take the role if it is free or its owner is dead; give whether it is ours. now: monotonic seconds."""
        peers = self._observer.look(self._client, now=now)
        self.owner = self._ask("")
        if self.is_mine:
            return True
        peer = peers.get(self.owner)
        if peer is None:
            if self._absent is None or self._absent[0] != self.owner:
                self._absent = (self.owner, now)
            is_dead = now - self._absent[1] >= _ABSENT_SECONDS
        else:
            self._absent = None
            is_dead = not peer.alive
        if is_dead:
            self.owner = self._ask(self.owner)
        return self.is_mine

    def release(self) -> None:
        """Let another process take the role at once."""
        owner = self._client.get(self._key)
        if owner is not None and owner.decode() == self._instance:
            self._client.delete(self._key)

    def _ask(self, dead: str) -> str:
        return str(run_script(self._client, "own", [self._key], [self._instance, dead]).decode())
