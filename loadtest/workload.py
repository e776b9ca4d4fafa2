"""The fixed workload of all measurements: 13 float and 26 category columns (13 strings), 32-byte ids, 2 tasks."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from das_service.door.validation import BodyLimits, validate_arrow
from das_service.ingest import encode_chunks
from das_service.logs.streams import Chunk
from schemas.dataset import DatasetSpec
from schemas.wire import write_table

DATASET = "load"
DECLARATION: dict[str, Any] = {
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
SPEC = DatasetSpec.model_validate(DECLARATION)
CHUNK_ROWS = 5000
START = datetime(2025, 1, 1, tzinfo=UTC)
START_US = int(START.timestamp()) * 1_000_000
_ROWS_PER_DAY = 2_000_000
_LIMITS = BodyLimits(max_rows=100_000, max_decoded_bytes=1 << 28)


def example_ids(first: int, count: int) -> pa.Array:
    """Give 32-byte ids."""
    return pa.array([f"{n:032x}" for n in range(first, first + count)])


def chunk(first: int, count: int = CHUNK_ROWS) -> pa.Table:
    """Give rows first..first+count: string categories of 1,000 values each, int64 ones of a million."""
    random = np.random.default_rng(first)
    times = START_US + (np.arange(first, first + count) * 86_400_000_000) // _ROWS_PER_DAY
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


def bodies(first: int, num_chunks: int) -> list[bytes]:
    """Give requests of consecutive rows, CHUNK_ROWS each, as an Arrow client sends them."""
    return [write_table(chunk(first + i * CHUNK_ROWS)) for i in range(num_chunks)]


def entries(requests: Sequence[bytes]) -> list[list[Chunk]]:
    """Give for each request the chunks that the door makes of it, byte by byte."""
    now_us = time.time_ns() // 1000
    valid = [validate_arrow(body, SPEC, limits=_LIMITS, now_us=now_us) for body in requests]
    return [encode_chunks(DATASET, SPEC, rows.batch) for rows in valid]
