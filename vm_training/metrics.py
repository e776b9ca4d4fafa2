"""What an evaluation reports of logits and labels: normalised entropy, AUC and calibration, to be read together.

One alone misleads: AUC says nothing of the level of the predictions, calibration nothing of their order. Logits are raw
(before the sigmoid), labels are 0 and 1 (numbers or booleans), both of shape (B,). Everything is computed in float64;
log-loss comes from the logits, so that a confident logit costs what it should and never infinity. Rows without a label
are the caller's to leave out.
"""

import numpy as np
import numpy.typing as npt

from schemas.evaluation import fit_of

Floats = npt.NDArray[np.float64]


def normalized_entropy(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Give mean log-loss / H(p), p the positive rate of these labels; 1 is what the base rate alone reaches.

    Raises:
        ValueError: There are no rows, the labels are of one class (H is 0), a label is not 0 or 1, a logit is NaN, or
            the shapes differ.
    """
    return fit_of(*_rows(logits, labels)).normalized_entropy


def log_loss(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Give the mean of -ln P(label), in nats; a logit of the wrong infinity costs infinity.

    Raises:
        ValueError: There are no rows, a label is not 0 or 1, a logit is NaN, or the shapes differ.
    """
    fit = fit_of(*_rows(logits, labels))
    return fit.loss / fit.rows


def auc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Give the share of (positive, negative) pairs that the scores put in order, a tie counting half; exact.

    Any increasing function of the prediction will do for scores. Time O(B log B).

    Raises:
        ValueError: There are no rows, the labels are of one class, a label is not 0 or 1, a score is NaN, or the
            shapes differ.
    """
    score, label = _rows(scores, labels)
    _positive_rate(label)
    order = np.argsort(score, kind="stable")
    score, is_positive = score[order], label[order] == 1
    first = np.flatnonzero(np.concatenate([[True], score[1:] != score[:-1]]))
    positives = np.add.reduceat(is_positive, first, dtype=np.int64)
    negatives = np.diff(np.append(first, len(score))) - positives
    below = np.cumsum(negatives) - negatives
    pairs_twice = int(np.sum(positives * (2 * below + negatives)))
    return pairs_twice / (2 * int(positives.sum()) * int(negatives.sum()))


def calibration(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Give sum of predictions / sum of labels: above 1 says too much, below 1 too little.

    Raises:
        ValueError: There are no rows or no positive label, a label is not 0 or 1, a logit is NaN, or the shapes differ.
    """
    return fit_of(*_rows(logits, labels)).calibration


def _positive_rate(label: Floats) -> float:
    rate = float(label.mean())
    if rate in {0.0, 1.0}:
        raise ValueError(f"both classes are needed, all {len(label)} labels are {rate:.0f}")
    return rate


def _rows(values: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Floats]:
    value, label = np.asarray(values, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if value.ndim != 1 or value.shape != label.shape:
        raise ValueError(f"one value and one label per row are needed, the shapes are {value.shape} and {label.shape}")
    if len(label) == 0:
        raise ValueError("there are no rows")
    if np.isnan(value).any():
        raise ValueError(f"{int(np.isnan(value).sum())} of {len(value)} values are NaN")
    if not np.isin(label, (0.0, 1.0)).all():
        raise ValueError("a label is not 0 or 1")
    return value, label
