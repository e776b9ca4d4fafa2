"""Logits of sampled rows: the shift is what counting the rows that are kept gives."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.plain import probability, shifted
from vm_training.sampling import to_full_traffic, to_sampled


@given(st.integers(1, 1000), st.integers(1, 1000), st.integers(1, 10))
def test_a_rate_becomes_what_is_counted_among_the_rows_kept(positives: int, negatives: int, one_in: int) -> None:
    full = torch.tensor([math.log(positives / (negatives * one_in))], dtype=torch.float64)
    kept = to_sampled(full, 1 / one_in)
    assert kept.sigmoid().item() == pytest.approx(positives / (positives + negatives))
    assert to_full_traffic(kept, 1 / one_in).item() == pytest.approx(full.item())


@given(st.floats(-20, 20), st.floats(0.001, 1))
def test_the_way_back_is_the_formula_of_the_source(logit: float, rate: float) -> None:
    q = probability(logit)
    back = to_full_traffic(torch.tensor([logit], dtype=torch.float64), rate)
    assert back.sigmoid().item() == pytest.approx(q / (q + (1 - q) / rate), rel=1e-9)
    assert shifted(back.sigmoid().item(), rate) == pytest.approx(q, rel=1e-9)


@pytest.mark.parametrize("rate", [0.0, -0.5, 1.5, math.nan])
def test_a_rate_that_is_no_share_is_refused(rate: float) -> None:
    for shift in (to_sampled, to_full_traffic):
        with pytest.raises(ValueError, match="it is the share kept, above 0 and at most 1"):
            shift(torch.zeros(1), rate)
