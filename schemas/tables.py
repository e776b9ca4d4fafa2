"""Delta tables (contract 7): Arrow schemas, names and the event day. Vectors are one binary, times microseconds UTC.

`_example_hash` (the first half of the id's digest) stands last: joins start from it and verify on example_id. Its name
can't be that of a feature, a task or an embedding.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.dataset import TIMESTAMP, DatasetSpec
from schemas.snapshot import OutputColumns

FORMAT = 1
EXAMPLES = "examples"
LABELS = "labels"
LATE_LABELS = "late_labels"
CLOSED = "closed"
EXAMPLE_HASH = "_example_hash"
LABEL_HASH = "_label_hash"
LOG_ROW = "_log_row"
EVENT_DAY = "event_day"
IS_SHADOW = "_is_shadow"
IS_BACKFILL = "_is_backfill"


def supervision_table(fm: str) -> str:
    """Give the table of an FM's supervision."""
    return f"supervision/{fm}"


def dead_letters_table(fm: str) -> str:
    """Give the table of the examples that an FM failed on."""
    return f"dead_letters/{fm}"


def examples_table_schema(spec: DatasetSpec) -> pa.Schema:
    """Give the schema of `examples`."""
    head = [
        pa.field("example_id", pa.string()),
        pa.field("event_time", TIMESTAMP),
        pa.field("received_at", TIMESTAMP),
        pa.field("is_late", pa.bool_()),
        pa.field("content_hash", pa.int64()),
        pa.field("log_position", pa.int64()),
        pa.field(EVENT_DAY, pa.date32()),
    ]
    features = []
    for feature in spec.features:
        if feature.type == "vector":
            note = {"codec": "float32", "size": json.dumps(feature.size)}
            features.append(pa.field(feature.name, pa.binary(), metadata=note))
        else:
            features.append(pa.field(feature.name, feature.arrow_type))
    return pa.schema([*head, *features, pa.field(EXAMPLE_HASH, pa.int64())])


def labels_table_schema(spec: DatasetSpec) -> pa.Schema:
    """Give the schema of `labels`: whatever was said of an example's outcomes. event_day is that of label_time.

    `_log_row` is the place of a row in its log entry: of labels at one time in one entry the last counts. `_label_hash`
    stands for what a row says, all of it: a row that says the same is a repeat.
    """
    head = [
        pa.field("example_id", pa.string()),
        pa.field("label_time", TIMESTAMP),
        pa.field("received_at", TIMESTAMP),
        pa.field("log_position", pa.int64()),
        pa.field(EVENT_DAY, pa.date32()),
    ]
    tasks = [pa.field(task.name, pa.float32()) for task in spec.tasks]
    tail = [
        pa.field(LOG_ROW, pa.int32()),
        pa.field(LABEL_HASH, pa.int64()),
        pa.field(EXAMPLE_HASH, pa.int64()),
    ]
    return pa.schema([*head, *tasks, *tail])


def closed_table_schema(spec: DatasetSpec) -> pa.Schema:
    """Give the schema of `closed`: examples whose label window is over, with their labels, in ready order.

    ready_seq counts the rows of a partition from 0. _labels_through: the last position of the labels log that was
    looked at for the row; a label after it is late.
    """
    head = [
        pa.field("example_id", pa.string()),
        pa.field("event_time", TIMESTAMP),
        pa.field("ready_seq", pa.int64()),
        pa.field("closed_at", TIMESTAMP),
    ]
    tasks = [pa.field(task.name, pa.float32()) for task in spec.tasks]
    tail = [
        pa.field("_partition", pa.int32()),
        pa.field("_labels_through", pa.int64()),
        pa.field(EVENT_DAY, pa.date32()),
        pa.field(EXAMPLE_HASH, pa.int64()),
    ]
    return pa.schema([*head, *tasks, *tail])


def supervision_table_schema(outputs: OutputColumns) -> pa.Schema:
    """Give the schema of `supervision/<fm>`; columns are named as in lookups, without the FM's prefix.

    _is_shadow: what a snapshot said beside the active one; _is_backfill: what one said of a stored example later on.
    Null is false. Such rows are nobody's outcome and lie in files of their own.
    """
    head = [
        pa.field("example_id", pa.string()),
        pa.field("event_time", TIMESTAMP),
        pa.field("snapshot_id", pa.string()),
        pa.field("trained_through", TIMESTAMP),
        pa.field("scored_at", TIMESTAMP),
        pa.field("available_at", TIMESTAMP),
        pa.field("log_position", pa.int64()),
        pa.field(EVENT_DAY, pa.date32()),
    ]
    logits = [pa.field(f"{task}__logit", pa.float32()) for task in outputs.tasks]
    vectors = [
        pa.field(name, pa.binary(), metadata={"codec": codec, "size": json.dumps(size)})
        for name, (size, codec) in outputs.embeddings.items()
    ]
    marks = [pa.field(IS_SHADOW, pa.bool_()), pa.field(IS_BACKFILL, pa.bool_())]
    return pa.schema([*head, *logits, *vectors, pa.field(EXAMPLE_HASH, pa.int64()), *marks])


def dead_letters_table_schema() -> pa.Schema:
    """Give the schema of `dead_letters/<fm>`: examples that a model failed on, and why."""
    return pa.schema(
        [
            pa.field("example_id", pa.string()),
            pa.field("event_time", TIMESTAMP),
            pa.field("snapshot_id", pa.string()),
            pa.field("failed_at", TIMESTAMP),
            pa.field("reason", pa.string()),
            pa.field("log_position", pa.int64()),
            pa.field(EVENT_DAY, pa.date32()),
            pa.field(EXAMPLE_HASH, pa.int64()),
        ]
    )


def dead_schema() -> pa.Schema:
    """Give the schema of a dead-letter chunk in the log."""
    return pa.schema(
        [
            pa.field("example_id", pa.string(), nullable=False),
            pa.field("example_digest", pa.binary(16), nullable=False),
            pa.field("event_time", TIMESTAMP, nullable=False),
            pa.field("reason", pa.string(), nullable=False),
        ]
    )


def event_days(event_time: pa.Array, granularity: str) -> pa.Array:
    """Give the event day (the first of its week or month with those granularities) as date32.

    This is the unit that identity is settled in: two examples of one id on one event day are the same example.
    """
    days = np.asarray(event_time.cast(pa.timestamp("us")).to_numpy(zero_copy_only=False)).astype("datetime64[D]")
    if granularity == "week":
        since_monday = (days.astype(np.int64) + 3) % 7
        days = days - since_monday
    elif granularity == "month":
        days = days.astype("datetime64[M]").astype("datetime64[D]")
    return pc.cast(pa.array(days), pa.date32())
