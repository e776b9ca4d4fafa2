"""What an FM said of rows, as it is handed out: a status for every row, and values where it is present (contract 5)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from das_service.door.columns import binary_rows
from das_service.errors import InvalidRowsError
from das_service.registry import Catalog, FmRecord
from schemas.codecs import FLOAT16_MAX, Codec, decode
from schemas.dataset import TIMESTAMP
from schemas.supervision import FAILED

STATUSES = ("present", "pending", "missing", "failed", "leaky", "stale")
PRESENT, PENDING, MISSING, _FAILED, LEAKY, STALE = range(6)
_NEVER_US = 2**63 - 1

EmbeddingFormat = Literal["encoded", "float16", "float32"]
Values: TypeAlias = "NDArray[np.void] | Mapping[str, NDArray[Any]]"
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupQuery:
    """What is asked about the rows. outputs: tasks and embeddings wanted, None for all."""

    fms: tuple[str, ...]
    outputs: tuple[str, ...] | None = None
    embedding_format: EmbeddingFormat = "float16"
    max_freshness_gap_seconds: float | None = None

    def wants(self, output: str) -> bool:
        """Give whether a task or an embedding is asked for."""
        return self.outputs is None or output in self.outputs


@dataclass(frozen=True, slots=True)
class Judged:
    """What one FM said of rows. values: by name as in schemas.supervision.

    They are zero where the status is not present: what is not handed out is not in a buffer either.
    """

    status: NDArray[np.int8]
    values: Values
    snapshots: Sequence[str]
    trained_through_us: NDArray[np.int64]


def refuse_unknown_outputs(records: Sequence[FmRecord], query: LookupQuery) -> None:
    """Refuse a query for an output that none of the FMs has.

    Raises:
        InvalidRowsError: unknown_output.
    """
    if query.outputs is None or any(record.outputs is None for record in records):
        return
    known = {name for r in records if r.outputs for name in (*r.outputs.tasks, *r.outputs.embeddings)}
    unknown = [name for name in query.outputs if name not in known]
    if unknown:
        raise InvalidRowsError(
            f"no FM asked for has the output {', '.join(unknown)}; there are {', '.join(sorted(known))}",
            code="unknown_output",
        )


def judge(
    values: Values, found: Mask, waits: Mask, trained_through_us: NDArray[np.int64], max_gap_seconds: float | None
) -> NDArray[np.int8]:
    """Give each row's status, an index of STATUSES.

    values has fields _state, _snapshot and _event_time, meant where found; waits: whether a row that is not found may
    yet be scored; trained_through_us by snapshot number. A tie of trained_through and event_time is present.

    Source: docs/contract.md, section 5
    """
    status = np.where(waits, np.int8(PENDING), np.int8(MISSING))
    if not found.any():
        return status
    event_time, trained_through = values["_event_time"], _of_snapshots(values["_snapshot"], found, trained_through_us)
    status[found] = PRESENT
    if max_gap_seconds is not None:
        gap_us = min(int(max_gap_seconds * 1_000_000), _NEVER_US)
        known = found & (trained_through <= event_time)
        status[known & (event_time - np.where(known, trained_through, event_time) > gap_us)] = STALE
    status[found & (trained_through > event_time)] = LEAKY
    status[found & (values["_state"] == FAILED)] = _FAILED
    return status


def _of_snapshots(numbers: NDArray[Any], found: Mask, by_number: NDArray[np.int64]) -> Any:  # noqa: ANN401
    """Give what each row's snapshot has; one number if all rows have one snapshot, as most windows of a join do."""
    if len(numbers) and found.all() and (numbers == numbers[0]).all():
        return by_number[int(numbers[0])]
    return by_number[np.where(found, numbers, 0)]


def trained_through_by_number(catalog: Catalog, dataset: str, record: FmRecord) -> NDArray[np.int64]:
    """Give trained_through by snapshot number in microseconds; a snapshot that does not say it is later than all."""
    known = catalog.snapshots.get(dataset, {}).get(record.fm, {})
    times = [known[name].trained_through if name in known else None for name in record.snapshots]
    return np.array([_NEVER_US if at is None else _microseconds(at) for at in times] or [_NEVER_US], np.int64)


def _microseconds(at: Any) -> int:  # noqa: ANN401 - an aware datetime
    return int(pa.scalar(at, TIMESTAMP).value)


def supervision_columns(judged: Judged, record: FmRecord, query: LookupQuery) -> list[tuple[pa.Field, pa.Array]]:
    """Give an FM's columns, those of its outputs only once it has any."""
    fm, status, values = record.fm, judged.status, judged.values
    present = None if (status == PRESENT).all() else status == PRESENT
    columns = [
        (f"{fm}__status", pa.DictionaryArray.from_arrays(pa.array(status), pa.array(STATUSES, pa.string()))),
    ]
    if record.outputs is None:
        return [(pa.field(name, array.type), array) for name, array in columns]
    numbers = np.ascontiguousarray(values["_snapshot"], np.int32)
    indices = pa.Array.from_buffers(pa.int32(), len(status), [_bitmap(present), pa.py_buffer(numbers)])
    columns.append(
        (f"{fm}__snapshot_id", pa.DictionaryArray.from_arrays(indices, pa.array(judged.snapshots, pa.string())))
    )
    is_present = status == PRESENT
    trained_through = np.where(is_present, _of_snapshots(numbers, is_present, judged.trained_through_us), np.int64(0))
    columns.append((f"{fm}__trained_through", _primitive(trained_through, TIMESTAMP, present)))
    columns.append((f"{fm}__scored_at", _primitive(values["_scored_at"], TIMESTAMP, present)))
    columns += [
        (f"{fm}__{task}__logit", _primitive(values[f"{task}__logit"], pa.float32(), present))
        for task in record.outputs.tasks
        if query.wants(task)
    ]
    fields = [(pa.field(name, array.type), array) for name, array in columns]
    for name, (size, codec) in record.outputs.embeddings.items():
        if query.wants(name):
            fields.append(_embedding(f"{fm}__{name}", values[name], size, codec, (present, query.embedding_format)))
    return fields


def _bitmap(present: Mask | None) -> pa.Buffer | None:
    return None if present is None else pa.array(present).buffers()[1]


def _primitive(values: NDArray[Any], kind: pa.DataType, present: Mask | None) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(kind, len(values), [_bitmap(present), data])


def _embedding(
    name: str, packed: NDArray[np.uint8], size: int, codec: Codec, how: tuple[Mask | None, EmbeddingFormat]
) -> tuple[pa.Field, pa.Array]:
    """Give an embedding's column: (B, width) bytes as encoded, or lists of `size` floats."""
    present, wanted = how
    rows = np.ascontiguousarray(packed)
    if wanted == "encoded":
        array = binary_rows(rows.reshape(-1), pa.binary(rows.shape[1]), present)
        return pa.field(name, array.type, metadata={"codec": codec, "size": str(size)}), array
    if wanted == "float16" and codec == "float16":
        values = rows.view("<f2")
    elif wanted == "float16":
        values = np.clip(decode(rows, size, codec), -FLOAT16_MAX, FLOAT16_MAX).astype("<f2")
    else:
        values = decode(rows, size, codec)
    kind = pa.list_(pa.float16() if wanted == "float16" else pa.float32(), size)
    child = pa.Array.from_buffers(kind.value_type, values.size, [None, pa.py_buffer(np.ascontiguousarray(values))])
    array = pa.Array.from_buffers(kind, len(rows), [_bitmap(present)], children=[child])
    return pa.field(name, kind), array
