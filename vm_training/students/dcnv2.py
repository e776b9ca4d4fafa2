"""DCNv2: explicit crosses of all inputs beside a deep network, the parallel form.

B rows, F floats, C categories, M inputs to the crosses, D width of the backbone's output.

Source: Wang et al., DCN V2: Improved Deep & Cross Network, arXiv 2008.13535, section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vm_training.layers import IdTable, mlp


class CrossLayer(nn.Module):
    """One cross: x_0 * (W x + b) + x, elementwise; with a rank W = U V, of that rank."""

    def __init__(self, width: int, *, rank: int | None = None) -> None:
        super().__init__()
        full: nn.Module = nn.Linear(width, width)
        self.weight = (
            full if rank is None else nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
        )

    def forward(self, first_BM: Tensor, x_BM: Tensor) -> Tensor:
        """Give (B, M)."""
        return first_BM * self.weight(x_BM) + x_BM


class Dcnv2(nn.Module):
    """The sizes: num_dense F; num_rows of the table for each of C categories; width of an embedding; crosses; layers.

    Floats are taken as they are: scale them before. The backbone's output has `backbone_width` numbers: the crosses',
    then the deep network's.
    """

    def __init__(
        self,
        *,
        num_dense: int,
        num_rows: Sequence[int],
        width: int = 8,
        num_crosses: int = 2,
        rank: int | None = None,
        hidden: Sequence[int] = (64, 32),
        sparse: bool = False,
    ) -> None:
        super().__init__()
        num_inputs = num_dense + len(num_rows) * width
        self.ids = IdTable(num_rows, width, sparse=sparse)
        self.crosses = nn.ModuleList(CrossLayer(num_inputs, rank=rank) for _ in range(num_crosses))
        self.layers = mlp(num_inputs, hidden)
        self.backbone_width = num_inputs + hidden[-1]
        self.head = nn.Linear(self.backbone_width, 1)

    def backbone(self, dense_BF: Tensor, categories_BC: Tensor) -> Tensor:
        """Give x (B, D)."""
        first_BM = torch.cat([dense_BF, self.ids(categories_BC).flatten(1)], dim=1)
        crossed_BM = first_BM
        for cross in self.crosses:
            crossed_BM = cross(first_BM, crossed_BM)
        return torch.cat([crossed_BM, self.layers(first_BM)], dim=1)

    def logit(self, x_BD: Tensor) -> Tensor:
        """Give the served logit (B,)."""
        return self.head(x_BD).squeeze(1)

    def forward(self, dense_BF: Tensor, categories_BC: Tensor) -> Tensor:
        """Give the served logit (B,)."""
        return self.logit(self.backbone(dense_BF, categories_BC))
