"""Names that are safe in paths, keys and columns, and the ones that are taken."""

import re

NAME_PATTERN = r"^[a-z][a-z0-9_]{0,62}$"
SNAPSHOT_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
EXAMPLE_ID_MAX_BYTES = 256

RESERVED_FEATURES = frozenset(
    {
        "example_id", "event_time", "received_at", "is_late", "content_hash", "log_position", "event_day",
        "ready_seq", "closed_at", "label_time",
    }
)  # fmt: skip
RESERVED_EMBEDDINGS = frozenset(
    {
        "status", "snapshot_id", "trained_through", "scored_at",
        "example_id", "event_time", "available_at", "log_position", "event_day",
    }
)  # fmt: skip

_NAME = re.compile(NAME_PATTERN)


def is_name(text: str) -> bool:
    """Give whether text may name a dataset, feature, task, FM or embedding."""
    return _NAME.fullmatch(text) is not None
