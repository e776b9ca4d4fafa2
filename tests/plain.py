"""The formulas of distillation, once more: one row at a time, in plain Python, without masks, tensors or tricks."""

import math
from collections.abc import Iterable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Matrix = Sequence[Sequence[float]]
logits = st.floats(-30, 30, width=32)


def probability(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def cross_entropy(logit: float, target: float) -> float:
    return max(logit, 0) - logit * target + math.log1p(math.exp(-abs(logit)))


def mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept) if kept else 0.0


def shifted(probability: float, rate: float) -> float:
    """The positive rate that is left of this one when the share `rate` of the negatives is kept."""
    return probability / (probability + (1 - probability) * rate)


def linear(layer: nn.Module, row: Sequence[float]) -> list[float]:
    assert isinstance(layer, nn.Linear)
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [
        start + sum(w * value for w, value in zip(weights, row, strict=True))
        for start, weights in zip(bias, layer.weight.tolist(), strict=True)
    ]


def network(layers: nn.Module, row: Sequence[float]) -> list[float]:
    """What a sequence of linear layers and activations gives for one row."""
    assert isinstance(layers, nn.Sequential)
    values = list(row)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            values = linear(layer, values)
        elif isinstance(layer, nn.SiLU):
            values = [value * probability(value) for value in values]
        else:
            assert isinstance(layer, nn.ReLU)
            values = [max(value, 0.0) for value in values]
    return values


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter, zeros where it has none."""
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(weight) if given is None else given
        for (name, weight), given in zip(named.items(), found, strict=True)
    }
