"""What a model's forward gave, checked against its manifest: shapes, dtypes, finite values.

Shapes: B rows, D values of an embedding.
"""

from collections.abc import Mapping

import torch

from schemas.snapshot import Outputs

_NAMED_ROWS = 10


class ModelOutputError(Exception):
    """The model gave something that its manifest does not say, or that is no number.

    `rows` are the places in the batch, in order, whose values are not finite; empty if the whole answer is wrong.
    """

    def __init__(self, reasons: list[str], rows: tuple[int, ...] = ()) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons
        self.rows = rows


def named_outputs(
    raw: object, outputs: Outputs, num_rows: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Give the logits (B,) by task and the embeddings (B, D) by name, float32, on the model's device.

    A logit may come as (B, 1). Any floating dtype is taken.

    Raises:
        ModelOutputError: It is no flat dict of tensors, or one is absent, of another shape or of no floating dtype.
    """
    if not isinstance(raw, Mapping):
        raise ModelOutputError([f"the model returns a {type(raw).__name__}, not a dict of tensors"])
    if any(not isinstance(value, torch.Tensor) for value in raw.values()):
        raise ModelOutputError(["the model must return a flat dict of tensors, and nothing else in it"])
    wanted: dict[str, tuple[str, list[tuple[int, ...]]]] = {}
    for task, tensor in outputs.logits.items():
        wanted[f"logit {task!r}"] = (tensor, [(num_rows,), (num_rows, 1)])
    for name, embedding in outputs.embeddings.items():
        wanted[f"embedding {name!r}"] = (embedding.tensor, [(num_rows, embedding.size)])
    reasons = [_problem(what, tensor, raw.get(tensor), shapes) for what, (tensor, shapes) in wanted.items()]
    if any(reasons):
        raise ModelOutputError([reason for reason in reasons if reason])
    logits = {task: raw[tensor].reshape(num_rows).float() for task, tensor in outputs.logits.items()}
    embeddings = {name: raw[embedding.tensor].float() for name, embedding in outputs.embeddings.items()}
    return logits, embeddings


def _problem(what: str, tensor: str, value: torch.Tensor | None, shapes: list[tuple[int, ...]]) -> str | None:
    if value is None:
        return f"{what}: the model returns no tensor {tensor!r}"
    if not value.is_floating_point():
        return f"{what}: tensor {tensor!r} holds {value.dtype}, not floating-point numbers"
    if tuple(value.shape) not in shapes:
        return f"{what}: tensor {tensor!r} has shape {tuple(value.shape)}, not {' or '.join(map(str, shapes))}"
    return None


def all_finite(logits: Mapping[str, torch.Tensor], embeddings: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Give a 0-dimensional bool tensor on the outputs' device: whether every value is finite."""
    flags = [value.isfinite().all() for value in (*logits.values(), *embeddings.values())]
    return torch.stack(flags).all()


def not_finite_error(logits: Mapping[str, torch.Tensor], embeddings: Mapping[str, torch.Tensor]) -> ModelOutputError:
    """Give the error that names the outputs and rows whose values are not finite."""
    reasons, found = [], set()
    named = [(f"logit {name!r}", value) for name, value in logits.items()]
    named += [(f"embedding {name!r}", value) for name, value in embeddings.items()]
    for what, value in named:
        bad_B = ~value.isfinite().reshape(value.shape[0], -1).all(dim=1)
        rows = bad_B.nonzero().flatten().tolist()
        if rows:
            listed = ", ".join(map(str, rows[:_NAMED_ROWS])) + (", ..." if len(rows) > _NAMED_ROWS else "")
            reasons.append(f"{what} is not finite in {len(rows)} of {value.shape[0]} rows: {listed}")
            found.update(rows)
    return ModelOutputError(reasons, tuple(sorted(found)))


def first_line(error: BaseException) -> str:
    """Give the first line of what an exception says, shortened: torch appends pages of traces."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
