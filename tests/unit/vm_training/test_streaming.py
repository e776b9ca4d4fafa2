"""Metrics batch by batch are those of all rows at once, within the error that they state."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor

from vm_training import metrics
from vm_training.streaming import StreamingMetrics

Triple = tuple[float, bool, bool]
rows = st.lists(st.tuples(st.floats(-40, 40, width=32), st.booleans(), st.booleans()), min_size=1, max_size=40).filter(
    lambda triples: len({label for _, label, labeled in triples if labeled}) == 2
)


def counted(triples: list[Triple], **options: float) -> StreamingMetrics:
    found = StreamingMetrics(**options)  # type: ignore[arg-type]
    if triples:
        logit_B, label_B, labeled_B = (tensor(column) for column in zip(*triples, strict=True))
        found.update(logit_B, torch.where(labeled_B, label_B.float(), math.nan), labeled_B)
    return found


def kept(triples: list[Triple]) -> tuple[list[float], list[bool]]:
    return [z for z, _, labeled in triples if labeled], [y for _, y, labeled in triples if labeled]


@given(rows)
def test_sums_are_those_of_all_rows(triples: list[Triple]) -> None:
    fit = counted(triples).fit()
    logits, labels = kept(triples)
    assert fit.rows == len(logits)
    assert fit.normalized_entropy == pytest.approx(metrics.normalized_entropy(logits, labels), rel=1e-9)
    assert fit.calibration == pytest.approx(metrics.calibration(logits, labels), rel=1e-9)
    assert fit.loss / fit.rows == pytest.approx(metrics.log_loss(logits, labels), rel=1e-9)


@given(rows, st.sampled_from([1, 2, 16, 65_536]), st.sampled_from([1.0, 8.0, 32.0]))
def test_the_auc_is_within_the_error_that_is_stated(triples: list[Triple], bins: int, limit: float) -> None:
    found = counted(triples, bins=bins, limit=limit).auc()
    assert abs(metrics.auc(*kept(triples)) - found.value) <= found.error + 1e-12
    assert 0 <= found.error <= 0.5


@given(rows, st.integers(1, 8))
def test_the_error_is_half_the_share_of_the_pairs_that_meet_in_a_bin(triples: list[Triple], bins: int) -> None:
    def bin_of(logit: float) -> int:
        return min(max(math.floor((logit + 4) * (bins / 8)), 0), bins - 1)

    logits, labels = kept(triples)
    pairs = [
        (p, n) for p, y in zip(logits, labels, strict=True) if y for n, x in zip(logits, labels, strict=True) if not x
    ]
    meet = [bin_of(p) == bin_of(n) for p, n in pairs]
    won = [0.5 if same else float(bin_of(p) > bin_of(n)) for (p, n), same in zip(pairs, meet, strict=True)]
    found = counted(triples, bins=bins, limit=4.0).auc()
    assert (found.value, found.error) == pytest.approx((np.mean(won), np.mean(meet) / 2))


@given(rows, st.integers(0, 40), st.integers(0, 40))
def test_parts_in_any_order_add_up_to_the_whole(triples: list[Triple], first: int, second: int) -> None:
    cuts = sorted({0, min(first, len(triples)), min(second, len(triples)), len(triples)})
    parts = [counted(triples[start:stop]) for start, stop in pairwise(cuts)]
    whole, merged = counted(triples), StreamingMetrics()
    for part in reversed(parts):
        merged = merged + part
    assert torch.equal(merged.counts, whole.counts)
    torch.testing.assert_close(merged.totals, whole.totals, rtol=1e-12, atol=1e-12)
    batches = StreamingMetrics()
    for logit, label, labeled in triples:
        batches.update(tensor([logit]), tensor([label]), tensor([labeled]))
    assert torch.equal(batches.counts, whole.counts)


def test_adding_leaves_both_as_they_were() -> None:
    one, two = counted([(0.5, True, True)]), counted([(-0.5, False, True)])
    both = one + two
    assert [each.fit().rows for each in (one, two, both)] == [1, 1, 2]


def test_the_default_resolution_tells_a_smooth_auc_to_three_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    logit_B = torch.randn(100_000, generator=generator)
    label_B = torch.bernoulli(logit_B.sigmoid(), generator=generator)
    found = StreamingMetrics()
    for part in torch.arange(100_000).split(4096):
        found.update(logit_B[part], label_B[part])
    auc = found.auc()
    assert auc.error < 1 / 2048
    assert auc.value == pytest.approx(metrics.auc(logit_B, label_B), abs=auc.error)
    assert found.counts.nbytes == 2**20


def test_infinite_logits_count_at_the_ends() -> None:
    found = StreamingMetrics()
    found.update(tensor([math.inf, -math.inf, 0.0]), tensor([1.0, 0.0, 1.0]))
    assert found.auc().value == 1.0
    assert found.fit().loss == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("logit", "label", "message"),
    [
        ([0.0, math.nan], [0.0, 1.0], "of 2 rows 1 logits are NaN, 0 labels"),
        ([0.0, 1.0], [0.0, 0.5], "of 2 rows 0 logits are NaN, 1 labels"),
        ([0.0, 1.0], [0.0, math.nan], "of 2 rows 0 logits are NaN, 1 labels"),
        ([0.0, 1.0], [1.0, 1.0], "both classes are needed, 2 of 2 labels are 1"),
        ([], [], "both classes are needed, 0 of 0 labels are 1"),
    ],
)
def test_rows_that_cannot_be_evaluated_are_refused_when_asked(
    logit: list[float], label: list[float], message: str
) -> None:
    found = StreamingMetrics()
    found.update(tensor(logit), tensor(label))
    with pytest.raises(ValueError, match=message):
        found.auc()


@pytest.mark.parametrize("shapes", [((2, 1), (2,)), ((2,), (1,)), ((2, 1), (2, 1))])
def test_shapes_that_would_be_broadcast_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="one value per row is needed, the shapes are"):
        StreamingMetrics().update(*(torch.zeros(shape) for shape in shapes))


def test_histograms_of_other_bins_do_not_add_up() -> None:
    with pytest.raises(ValueError, match=r"of 4 bins to 32.0 and of 8 bins to 32.0 do not add up"):
        StreamingMetrics(bins=4) + StreamingMetrics(bins=8)
    with pytest.raises(ValueError, match="at least one bin"):
        StreamingMetrics(bins=0)


def test_ranks_add_up_by_their_tensors() -> None:
    parts: list[StreamingMetrics] = [counted([(0.5, True, True)]), counted([(-0.5, False, True)])]
    reduced = StreamingMetrics()
    totals: list[Tensor] = [part.totals for part in parts]
    reduced.totals, reduced.counts = torch.stack(totals).sum(0), torch.stack([part.counts for part in parts]).sum(0)
    assert reduced.auc() == (parts[0] + parts[1]).auc()
