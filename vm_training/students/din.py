"""DIN: what a user did before, each event weighed by how it bears on the item at hand.

B rows, F floats, C categories, N events of all histories, W width of an embedding, D width of the backbone's output.

Source: Zhou et al., Deep Interest Network for Click-Through Rate Prediction, arXiv 1706.06978, section 4.3. The weights
are not normalised, as there; ReLU in place of Dice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vm_training.layers import IdTable, mlp


class TargetAttention(nn.Module):
    """Sums a row's events, each times MLP([q, k, q - k, q * k]): q the item at hand, k the event."""

    def __init__(self, width: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.score = mlp(4 * width, hidden, out=1)

    def forward(self, item_BW: Tensor, history_NW: Tensor, offsets: Tensor) -> Tensor:
        """Give (B, W), zeros where a row has no event; row i has the events offsets[i] up to offsets[i + 1]."""
        place_N = torch.arange(history_NW.shape[0], device=offsets.device)
        row_N = torch.searchsorted(offsets, place_N, right=True) - 1
        query_NW = item_BW[row_N]
        pair = [query_NW, history_NW, query_NW - history_NW, query_NW * history_NW]
        weighed_NW = self.score(torch.cat(pair, dim=1)) * history_NW
        return torch.zeros_like(item_BW).index_add(0, row_N, weighed_NW)


class Din(nn.Module):
    """The sizes: as `mlp.Mlp`, num_items rows of the table that the item at hand and the history share, and attention.

    An item must have the same number in both, so ask the loader for it as it is: an int64 feature and an int64 list
    that `buckets` does not name (a hash is of the value and of its feature's name). Floats are taken as they are.
    """

    def __init__(
        self,
        *,
        num_dense: int,
        num_rows: Sequence[int],
        num_items: int,
        width: int = 8,
        hidden: Sequence[int] = (64, 32),
        attention: Sequence[int] = (32,),
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.ids = IdTable(num_rows, width, sparse=sparse)
        self.items = IdTable([num_items], width, sparse=sparse)
        self.attention = TargetAttention(width, attention)
        self.layers = mlp(num_dense + (len(num_rows) + 2) * width, hidden)
        self.backbone_width = hidden[-1]
        self.head = nn.Linear(self.backbone_width, 1)

    def backbone(
        self, dense_BF: Tensor, categories_BC: Tensor, item_B: Tensor, history_N: Tensor, offsets: Tensor
    ) -> Tensor:
        """Give x (B, D); history_N and offsets are `Batch.lists[name].values_N` and `.offsets`."""
        item_BW, history_NW = self.items(item_B[:, None]).squeeze(1), self.items(history_N[:, None]).squeeze(1)
        interest_BW = self.attention(item_BW, history_NW, offsets)
        return self.layers(torch.cat([dense_BF, self.ids(categories_BC).flatten(1), item_BW, interest_BW], dim=1))

    def logit(self, x_BD: Tensor) -> Tensor:
        """Give the served logit (B,)."""
        return self.head(x_BD).squeeze(1)

    def forward(
        self, dense_BF: Tensor, categories_BC: Tensor, item_B: Tensor, history_N: Tensor, offsets: Tensor
    ) -> Tensor:
        """Give the served logit (B,)."""
        return self.logit(self.backbone(dense_BF, categories_BC, item_B, history_N, offsets))
