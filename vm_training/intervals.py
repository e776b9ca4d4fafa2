"""How sure a difference between two ways of training is, from runs that share their seeds; and the transfer ratio.

Runs are paired: run s of both ways has the same seed, so what a seed does to both falls out of their difference, which
is most of the noise. Each value here is of one seed (S of them), as a gain: NE without - NE with, so that above 0 is
better. An interval of seeds says how much another seed would move the result on these rows; it knows nothing of other
rows.

Two intervals stand side by side:

- Student's t of the paired differences, the one to decide by. With few seeds the percentile bootstrap is too narrow: it
  divides the spread by S, not S - 1, and has not t's tails. Of five normal differences it is 0.62 as wide as t's, and
  covers 84 % where it says 95 % (20 000 simulated sets, 1 000 resamples each). t is exact if the differences are
  normal, which sums over many thousand rows make plausible.
- The paired bootstrap (whole seeds are drawn), which assumes no shape: where the two disagree by much more than that
  factor, one seed is unlike the others and is worth a look.

float64, numpy alone.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate, and between which bounds it lies: low <= high."""

    estimate: float
    low: float
    high: float

    @property
    def is_clear_of_zero(self) -> bool:
        """Whether 0 is outside."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRatio:
    """What share of the FM's gain the VM took over: mean VM gain / mean FM gain, or why there is none.

    by_fieller and by_bootstrap are None where the ratio is undefined, and `undefined` says why.
    """

    vm_gain: Interval
    fm_gain: Interval
    by_fieller: Interval | None = None
    by_bootstrap: Interval | None = None
    undefined: str | None = None


def paired_interval(gain_S: npt.ArrayLike, *, level: float = 0.95) -> Interval:
    """Give the mean gain and its Student's t interval, from the gain of each seed.

    Raises:
        ValueError: There are fewer than two seeds, or a gain is not finite.
    """
    gains = _gains(gain_S)
    half = _half_width(gains, level)
    mean = float(gains.mean())
    return Interval(estimate=mean, low=mean - half, high=mean + half)


def bootstrap_interval(
    gain_S: npt.ArrayLike, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Give the mean gain and its percentile interval over resampled seeds; the same for the same seed.

    Raises:
        ValueError: There are fewer than two seeds, or a gain is not finite.
    """
    gains = _gains(gain_S)
    means = gains[_resampled(len(gains), num_resamples, seed)].mean(axis=1)
    return _percentiles(float(gains.mean()), means, level)


def transfer_ratio(
    vm_gain_S: npt.ArrayLike,
    fm_gain_S: npt.ArrayLike,
    *,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> TransferRatio:
    """Give the NE gain of the VM / the NE gain of the FM, paired by seed, with two intervals.

    Fieller's interval is t's for a ratio of paired means; it is bounded just where the FM's own t interval leaves out
    0. Where that does not lie above 0 the FM's gain is noise or a loss, and there is no ratio to speak of. An FM of one
    seed under students of several has one gain, repeated: its own spread is then in no interval.

    Raises:
        ValueError: There are fewer than two seeds, a gain is not finite, or the lengths differ.

    Source: Fieller, Some Problems in Interval Estimation, JRSS B 16 (1954).
    """
    vm_gains, fm_gains = _gains(vm_gain_S), _gains(fm_gain_S)
    if len(vm_gains) != len(fm_gains):
        raise ValueError(f"gains are paired by seed, there are {len(vm_gains)} of the VM and {len(fm_gains)} of the FM")
    vm_gain, fm_gain = paired_interval(vm_gains, level=level), paired_interval(fm_gains, level=level)
    if fm_gain.low <= 0:
        why = "contains 0" if fm_gain.high >= 0 else "lies below 0"
        undefined = f"the {level:.0%} interval of the FM's gain, {fm_gain.low:.3g} to {fm_gain.high:.3g}, {why}"
        return TransferRatio(vm_gain=vm_gain, fm_gain=fm_gain, undefined=undefined)
    drawn = _resampled(len(vm_gains), num_resamples, seed)
    vm_means, fm_means = vm_gains[drawn].mean(axis=1), fm_gains[drawn].mean(axis=1)
    ratios = np.divide(vm_means, fm_means, where=fm_means != 0, out=np.full(len(drawn), np.inf))
    return TransferRatio(
        vm_gain=vm_gain,
        fm_gain=fm_gain,
        by_fieller=_fieller(vm_gains, fm_gains, level),
        by_bootstrap=_percentiles(vm_gain.estimate / fm_gain.estimate, ratios, level),
    )


def t_quantile(freedom: int, level: float) -> float:
    """Give t with P(|T| <= t) = level, for Student's T with a whole number of degrees of freedom.

    Raises:
        ValueError: freedom is below 1, or level is not between 0 and 1.
    """
    if freedom < 1 or not 0 < level < 1:
        raise ValueError(f"freedom={freedom} and level={level}: at least 1, and between 0 and 1")
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halving the angle whose tangent is t / sqrt(freedom)
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, freedom) < level else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(freedom)


def _central_probability(angle: float, freedom: int) -> float:
    """Give P(|T| <= tan(angle) sqrt(freedom)).

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    cosine, sine = math.cos(angle), math.sin(angle)
    is_odd = freedom % 2
    term, total = (cosine if is_odd else 1.0), 0.0
    for k in range(1 + is_odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return (angle + sine * total) * 2 / math.pi if is_odd else sine * total


def _half_width(gains: Floats, level: float) -> float:
    return t_quantile(len(gains) - 1, level) * float(gains.std(ddof=1)) / math.sqrt(len(gains))


def _fieller(vm_gains: Floats, fm_gains: Floats, level: float) -> Interval:
    """Give the ratios r for which the t interval of vm - r fm contains 0."""
    vm, fm = float(vm_gains.mean()), float(fm_gains.mean())
    t = t_quantile(len(vm_gains) - 1, level)
    spread = t * t * np.cov(vm_gains, fm_gains) / len(vm_gains)
    a, b, c = fm * fm - spread[1, 1], vm * fm - spread[0, 1], vm * vm - spread[0, 0]
    root = math.sqrt(max(0.0, b * b - a * c))  # a > 0: never below 0, but for rounding
    return Interval(estimate=vm / fm, low=float(b - root) / a, high=float(b + root) / a)


def _percentiles(estimate: float, values: Floats, level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate=estimate, low=float(low), high=float(high))


def _resampled(num_seeds: int, num_resamples: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, num_seeds, (num_resamples, num_seeds))


def _gains(values: npt.ArrayLike) -> Floats:
    gains = np.asarray(values, dtype=np.float64)
    if gains.ndim != 1 or len(gains) < 2:
        raise ValueError(f"an interval needs two seeds at least, one value each; the shape is {gains.shape}")
    if not np.isfinite(gains).all():
        raise ValueError("a gain is not finite")
    return gains
