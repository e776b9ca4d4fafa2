"""A trainer that was not made for it adopts a head by the diff of docs/training.md: deepctr-torch's DCN and DeepFM."""

import contextlib
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.training_doc import blocks_with
from vm_training.export import export_served, refuse_unserved

NUM_ROWS = 256
HEAD = 'AuxiliaryHead(model.dnn_linear.in_features, {"teacher": ["click"]})'


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a trainer has before the diff: columns, features, labels, and the teacher's logits, some of them missing."""

    def refuse(url: str) -> None:
        raise ConnectionError(url)

    if "deepctr_torch" not in sys.modules:  # when imported, it asks the package index for a newer version
        monkeypatch.setitem(sys.modules, "requests", SimpleNamespace(get=refuse))
    from deepctr_torch import inputs

    random = np.random.default_rng(0)
    user, price = np.arange(NUM_ROWS) % 40, random.random(NUM_ROWS).astype(np.float32)
    logit = (np.where(user % 2, 2.0, -2.0) + price).astype(np.float32)
    return {
        "torch": torch,
        "np": np,
        "columns": [inputs.SparseFeat("user", vocabulary_size=40, embedding_dim=4), inputs.DenseFeat("price", 1)],
        "features": {"user": user, "price": price},
        "label": (random.random(NUM_ROWS) < 1 / (1 + np.exp(-logit))).astype(np.float32),
        "teacher_logit": np.where(np.arange(NUM_ROWS) % 5, logit, np.float32(math.nan)),
    }


def trained(names: dict[str, Any], *, side: int, change: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """What one side of the diff leaves: 0 before, 1 after."""
    code = list(blocks_with("deepctr_torch")[0].sides())[side]
    assert change[0] in code
    result = {name: dict(value) if isinstance(value, dict) else value for name, value in names.items()}
    with contextlib.redirect_stdout(None):
        exec(code.replace(*change) if change[0] else code, result)
    return result


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("kind", ["DCN", "DeepFM"])
def test_the_diff_teaches_the_backbone_through_the_head(names: dict[str, Any], kind: str) -> None:
    before = trained(names, side=0, change=("DCN", kind))["model"]
    after = trained(names, side=1, change=("DCN", kind))
    assert all(weight.isfinite().all() for weight in after["model"].parameters())
    assert all(weight.grad is not None and weight.grad.any() for weight in after["heads"].parameters())
    assert not torch.equal(weights(before)["dnn.linears.0.weight"], weights(after["model"])["dnn.linears.0.weight"])
    assert after["model"].predict(dict(names["features"])).shape == (NUM_ROWS, 1)


def test_a_head_of_weight_zero_leaves_the_trainer_as_it_was(names: dict[str, Any]) -> None:
    before = weights(trained(names, side=0)["model"])
    after = weights(trained(names, side=1, change=(HEAD, HEAD[:-1] + ", weight=0.0)"))["model"])
    assert before.keys() == after.keys()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-6, atol=1e-9)


def test_the_model_is_served_without_its_head(names: dict[str, Any]) -> None:
    after = trained(names, side=1)
    model, rows = after["model"], torch.tensor([[3.0, 0.5], [7.0, 0.25]])
    after["hook"].remove()
    program = export_served(model, {"X": rows}, unserved=[after["heads"]])
    refuse_unserved(program, [after["heads"]])
    torch.testing.assert_close(program.module()(X=rows), model.eval()(rows))
