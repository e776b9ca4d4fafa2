"""A plain student: embeddings and floats side by side, then fully connected layers.

B rows, F floats, C categories, D width of the backbone's output.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vm_training.layers import IdTable, mlp


class Mlp(nn.Module):
    """The sizes: num_dense F; num_rows of the table for each of C categories; width of an embedding; hidden layers.

    Floats are taken as they are: scale them before. The backbone's output has `backbone_width` numbers.
    """

    def __init__(
        self,
        *,
        num_dense: int,
        num_rows: Sequence[int],
        width: int = 8,
        hidden: Sequence[int] = (64, 32),
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.ids = IdTable(num_rows, width, sparse=sparse)
        self.layers = mlp(num_dense + len(num_rows) * width, hidden)
        self.backbone_width = hidden[-1]
        self.head = nn.Linear(self.backbone_width, 1)

    def backbone(self, dense_BF: Tensor, categories_BC: Tensor) -> Tensor:
        """Give x (B, D)."""
        return self.layers(torch.cat([dense_BF, self.ids(categories_BC).flatten(1)], dim=1))

    def logit(self, x_BD: Tensor) -> Tensor:
        """Give the served logit (B,)."""
        return self.head(x_BD).squeeze(1)

    def forward(self, dense_BF: Tensor, categories_BC: Tensor) -> Tensor:
        """Give the served logit (B,)."""
        return self.logit(self.backbone(dense_BF, categories_BC))
