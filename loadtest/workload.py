"""The fixed workload of all measurements: 13 float and 26 category columns (13 strings), 32-byte ids, 2 tasks."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

SPEC: dict[str, Any] = {
    "entity_key": ["c0"],
    "features": [
        *[{"name": f"f{i}", "type": "float"} for i in range(13)],
        *[{"name": f"c{i}", "type": "category", "value_type": "string"} for i in range(13)],
        *[{"name": f"c{i}", "type": "category", "value_type": "int64"} for i in range(13, 26)],
    ],
    "tasks": [
        {"name": "click", "label_window_seconds": 3600},
        {"name": "buy", "label_window_seconds": 86_400},
    ],
    "partitions": 4,
}
CHUNK_ROWS = 5000
START_US = int(datetime(2026, 11, 1, tzinfo=UTC).timestamp()) * 1_000_000


def example_ids(first: int, count: int) -> pa.Array:
    """Give 32-byte ids."""
    return pa.array([f"{n:032x}" for n in range(first, first + count)])


def chunk(first: int, count: int = CHUNK_ROWS, *, seed: int = 0, rows_per_day: int = 2_000_000) -> pa.Table:
    """Give rows first..first+count: string categories of 1,000 values each, int64 ones of a million."""
    random = np.random.default_rng(seed + first)
    times = START_US + (np.arange(first, first + count) * 86_400_000_000) // rows_per_day
    columns: dict[str, Any] = {
        "example_id": example_ids(first, count),
        "event_time": pa.array(times).cast(pa.timestamp("us", "UTC")),
    }
    floats = random.standard_normal((13, count), np.float32)
    columns |= {f"f{i}": pa.array(floats[i]) for i in range(13)}
    for i in range(13):
        values = pa.array([f"value-{i}-{n}" for n in range(1000)])
        columns[f"c{i}"] = values.take(pa.array(random.integers(0, 1000, count)))
    columns |= {f"c{i}": pa.array(random.integers(0, 1_000_000, count)) for i in range(13, 26)}
    return pa.table(columns)
