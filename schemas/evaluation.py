"""How well logits say labels: sums over rows that add up, and what is made of them. float64, numpy alone.

Logits are raw (before the sigmoid), labels lie in [0, 1]; log-loss comes from the logits, so that a confident logit
costs what it should and never more than it must. Normalised entropy says nothing of one class of labels alone.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Sums over rows: how many, their labels, the predictions, and the log-loss in nats."""

    rows: int = 0
    labels: float = 0.0
    predictions: float = 0.0
    loss: float = 0.0

    def __add__(self, other: "Fit") -> "Fit":
        """Give the sums over both's rows."""
        return Fit(
            rows=self.rows + other.rows,
            labels=self.labels + other.labels,
            predictions=self.predictions + other.predictions,
            loss=self.loss + other.loss,
        )

    @property
    def normalized_entropy(self) -> float:
        """Mean log-loss / H(p), p the mean label; 1 is what the base rate alone reaches.

        Raises:
            ValueError: There are no rows, or the labels are of one class (H is 0).
        """
        if self.rows == 0:
            raise ValueError("there are no rows")
        rate = self.labels / self.rows
        if rate in {0.0, 1.0}:
            raise ValueError(f"both classes are needed, all {self.rows} labels are {rate:.0f}")
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return float(self.loss / self.rows / entropy)

    @property
    def calibration(self) -> float:
        """Sum of predictions / sum of labels: above 1 says too much, below 1 too little.

        Raises:
            ValueError: There is no label above 0.
        """
        if self.labels == 0:
            raise ValueError("calibration needs a positive label, there is none")
        return self.predictions / self.labels


def fit_of(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.float64]) -> Fit:
    """Give the sums over these rows; a logit of the wrong infinity costs infinity, of the right one nothing."""
    zeros = np.zeros(len(logits))
    loss = np.multiply(labels, np.logaddexp(0.0, -logits), where=labels > 0, out=zeros.copy())
    loss += np.multiply(1 - labels, np.logaddexp(0.0, logits), where=labels < 1, out=zeros)
    small = np.exp(-np.abs(logits))
    predictions = np.where(logits >= 0, 1.0, small) / (1.0 + small)
    return Fit(
        rows=len(logits),
        labels=float(labels.sum()),
        predictions=float(predictions.sum()),
        loss=float(loss.sum()),
    )
