"""Negatives drawn from promoted sets by hashing: the same draws on every machine, in any order, with any threads.

Every draw is a splitmix64 hash of its basket's stream and its number in it; nothing depends on what was drawn for
another basket. Shapes: B baskets, R rows of all sets.
"""

import itertools
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]

NEGATIVES_PER_POSITIVE: Final = 9
NEGATIVES_PER_BASKET: Final = 3

_WEIGHTED_ROUNDS = 8
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picks:
    """Impressions as pairs: the number of the basket, and the row of the promoted product."""

    basket: Ints
    row: Ints


def draw_negatives(positives: Picks, *, first_B: Ints, stop_B: Ints, weight_R: Ints, stream_B: Bits) -> Picks:
    """Give each basket 9 negatives per positive and 3 more, out of its rows first..stop, sorted by (basket, row).

    Half are drawn by weight, the rest uniformly, all without replacement and never a positive. A basket gets at most
    half of its rows that are not positive. Where weights are zero or used up, uniform draws take their place.
    stream_B starts each basket's stream of random bits: equal streams and sets give equal draws.
    """
    positives_B, size_B = np.bincount(positives.basket, minlength=len(first_B)), stop_B - first_B
    wanted_B = np.minimum(NEGATIVES_PER_POSITIVE * positives_B + NEGATIVES_PER_BASKET, (size_B - positives_B) // 2)
    weight_below = np.concatenate([np.zeros(1, np.int64), np.cumsum(weight_R)])
    base_B, total_B = weight_below[first_B], weight_below[stop_B] - weight_below[first_B]
    weighted_B = np.where(total_B > 0, wanted_B // 2, 0)
    taken = np.sort(positives.basket * len(weight_R) + positives.row)
    negatives = np.empty(0, np.int64)
    picked_B, drawn_B = np.zeros_like(wanted_B), np.zeros_like(wanted_B)
    for num_round in itertools.count():
        is_weighted = num_round < _WEIGHTED_ROUNDS
        missing_B = (weighted_B if is_weighted else wanted_B) - picked_B
        if not is_weighted and not missing_B.any():
            break
        basket = np.repeat(np.arange(len(missing_B)), missing_B)
        nth = np.arange(len(basket)) + np.repeat(drawn_B - (np.cumsum(missing_B) - missing_B), missing_B)
        bits = _mix(stream_B[basket] + _GAMMA * (nth + 1).astype(np.uint64))
        if is_weighted:
            row = np.searchsorted(weight_below, base_B[basket] + _modulo(bits, total_B[basket]), side="right") - 1
        else:
            row = first_B[basket] + _modulo(bits, size_B[basket])
        pair = np.sort(basket * len(weight_R) + row)
        new = pair[(np.diff(pair, prepend=-1) != 0) & ~find_sorted(taken, pair)[1]]
        taken, negatives = np.sort(np.concatenate([taken, new])), np.concatenate([negatives, new])
        picked_B += np.bincount(new // len(weight_R), minlength=len(picked_B))
        drawn_B += missing_B
    negatives.sort()
    return Picks(basket=negatives // len(weight_R), row=negatives % len(weight_R))


def build_streams(*parts: Ints) -> Bits:
    """Give each basket its stream: a hash of the integers that identify it."""
    stream = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        stream = _mix(stream + _GAMMA + part.astype(np.uint64))
    return stream


def find_sorted(ordered: Ints, values: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Give each value's place in the sorted array, and whether it is there."""
    if len(ordered) == 0:
        return np.zeros_like(values), np.zeros(len(values), np.bool_)
    index = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return index, ordered[index] == values


def _mix(bits: Bits) -> Bits:
    """Give the splitmix64 finaliser of each value: a bijection of 64-bit integers that looks random."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _modulo(bits: Bits, size: Ints) -> Ints:
    return (bits % size.astype(np.uint64)).astype(np.int64)
