"""The metrics of `vm_training.metrics` for tensors, exact, on their device: nothing is copied to numpy.

Logits are raw, labels 0 and 1, both (B,); labeled_B says which rows have a label (None: all have). Each function gives
a float64 tensor of no dimensions and does not wait for the device, so what numpy's raise ValueError for is NaN here: no
rows, labels of one class (normalised entropy, AUC), no positive label (calibration), a logit that is NaN.
"""

import torch
from torch import Tensor, where


def log_loss(logit_B: Tensor, label_B: Tensor, labeled_B: Tensor | None = None) -> Tensor:
    """Give the mean of -ln P(label), in nats; a logit of the wrong infinity costs infinity."""
    rows, _, _, loss = sums(logit_B, label_B, labeled_B)
    return loss / rows


def normalized_entropy(logit_B: Tensor, label_B: Tensor, labeled_B: Tensor | None = None) -> Tensor:
    """Give mean log-loss / H(p), p the positive rate of these labels; 1 is what the base rate alone reaches."""
    rows, labels, _, loss = sums(logit_B, label_B, labeled_B)
    rate = labels / rows
    entropy = -(rate * rate.log() + (1 - rate) * (-rate).log1p())  # of one class 0 * -inf: NaN, as promised
    return loss / rows / entropy


def calibration(logit_B: Tensor, label_B: Tensor, labeled_B: Tensor | None = None) -> Tensor:
    """Give sum of predictions / sum of labels: above 1 says too much, below 1 too little."""
    _, labels, predictions, _ = sums(logit_B, label_B, labeled_B)
    return where(labels > 0, predictions / labels, torch.nan)


def auc(score_B: Tensor, label_B: Tensor, labeled_B: Tensor | None = None) -> Tensor:
    """Give the share of (positive, negative) pairs that the scores put in order, a tie counting half; exact.

    Time O(B log B), memory O(B); `vm_training.streaming` bounds the memory.
    """
    score_B, order_B = score_B.detach().sort()
    counted_B = _mask(label_B, labeled_B)[order_B]
    positive_B = counted_B & (label_B[order_B] == 1)
    negatives = torch.nn.functional.pad((counted_B & ~positive_B).cumsum(0), (1, 0))
    below_B = negatives[torch.searchsorted(score_B, score_B)]
    up_to_B = negatives[torch.searchsorted(score_B, score_B, right=True)]
    pairs_twice = where(positive_B, below_B + up_to_B, 0).sum()  # whole numbers: exact up to 2**63
    share = pairs_twice / (2.0 * positive_B.sum().double() * negatives[-1])
    return where((score_B.isnan() & counted_B).any(), torch.nan, share)


@torch.no_grad()
def sums(logit_B: Tensor, label_B: Tensor, labeled_B: Tensor | None = None) -> Tensor:
    """Give (4,) float64 over the labelled rows: how many, their labels, the predictions, the log-loss in nats.

    They add up, as those of schemas.evaluation.Fit do.
    """
    mask_B = _mask(label_B, labeled_B)
    logit_B, label_B = where(mask_B, logit_B, 0.0).double(), where(mask_B, label_B, 0.0).double()
    wrong_B = where(label_B == 1, -logit_B, logit_B)
    loss_B = torch.logaddexp(wrong_B, torch.zeros_like(wrong_B))
    per_row = torch.stack([torch.ones_like(logit_B), label_B, logit_B.sigmoid(), loss_B])
    return where(mask_B, per_row, 0.0).sum(dim=1)


def _mask(label_B: Tensor, labeled_B: Tensor | None) -> Tensor:
    return torch.ones_like(label_B, dtype=torch.bool) if labeled_B is None else labeled_B
