"""A closed-form FM for any dataset: its logits and embeddings are known functions of the features.

For one example, with every number exact in float64 and rounded once to float32:

    signal  = shift
            + sum of the float features and of the vectors' values, as float32 (null: 0.5)
            + sum over categories   of (bucket mod 97) / 64          bucket = xxh64(value, seed) mod 1000, null: 0
            + sum over list elements of (bucket mod 31) / 32         the first 8 of a list, null element: bucket 0
    logit of task k = 0, 1, ...         signal * (k + 1) / 8
    value d = 0, 1, ... of embedding e  u / (1 + |u|)  with  u = signal + d - e

`expected_supervision` computes the same with Python loops, and shares no code with fm_inference.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray
from torch import nn

from fm_inference import Signature, export_snapshot
from schemas.codecs import Codec, encode
from schemas.dataset import DatasetSpec, Feature
from schemas.snapshot import Manifest

BUCKETS = 1000
PAD_TO = 8
NULL_FLOAT = 0.5
TRAINED_THROUGH = datetime(2024, 1, 1, tzinfo=UTC)
ONE_EMBEDDING: Mapping[str, tuple[int, Codec]] = {"hidden": (8, "float16")}
Poison = Literal["raise", "nan", "kill"]


class ClosedFormFM(nn.Module):
    """The module. Where the first float feature is above `poison_above`, the row is poison:

    - "raise": an index out of range, so that the whole batch raises;
    - "nan": its logits and embeddings are not a number, the other rows are fine;
    - "kill": an integer division that overflows, so that the process dies of SIGFPE (on a CPU).
    """

    def __init__(
        self,
        tasks: Sequence[str],
        embeddings: Mapping[str, tuple[int, Codec]],
        *,
        shift: float = 0.0,
        poison: Poison | None = None,
        poison_above: float = 1e6,
    ) -> None:
        super().__init__()
        self.tasks, self.sizes = tuple(tasks), {name: size for name, (size, _) in embeddings.items()}
        self.poison, self.poison_above = poison, poison_above
        self.shift = nn.Buffer(torch.tensor(shift, dtype=torch.float64))
        self.safe_index = nn.Buffer(torch.zeros(1, 1, dtype=torch.float64))

    def forward(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        signal_B = self.shift + torch.zeros_like(next(iter(tensors.values()))[:, 0], dtype=torch.float64)
        for name, value in tensors.items():
            if name == "dense":
                signal_B = signal_B + value.double().sum(dim=1)
            elif name == "cat":
                signal_B = signal_B + (value % 97).sum(dim=1).double() / 64
            elif name.startswith("list"):
                elements = (value % 31) * tensors[name.replace("list", "mask")]
                signal_B = signal_B + elements.sum(dim=1).double() / 32
        if self.poison is not None:
            signal_B = self._poisoned(signal_B, tensors["dense"][:, 0] > self.poison_above)
        outputs = {f"logit_{task}": (signal_B * (k + 1) / 8).float() for k, task in enumerate(self.tasks)}
        for place, (name, size) in enumerate(self.sizes.items()):
            u_BD = signal_B[:, None] + torch.arange(size, dtype=torch.float64, device=signal_B.device) - place
            outputs[f"vector_{name}"] = (u_BD / (1 + u_BD.abs())).float()
        return outputs

    def _poisoned(self, signal_B: torch.Tensor, is_poison_B: torch.Tensor) -> torch.Tensor:
        if self.poison == "raise":
            return signal_B + nn.functional.embedding(is_poison_B.long(), self.safe_index)[:, 0]
        if self.poison == "nan":
            return torch.where(is_poison_B, float("nan"), signal_B)
        lowest = torch.where(is_poison_B, -(2**63), 0)
        return signal_B + torch.div(lowest, torch.full_like(lowest, -1), rounding_mode="trunc")


def closed_form_signature(
    spec: DatasetSpec,
    *,
    fm: str = "closed",
    snapshot_id: str = "s1",
    tasks: Sequence[str] | None = None,
    embeddings: Mapping[str, tuple[int, Codec]] = ONE_EMBEDDING,
    max_batch: int = 4096,
    golden: pa.Table | None = None,
) -> Signature:
    """The signature of the closed form over all features; `tasks` are all of the dataset's unless given."""
    names = [task.name for task in spec.tasks] if tasks is None else list(tasks)
    numbers = [f.name for f in spec.features if f.type in ("float", "vector")]
    categories = [f.name for f in spec.features if f.type == "category"]
    lists = [f.name for f in spec.features if f.type == "category_list"]
    inputs: list[dict[str, Any]] = []
    if numbers:
        numbers.sort(key=lambda name: _feature(spec, name).type)  # floats first: poison looks at column 0
        inputs.append({"tensor": "dense", "features": numbers, "encode": {"kind": "float", "null": NULL_FLOAT}})
    if categories:
        inputs.append({"tensor": "cat", "features": categories, "encode": {"kind": "hash", "buckets": BUCKETS}})
    for place, name in enumerate(lists):
        padded = {"kind": "hash", "buckets": BUCKETS, "pad_to": PAD_TO, "mask": f"mask{place}"}
        inputs.append({"tensor": f"list{place}", "features": [name], "encode": padded})
    vectors = {n: {"tensor": f"vector_{n}", "size": size, "codec": codec} for n, (size, codec) in embeddings.items()}
    outputs = {"logits": {task: f"logit_{task}" for task in names}, "embeddings": vectors}
    return Signature.model_validate(
        {"fm": fm, "snapshot_id": snapshot_id, "inputs": inputs, "outputs": outputs, "max_batch": max_batch,
         "golden": golden, "dataset": spec}
    )  # fmt: skip


