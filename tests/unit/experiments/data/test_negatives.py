"""Laws of drawing negatives from promoted sets."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.negatives import Ints, Picks, build_streams, draw_negatives

MAX_ROWS = 40


@st.composite
def baskets(draw: st.DrawFn) -> dict[str, Ints]:
    """Give baskets on ranges of up to 40 weighted rows, with some rows of each taken as positives."""
    weights = draw(st.lists(st.sampled_from([0, 0, 1, 5, 1000]), min_size=1, max_size=MAX_ROWS))
    bounds = draw(
        st.lists(st.tuples(st.integers(0, len(weights) - 1), st.integers(1, MAX_ROWS)), min_size=1, max_size=5)
    )
    first = np.array([start for start, _ in bounds])
    stop = np.minimum(first + [length for _, length in bounds], len(weights))
    taken = [draw(st.sets(st.integers(int(a), int(b) - 1))) for a, b in zip(first, stop, strict=True)]
    return {
        "first_B": first,
        "stop_B": stop,
        "weight_R": np.array(weights),
        "basket": np.repeat(np.arange(len(taken)), [len(rows) for rows in taken]),
        "row": np.array([row for rows in taken for row in sorted(rows)], dtype=np.int64),
    }


def _draw(case: dict[str, Ints]) -> Picks:
    sets = {name: case[name] for name in ("first_B", "stop_B", "weight_R")}
    stream = build_streams(np.arange(len(case["first_B"])), case["first_B"])
    return draw_negatives(Picks(basket=case["basket"], row=case["row"]), **sets, stream_B=stream)


def _pairs(basket: Ints, row: Ints) -> list[tuple[int, int]]:
    return list(zip(basket.tolist(), row.tolist(), strict=True))


@given(baskets())
def test_negatives_are_in_the_basket_s_set(case: dict[str, Ints]) -> None:
    drawn = _draw(case)
    assert np.all(drawn.row >= case["first_B"][drawn.basket])
    assert np.all(drawn.row < case["stop_B"][drawn.basket])


@given(baskets())
def test_negatives_are_no_positives_and_come_once_and_sorted(case: dict[str, Ints]) -> None:
    drawn = _draw(case)
    pairs = _pairs(drawn.basket, drawn.row)
    assert pairs == sorted(set(pairs) - set(_pairs(case["basket"], case["row"])))


@given(baskets())
def test_each_basket_gets_its_number_or_half_of_what_is_left(case: dict[str, Ints]) -> None:
    num_baskets = len(case["first_B"])
    positives = np.bincount(case["basket"], minlength=num_baskets)
    rest = case["stop_B"] - case["first_B"] - positives
    expected = np.minimum(9 * positives + 3, rest // 2)
    assert np.bincount(_draw(case).basket, minlength=num_baskets).tolist() == expected.tolist()


@given(baskets())
def test_a_basket_draws_the_same_beside_others_and_alone(case: dict[str, Ints]) -> None:
    together = _draw(case)
    is_first = case["basket"] == 0
    alone = _draw(
        case
        | {"first_B": case["first_B"][:1], "stop_B": case["stop_B"][:1]}
        | {"basket": case["basket"][is_first], "row": case["row"][is_first]}
    )
    assert alone.row.tolist() == together.row[together.basket == 0].tolist()


def _one_positive_each(num_baskets: int, *, weight: Ints) -> Ints:
    """Give the negatives' rows of baskets that all have the last row as their positive."""
    return _draw(
        {
            "first_B": np.zeros(num_baskets, np.int64),
            "stop_B": np.full(num_baskets, len(weight)),
            "weight_R": weight,
            "basket": np.arange(num_baskets),
            "row": np.full(num_baskets, len(weight) - 1),
        }
    ).row


def test_half_of_the_negatives_are_drawn_by_weight() -> None:
    weight = np.where(np.arange(1000) < 100, 7, 0)
    rows = _one_positive_each(1000, weight=weight)  # 12 each: 6 by weight, 6 from all of which a tenth are weighted
    assert len(rows) == 12_000
    assert abs(np.mean(rows < 100) - (6 + 6 * 94 / 993) / 12) < 0.01


def test_draws_by_weight_follow_the_weights() -> None:
    weight = np.where(np.arange(1000) % 2 == 0, 3, 1)
    rows = _one_positive_each(1000, weight=weight)
    assert abs(np.mean(rows % 2 == 0) - (0.75 + 0.5) / 2) < 0.02


def test_where_nothing_has_weight_all_draws_are_uniform() -> None:
    rows = _one_positive_each(1000, weight=np.zeros(1000, np.int64))
    assert abs(np.mean(rows < 500) - 0.5) < 0.02
