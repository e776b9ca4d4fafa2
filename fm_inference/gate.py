"""The gate: a candidate and the active snapshot on the same recent labelled rows, and whether the dataset's bands hold.

Runs in the child process of validate.py. The slice is an Arrow IPC file: the features, and a float32 column
`label__{task}` for each task, null where nothing is known.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from fm_inference.engine import TorchEngine
from schemas.evaluation import Fit, fit_of
from schemas.gates import SnapshotGates, TaskGate

LABEL_PREFIX = "label__"
_CHUNK_ROWS = 4096
Fits = dict[str, Fit]


def measure(engines: Mapping[str, TorchEngine], path: Path, tasks: tuple[str, ...]) -> dict[str, Fits]:
    """Give each engine's fit by task, over the rows of the slice that are labelled; some thousands of rows at a time.

    Raises:
        Exception: Whatever a model raises.
    """
    fits: dict[str, Fits] = {name: dict.fromkeys(tasks, Fit()) for name in engines}
    for rows in _iter_chunks(path):
        for name, engine in engines.items():
            logits = engine.score(rows).logits
            for task in tasks:
                label_B = rows[f"{LABEL_PREFIX}{task}"].to_numpy(zero_copy_only=False).astype(np.float64)
                known = np.flatnonzero(~np.isnan(label_B))
                fits[name][task] += fit_of(logits[task][known].astype(np.float64), label_B[known])
    return fits


def _iter_chunks(path: Path) -> Iterator[pa.Table]:
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            for first in range(0, batch.num_rows, _CHUNK_ROWS):
                yield pa.Table.from_batches([batch.slice(first, _CHUNK_ROWS)])


def judge_gate(
    candidate: Fits, active: Fits, gates: SnapshotGates, *, active_id: str
) -> tuple[list[str], dict[str, TaskGate]]:
    """Give why the bands do not hold, with the numbers, and what was measured by task.

    A task with fewer labels than min_rows, or of one class, is measured as far as it can be and refuses nothing.
    """
    reasons: list[str] = []
    measured: dict[str, TaskGate] = {}
    for task, fit in candidate.items():
        gate = measured[task] = _task_gate(fit, active[task], gates)
        if gate.ne_ratio is not None and gate.ne_ratio > gates.max_ne_ratio:
            reasons.append(
                f"task {task!r}: NE is {gate.ne:.4f} on {gate.rows} recent labelled rows, {gate.ne_ratio:.4f} times "
                f"the {gate.active_ne:.4f} of the active snapshot {active_id!r}; at most {gates.max_ne_ratio:g} times "
                "is allowed (snapshot_gates.max_ne_ratio)"
            )
        lowest, highest = gates.calibration
        if gate.calibration is not None and not lowest <= gate.calibration <= highest:
            reasons.append(
                f"task {task!r}: calibration is {gate.calibration:.4f} on {gate.rows} recent labelled rows, outside "
                f"[{lowest:g}, {highest:g}] (snapshot_gates.calibration); the active snapshot {active_id!r} has "
                f"{gate.active_calibration:.4f}"
            )
    return reasons, measured


def _task_gate(fit: Fit, active: Fit, gates: SnapshotGates) -> TaskGate:
    if fit.rows < gates.min_rows:
        return TaskGate(rows=fit.rows, note=f"{fit.rows} labels are fewer than min_rows, {gates.min_rows}")
    if fit.labels in {0.0, float(fit.rows)}:
        return TaskGate(rows=fit.rows, note=f"all {fit.rows} labels are {fit.labels / fit.rows:.0f}")
    ne, active_ne = fit.normalized_entropy, active.normalized_entropy
    return TaskGate(
        rows=fit.rows,
        ne=ne,
        active_ne=active_ne,
        ne_ratio=ne / active_ne if active_ne > 0 else None,
        calibration=fit.calibration,
        active_calibration=active.calibration,
    )
