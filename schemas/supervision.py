"""An example's value in the online store: one binary of fixed width per FM.

    byte 0       format number, now 1
    byte 1       0 scored, 1 failed (dead-lettered; nothing but event_time follows in meaning, the rest is zero)
    2..3         zero
    4..7         number of the snapshot in the FM's registry record, uint32
    8..15        event_time, microseconds, int64
    16..23       scored_at, microseconds, int64
    24..         logits float32, one per task, then each embedding as encoded

All little-endian. A lookup is one MGET and a numpy view: nothing is parsed row by row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.snapshot import OutputColumns

FORMAT = 1
SCORED, FAILED = 0, 1


@dataclass(frozen=True, slots=True)
class OnlineLayout:
    """The layout of the values of one FM as a numpy record type."""

    record: np.dtype[np.void]

    @property
    def width(self) -> int:
        """Bytes of one value."""
        return self.record.itemsize


def online_layout(outputs: OutputColumns) -> OnlineLayout:
    """Give the layout for an FM's outputs."""
    fields: list[tuple[str, str] | tuple[str, str, tuple[int, ...]]] = [
        ("_format", "u1"), ("_state", "u1"), ("_zero", "<u2"), ("_snapshot", "<u4"),
        ("_event_time", "<i8"), ("_scored_at", "<i8"),
    ]  # fmt: skip
    fields += [(f"{task}__logit", "<f4") for task in outputs.tasks]
    fields += [(name, "u1", (width,)) for name, width in outputs.widths().items()]
    return OnlineLayout(np.dtype(fields))


def pack_values(
    layout: OnlineLayout,
    *,
    snapshot: int,
    event_time_us: NDArray[np.int64],
    scored_at_us: int,
    outputs: Mapping[str, NDArray[np.float32] | NDArray[np.uint8]],
    state: int = SCORED,
) -> bytes:
    """Give the values of a chunk, one after the other; outputs maps each column to (B,) or (B, width)."""
    records = np.zeros(len(event_time_us), layout.record)
    records["_format"] = FORMAT
    records["_state"] = state
    records["_snapshot"] = snapshot
    records["_event_time"] = event_time_us
    records["_scored_at"] = scored_at_us
    for name, column in outputs.items():
        records[name] = column
    return records.tobytes()


def unpack_values(layout: OnlineLayout, blob: bytes) -> NDArray[np.void]:
    """Give values that lie one after the other as records, zero-copy."""
    return np.frombuffer(blob, layout.record)
