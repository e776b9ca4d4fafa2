"""A logit where all rows count, and where only a share of the negative rows was kept to train on.

Of rows with the positive rate p, all positives and the share r of the negatives are kept: among those the rate is
q = p / (p + (1 - p) r), so a model trained on them says q. In logits the way there is a shift: z_q = z_p - ln(r).
Back it is p = q / (q + (1 - q) / r), which is z_p = z_q + ln(r).

An FM that was trained on full traffic speaks of p; a student that keeps the share r learns q, so what the FM said is
shifted before the student takes it as a target.

Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014, section 6.3.
"""

import math
from collections.abc import Mapping

from torch import Tensor


def to_sampled(logit_B: Tensor, sampling_rate: float) -> Tensor:
    """Give the logits among the rows kept, for logits of full traffic: z - ln(r).

    sampling_rate: the share r of the negatives that is kept; 1 changes nothing.

    Raises:
        ValueError: The rate is not above 0 and at most 1.
    """
    return logit_B if sampling_rate == 1 else logit_B - _log_rate(sampling_rate)


def to_full_traffic(logit_B: Tensor, sampling_rate: float) -> Tensor:
    """Give the logits of full traffic, for logits among the rows kept: z + ln(r); what a student serves.

    Raises:
        ValueError: The rate is not above 0 and at most 1.
    """
    return logit_B if sampling_rate == 1 else logit_B + _log_rate(sampling_rate)


def refuse_rates(sampling_rates: Mapping[str, float]) -> None:
    """Raise ValueError unless each task's rate is above 0 and at most 1."""
    for task, rate in sampling_rates.items():
        if not 0 < rate <= 1:
            raise ValueError(f"sampling rate {rate} of task {task}: it is the share kept, above 0 and at most 1")


def _log_rate(sampling_rate: float) -> float:
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling rate {sampling_rate}: it is the share kept, above 0 and at most 1")
    return math.log(sampling_rate)
