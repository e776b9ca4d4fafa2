"""The stated law of label delays: its median, what lies beyond the window, and that an id decides."""

import numpy as np
import pyarrow as pa
import pytest

from experiments.data.complete_journey import LABEL_WINDOW_SECONDS
from experiments.data.label_delays import build_labels, label_delays

IDS = pa.array([f"impression-{i}" for i in range(100_000)])


def test_delays_follow_the_stated_law() -> None:
    seconds = label_delays(IDS) / 1e6
    assert np.median(seconds) == pytest.approx(6 * 3600, rel=0.02)
    assert (seconds > LABEL_WINDOW_SECONDS).mean() == pytest.approx(0.01, abs=0.001)
    assert seconds.min() > 0


def test_an_id_has_one_delay_wherever_it_stands() -> None:
    assert label_delays(IDS[::-1]).tolist() == label_delays(IDS)[::-1].tolist()


def test_only_purchases_are_reported_in_the_order_of_their_time() -> None:
    impressions = pa.table(
        {
            "example_id": IDS[:1000],
            "event_time": pa.array(np.arange(1000) * 10**9).cast(pa.timestamp("us", "UTC")),
            "purchase": pa.array([float(i % 10 == 0) for i in range(1000)]),
        }
    )
    labels = build_labels(impressions)
    times = labels["label_time"].cast(pa.int64()).to_numpy()
    assert sorted(labels["example_id"].to_pylist()) == sorted(f"impression-{i}" for i in range(0, 1000, 10))
    assert (np.diff(times) >= 0).all()
    assert set(labels["purchase"].to_pylist()) == {1.0}
