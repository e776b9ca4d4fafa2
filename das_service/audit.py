"""Who changed what of an FM and its snapshots, when: the last AUDIT_ENTRIES changes of each FM.

Entries are fields of the registry's own hash, written by the script that makes the change: an entry is there exactly if
its change was made, lies on disk when the caller is answered, and is copied beside the tables and restored with it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import redis
from pydantic import BaseModel

from schemas import keys

AUDIT_ENTRIES = 256
AuditAction = Literal[
    "declare", "register", "validate", "reject", "activate", "roll_back", "shadow", "end_shadow", "retire"
]
_SHOWN = ("required", "active", "shadow", "shadow_share", "generation", "state", "reasons", "uri", "sha256")
_MOST_CHARACTERS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What an entry says besides the record's change. who: a token's name, `loopback`, or a worker's instance."""

    dataset: str
    fm: str
    who: str
    what: AuditAction
    snapshot_id: str | None = None
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None

    @property
    def prefix(self) -> str:
        """What the names of the FM's entries begin with; a number follows, or `last`."""
        return audit_prefix(self.dataset, self.fm)


def audit_prefix(dataset: str, fm: str) -> str:
    """Give what the registry's fields of an FM's audit log begin with."""
    return f"audit/{dataset}/{fm}/"


def entry_text(note: Note, stored: BaseModel | None, wanted: BaseModel, *, at: datetime) -> str:
    """Give an entry as JSON. before and after hold what differs of the record, unless the note says them."""
    before, after = _differences(stored, wanted)
    entry = {
        "at": at.isoformat(),
        "who": note.who[:_MOST_CHARACTERS],
        "what": note.what,
        "snapshot_id": note.snapshot_id,
        "before": before if note.before is None else dict(note.before),
        "after": after if note.after is None else dict(note.after),
    }
    return json.dumps(entry)


def _differences(stored: BaseModel | None, wanted: BaseModel) -> tuple[dict[str, Any], dict[str, Any]]:
    old = {} if stored is None else stored.model_dump(mode="json")
    new = wanted.model_dump(mode="json")
    changed = [name for name in _SHOWN if name in new and (stored is None or old.get(name) != new[name])]
    return (
        {name: _short(old[name]) for name in changed if name in old},
        {name: _short(new[name]) for name in changed},
    )


def _short(value: Any) -> Any:  # noqa: ANN401 - any JSON
    text = json.dumps(value)
    return value if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def read_audit(client: redis.Redis, dataset: str, fm: str) -> list[dict[str, Any]]:
    """Give the entries of an FM that are kept, the oldest first."""
    prefix = audit_prefix(dataset, fm)
    last = int(client.hget(keys.REGISTRY, f"{prefix}last") or 0)
    names = [f"{prefix}{number}" for number in range(max(1, last - AUDIT_ENTRIES + 1), last + 1)]
    found = client.hmget(keys.REGISTRY, names) if names else []
    return [json.loads(text) for text in found if text is not None]
