"""The two FMs of the measurements: one that costs next to nothing, and one whose forward is what a worker waits for."""

from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from fm_inference import Signature, export_snapshot
from loadtest.workload import SPEC, START
from schemas.snapshot import Manifest

BUCKETS = 10_000
MAX_BATCH = 32_768
EMBEDDING_SIZE = 64
_NUM_CATEGORIES, _NUM_FLOATS = 26, 13
_WIDTH, _HIDDEN = 64, (1024, 512, 256)


class NearlyFreeFM(nn.Module):
    """Two logits and a 64-d embedding from sums: next to no work, so that the path around the model is measured."""

    def forward(self, *, cat: torch.Tensor, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take cat (B, 26) int64 and dense (B, 13) float32."""
        signal_B = dense.sum(1) + (cat % 97).sum(1) / 1024
        z_BD = torch.tanh(signal_B[:, None] * torch.arange(1, EMBEDDING_SIZE + 1, device=signal_B.device) / 64)
        return {"click": signal_B / 8, "buy": signal_B / 16, "z": z_BD}


class ComputeBoundFM(nn.Module):
    """26 embeddings of 64, three dense layers (1,024, 512, 256) and two heads: 4.8 MFLOP a row."""

    offsets: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(_NUM_CATEGORIES * BUCKETS, _WIDTH)
        self.register_buffer("offsets", torch.arange(_NUM_CATEGORIES) * BUCKETS)
        widths = (_NUM_CATEGORIES * _WIDTH + _NUM_FLOATS, *_HIDDEN)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.heads = nn.Linear(_HIDDEN[-1], 2)
        self.project = nn.Linear(_HIDDEN[-1], EMBEDDING_SIZE)

    def forward(self, *, cat: torch.Tensor, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take cat (B, 26) int64 and dense (B, 13) float32."""
        h_BD = torch.cat([self.table(cat + self.offsets).flatten(1), dense], dim=1)
        for layer in self.layers:
            h_BD = torch.relu(layer(h_BD))
        logit_BK = self.heads(h_BD)
        return {"click": logit_BK[:, 0], "buy": logit_BK[:, 1], "z": torch.tanh(self.project(h_BD))}


FMS: dict[str, type[nn.Module]] = {"free": NearlyFreeFM, "compute_bound": ComputeBoundFM}


def export(fm: str, folder: Path, *, snapshot_id: str = "s1", name: str | None = None) -> Manifest:
    """Write the FM as a snapshot folder, trained through the beginning of the workload; give its manifest.

    name: of the FM in the service, default the same.
    """
    signature = Signature.model_validate(
        {
            "fm": name or fm, "snapshot_id": snapshot_id, "max_batch": MAX_BATCH, "dataset": SPEC,
            "inputs": [
                {"tensor": "cat", "features": _named("category"), "encode": {"kind": "hash", "buckets": BUCKETS}},
                {"tensor": "dense", "features": _named("float"), "encode": {"kind": "float"}},
            ],
            "outputs": {
                "logits": {"click": "click", "buy": "buy"},
                "embeddings": {"hidden": {"tensor": "z", "size": EMBEDDING_SIZE, "codec": "float16"}},
            },
        }
    )  # fmt: skip
    return export_snapshot(FMS[fm](), signature, folder, trained_through=START)


def _named(kind: str) -> list[str]:
    return [feature.name for feature in SPEC.features if feature.type == kind]
