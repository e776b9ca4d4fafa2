"""Layers that heads and reference students are made of. B rows, C categories, W width of an embedding."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(
    width: int, hidden: Sequence[int], *, out: int | None = None, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Give linear layers with an activation behind each, and with `out` a last linear layer without one."""
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), activation()]
        width = size
    if out is not None:
        layers.append(nn.Linear(width, out))
    return nn.Sequential(*layers)


class IdTable(nn.Module):
    """Embeddings of C features in one table, each feature in rows of its own.

    num_rows: by feature, in the order of categories_BC; an id (any int64: a hash, a bucket, a number) stands for the
    row id modulo num_rows. sparse: gradients of the rows used alone, which a large table needs, and an optimizer that
    takes them (SGD, Adagrad, SparseAdam).
    """

    num_rows_C: Tensor
    first_C: Tensor

    def __init__(self, num_rows: Sequence[int], width: int, *, sparse: bool = False) -> None:
        super().__init__()
        rows_C = torch.tensor(list(num_rows), dtype=torch.int64)
        self.register_buffer("num_rows_C", rows_C, persistent=False)
        self.register_buffer("first_C", rows_C.cumsum(0) - rows_C, persistent=False)
        self.table = nn.Embedding(max(1, sum(num_rows)), width, sparse=sparse)
        nn.init.normal_(self.table.weight, std=0.01)

    def forward(self, id_BC: Tensor) -> Tensor:
        """Give (B, C, W)."""
        return self.table(id_BC % self.num_rows_C + self.first_C)
