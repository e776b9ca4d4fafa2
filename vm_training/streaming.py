"""Metrics of more rows than fit in memory: batch by batch on the device, and parts of a run add up.

Normalised entropy, log-loss and calibration come from sums and are those of all rows at once, but for rounding. An
exact AUC would need every row, so rows are counted in a histogram of their logits, by class: pairs in different bins
are told exactly, the pairs within a bin count half, as ties do. A pair of one bin is 0, 1/2 or 1 in truth, so the error
is at most half the share of the pairs that meet in a bin, which the histogram itself gives:

    |AUC - auc.value| <= auc.error = sum over bins of positives * negatives / (2 * all positives * all negatives)

Resolution: `bins` of equal width over logits from -limit to limit, what lies beyond counts in the first and the last;
by default 65 536 over [-32, 32), so 1/1024 of a logit, in 1 MiB. The error is at most half the largest share of one
class that lies in one bin: 1/2048 where neither class puts more than all of its mass on a unit of logits, evenly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, where

from schemas.evaluation import Fit
from vm_training.torch_metrics import sums


@dataclass(frozen=True, slots=True)
class BoundedAuc:
    """The AUC is within `error` of `value`."""

    value: float
    error: float


class StreamingMetrics:
    """Sums and a histogram over all rows that `update` was given; `+` gives those of both.

    Over ranks, add up both tensors: torch.distributed.all_reduce(metrics.totals), and of metrics.counts.

    totals: float64 (6,): rows, labels, predictions, log-loss, logits that are NaN, labels that are neither 0 nor 1.
    counts: int64 (2, bins): negatives and positives by logit.
    """

    def __init__(self, *, device: torch.device | str = "cpu", bins: int = 65_536, limit: float = 32.0) -> None:
        if bins < 1 or limit <= 0:
            raise ValueError(f"bins={bins} and limit={limit}: at least one bin, and a limit above 0")
        self.bins, self.limit = bins, limit
        self.totals = torch.zeros(6, dtype=torch.float64, device=device)
        self.counts = torch.zeros((2, bins), dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, logit_B: Tensor, label_B: Tensor, labeled_B: Tensor | None = None) -> None:
        """Count these rows, where labelled (labeled_B None: all); waits for no device.

        logit_B raw, label_B of 0 and 1; where labeled_B is False both may hold anything.

        Raises:
            ValueError: The shapes are not one (B,).
        """
        mask_B = torch.ones_like(label_B, dtype=torch.bool) if labeled_B is None else labeled_B
        if logit_B.dim() != 1 or not logit_B.shape == label_B.shape == mask_B.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (logit_B, label_B, mask_B))
            raise ValueError(f"one value per row is needed, the shapes are {shapes}")
        is_nan_B, is_other_B = mask_B & logit_B.isnan(), mask_B & (label_B != 0) & (label_B != 1)
        refused = torch.stack([is_nan_B.sum(), is_other_B.sum()])
        self.totals += torch.cat([sums(logit_B, label_B, mask_B), refused])
        # float64: near a power of two a float32 logit would be counted one bin beside its own
        place_B = (where(mask_B & ~is_nan_B, logit_B, 0.0).double() + self.limit) * (self.bins / (2 * self.limit))
        bin_B = place_B.clamp(0, self.bins - 1).long() + self.bins * (label_B == 1)
        self.counts.view(-1).scatter_add_(0, bin_B, mask_B.long())

    def __add__(self, other: "StreamingMetrics") -> "StreamingMetrics":
        """Give the metrics over both's rows, on this one's device.

        Raises:
            ValueError: Their histograms have other bins.
        """
        if (self.bins, self.limit) != (other.bins, other.limit):
            mine, theirs = f"{self.bins} bins to {self.limit}", f"{other.bins} bins to {other.limit}"
            raise ValueError(f"histograms of {mine} and of {theirs} do not add up")
        both = StreamingMetrics(device=self.totals.device, bins=self.bins, limit=self.limit)
        both.totals += self.totals + other.totals.to(self.totals.device)
        both.counts += self.counts + other.counts.to(self.counts.device)
        return both

    def fit(self) -> Fit:
        """Give the sums as `Fit`, whose properties are normalised entropy and calibration; waits for the device.

        Raises:
            ValueError: A logit was NaN, or a label neither 0 nor 1.
        """
        rows, labels, predictions, loss, num_nan, num_other = self.totals.tolist()
        if num_nan or num_other:
            raise ValueError(f"of {rows:.0f} rows {num_nan:.0f} logits are NaN, {num_other:.0f} labels are not 0 or 1")
        return Fit(rows=int(rows), labels=labels, predictions=predictions, loss=loss)

    def auc(self) -> BoundedAuc:
        """Give the AUC and how far it may be off; waits for the device.

        Raises:
            ValueError: A logit was NaN, a label neither 0 nor 1, or labels are of one class.
        """
        fit = self.fit()
        if fit.labels in {0, fit.rows}:
            raise ValueError(f"both classes are needed, {fit.labels:.0f} of {fit.rows} labels are 1")
        negatives, positives = self.counts.double()
        below = negatives.cumsum(0) - negatives
        pairs, tied = fit.labels * (fit.rows - fit.labels), float((positives * negatives).sum())
        return BoundedAuc(value=(float((positives * below).sum()) + tied / 2) / pairs, error=tied / 2 / pairs)