def export_closed_form(
    path: Path,
    spec: DatasetSpec,
    *,
    fm: str = "closed",
    snapshot_id: str = "s1",
    tasks: Sequence[str] | None = None,
    embeddings: Mapping[str, tuple[int, Codec]] = ONE_EMBEDDING,
    trained_through: datetime = TRAINED_THROUGH,
    shift: float = 0.0,
    max_batch: int = 4096,
    golden: pa.Table | None = None,
    poison: Poison | None = None,
    poison_above: float = 1e6,
) -> Manifest:
    """Export the closed form as a snapshot folder at `path`."""
    signature = closed_form_signature(
        spec, fm=fm, snapshot_id=snapshot_id, tasks=tasks, embeddings=embeddings, max_batch=max_batch, golden=golden
    )
    module = ClosedFormFM(
        tuple(signature.outputs.logits), embeddings, shift=shift, poison=poison, poison_above=poison_above
    )
    return export_snapshot(module, signature, path, trained_through=trained_through)


def expected_supervision(
    rows: pa.Table | pa.RecordBatch | Sequence[Mapping[str, Any]],
    spec: DatasetSpec,
    *,
    tasks: Sequence[str] | None = None,
    embeddings: Mapping[str, tuple[int, Codec]] = ONE_EMBEDDING,
    shift: float = 0.0,
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.uint8]]]:
    """The closed form's logits (B,) by task and encoded embeddings (B, W) by name, by Python loops."""
    names = [task.name for task in spec.tasks] if tasks is None else list(tasks)
    examples = rows.to_pylist() if isinstance(rows, pa.Table | pa.RecordBatch) else list(rows)
    signals = [shift + sum(_part(f, example[f.name]) for f in spec.features) for example in examples]
    logits = {t: np.array([s * (k + 1) / 8 for s in signals], np.float32) for k, t in enumerate(names)}
    encoded = {}
    for place, (name, (size, codec)) in enumerate(embeddings.items()):
        u_BD = [[signal + d - place for d in range(size)] for signal in signals]
        values = np.array([[u / (1 + abs(u)) for u in row] for row in u_BD], np.float32).reshape(len(signals), size)
        encoded[name] = encode(values, codec)
    return logits, encoded


def _part(feature: Feature, value: Any) -> float:
    """What one feature of one example adds to the signal."""
    if feature.type == "float":
        return float(np.float32(NULL_FLOAT if value is None else value))
    if feature.type == "vector":
        packed = np.full(feature.size or 0, NULL_FLOAT, "<f4").tobytes() if value is None else value
        floats = np.frombuffer(packed, "<f4") if isinstance(packed, bytes) else np.array(packed, np.float32)
        return float(floats.astype(np.float64).sum())
    if feature.type == "category":
        return (_bucket(feature, value) % 97) / 64
    return sum(_bucket(feature, element) % 31 for element in (value or [])[:PAD_TO]) / 32


def _bucket(feature: Feature, value: Any) -> int:
    if value is None:
        return 0
    seed = xxhash.xxh64_intdigest(feature.name.encode())
    packed = value.encode() if isinstance(value, str) else value.to_bytes(8, "little", signed=True)
    return xxhash.xxh64_intdigest(packed, seed) % BUCKETS


def _feature(spec: DatasetSpec, name: str) -> Feature:
    return next(feature for feature in spec.features if feature.name == name)
