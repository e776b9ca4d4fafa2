"""Intervals over seeds: against tables, against what a hand computes, and by how often they hold the truth."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vm_training.intervals import Interval, bootstrap_interval, paired_interval, t_quantile, transfer_ratio

gains = st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=8)
VM = [0.010, 0.014, 0.012, 0.011, 0.013]
FM = [0.020, 0.030, 0.022, 0.024, 0.027]


@pytest.mark.parametrize(
    ("freedom", "level", "expected"),
    [  # NIST/SEMATECH e-Handbook of Statistical Methods, table 1.3.6.7.2
        (1, 0.95, 12.706),
        (2, 0.95, 4.303),
        (4, 0.95, 2.776),
        (4, 0.99, 4.604),
        (9, 0.90, 1.833),
        (10, 0.95, 2.228),
        (99, 0.95, 1.984),
    ],
)
def test_quantiles_of_t_are_those_of_the_tables(freedom: int, level: float, expected: float) -> None:
    assert t_quantile(freedom, level) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("freedom", "level"), [(0, 0.95), (4, 0.0), (4, 1.0)])
def test_quantiles_that_do_not_exist_are_refused(freedom: int, level: float) -> None:
    with pytest.raises(ValueError, match="at least 1, and between 0 and 1"):
        t_quantile(freedom, level)


def test_the_interval_of_five_seeds_is_what_a_hand_computes() -> None:
    found = paired_interval([1, 2, 3, 4, 5])
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert (found.estimate, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half))
    assert found.is_clear_of_zero
    assert not paired_interval([-1, 2, 3]).is_clear_of_zero
    assert paired_interval([-3, -2, -3.5]).is_clear_of_zero


def test_the_bootstrap_of_two_seeds_knows_only_their_values() -> None:
    assert bootstrap_interval([0.0, 1.0]) == Interval(estimate=0.5, low=0.0, high=1.0)


@given(gains)
def test_the_bootstrap_lies_within_the_gains_and_is_the_same_again(values: list[float]) -> None:
    found = bootstrap_interval(values, num_resamples=200)
    assert min(values) - 1e-9 <= found.low <= found.high <= max(values) + 1e-9
    assert found == bootstrap_interval(values, num_resamples=200)


def test_t_covers_what_it_says_of_five_seeds_and_the_bootstrap_less() -> None:
    random = np.random.default_rng(0)
    samples = random.normal(0.3, 1, (1500, 5))
    by_t = [paired_interval(sample) for sample in samples]
    by_bootstrap = [bootstrap_interval(sample, num_resamples=400) for sample in samples]
    assert np.mean([each.low <= 0.3 <= each.high for each in by_t]) == pytest.approx(0.95, abs=0.02)
    assert np.mean([each.low <= 0.3 <= each.high for each in by_bootstrap]) == pytest.approx(0.84, abs=0.03)


def test_the_transfer_ratio_is_the_vms_mean_gain_over_the_fms() -> None:
    found = transfer_ratio(VM, FM)
    assert found.undefined is None
    assert found.by_fieller is not None
    assert found.by_bootstrap is not None
    assert found.by_fieller.estimate == found.by_bootstrap.estimate == pytest.approx(np.mean(VM) / np.mean(FM))
    assert found.vm_gain == paired_interval(VM)
    assert found.fm_gain == paired_interval(FM)


@given(gains, st.data())
def test_fiellers_bounds_are_the_ratios_at_which_t_begins_to_exclude_zero(vm: list[float], data: st.DataObject) -> None:
    fm = data.draw(st.lists(st.floats(1, 2, width=32), min_size=len(vm), max_size=len(vm)))
    found = transfer_ratio(vm, fm, num_resamples=10)
    assume(found.by_fieller is not None)
    assert found.by_fieller is not None
    for bound in (found.by_fieller.low, found.by_fieller.high):
        rest = paired_interval(np.array(vm) - bound * np.array(fm))
        edge = min(abs(rest.low), abs(rest.high))
        assert edge == pytest.approx(0, abs=1e-6 * (1 + abs(bound)))


def test_fiellers_interval_holds_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    held = []
    for _ in range(1500):
        seed_S = random.normal(0, 0.2, 5)  # what both have of their seed
        vm, fm = 0.5 + seed_S + random.normal(0, 0.1, 5), 1 + seed_S + random.normal(0, 0.1, 5)
        found = transfer_ratio(vm, fm, num_resamples=2).by_fieller
        held.append(found is not None and found.low <= 0.5 <= found.high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_an_fm_of_one_seed_scales_the_vms_interval() -> None:
    found = transfer_ratio(VM, [0.02] * 5).by_fieller
    vm = paired_interval(VM)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((vm.low / 0.02, vm.high / 0.02))


@pytest.mark.parametrize(
    ("fm_gain", "why"),
    [([0.02, -0.01, 0.01, 0.0, -0.01], "contains 0"), ([-0.02, -0.021, -0.019, -0.02, -0.02], "lies below 0")],
)
def test_there_is_no_ratio_to_a_gain_that_may_be_none(fm_gain: list[float], why: str) -> None:
    found = transfer_ratio(VM, fm_gain)
    assert (found.by_fieller, found.by_bootstrap) == (None, None)
    assert found.undefined is not None
    assert found.undefined.startswith("the 95% interval of the FM's gain, -0.0")
    assert found.undefined.endswith(why)


@pytest.mark.parametrize("values", [[], [1.0], [[1.0, 2.0]], [1.0, math.nan], [1.0, math.inf]])
def test_gains_that_give_no_interval_are_refused(values: list[float]) -> None:
    for interval in (paired_interval, bootstrap_interval):
        with pytest.raises(ValueError, match=r"two seeds at least|not finite"):
            interval(values)


def test_gains_that_are_not_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 5 of the VM and 4 of the FM"):
        transfer_ratio(VM, FM[:4])
