"""When the label of an impression arrives. The data has no delay, so this is a stated law, and no more than that.

The delay from the impression to its label is lognormal with a median of 6 hours; 1 % of the delays are longer than the
label window of 3 days. What is drawn for an impression follows from its example_id, so that every run draws the same.
Only purchases are reported: an impression without one until its window is over is a negative.
"""

import math
from datetime import timedelta
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from experiments.data.complete_journey import LABEL_COLUMN, LABEL_WINDOW_SECONDS
from schemas import keys

MEDIAN: Final = timedelta(hours=6)
BEYOND_WINDOW: Final = 0.01
_SIGMA: Final = math.log(LABEL_WINDOW_SECONDS / MEDIAN.total_seconds()) / NormalDist().inv_cdf(1 - BEYOND_WINDOW)


def label_delays(example_ids: pa.Array) -> npt.NDArray[np.int64]:
    """Give the delays of the labels of these impressions in microseconds, (B,)."""
    hash_B = keys.example_hashes(keys.digest_array(example_ids)).view(np.uint64)
    uniform_B = ((hash_B >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    normal_B = torch.special.ndtri(torch.from_numpy(uniform_B)).numpy()
    seconds_B = MEDIAN.total_seconds() * np.exp(_SIGMA * normal_B)
    return np.minimum(seconds_B * 1e6, 2.0**60).astype(np.int64)


def build_labels(impressions: pa.Table) -> pa.Table:
    """Give the labels that impressions will get: example_id, label_time and the task, in the order of label_time."""
    bought = impressions.filter(pa.compute.equal(impressions[LABEL_COLUMN], 1.0))
    ids = pa.concat_arrays(bought["example_id"].chunks or [pa.array([], pa.string())])
    times = bought["event_time"].cast(pa.int64()).to_numpy() + label_delays(ids)
    labels = pa.table(
        {
            "example_id": ids,
            "label_time": pa.array(times).cast(pa.timestamp("us", "UTC")),
            LABEL_COLUMN: bought[LABEL_COLUMN].cast(pa.float32()),
        }
    )
    return labels.take(pa.array(np.argsort(times, kind="stable")))
