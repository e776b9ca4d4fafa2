"""An exported program as a table of its keyword tensors: names, dtypes, widths."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram

_UNBOUNDED = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShape:
    """One keyword tensor: its dtype, its shape without the batch dimension, and the most rows it may have."""

    dtype: torch.dtype
    tail: tuple[int, ...]
    max_rows: int


def program_inputs(program: ExportedProgram) -> dict[str, TensorShape]:
    """Give the keyword tensors that a program takes, in its order.

    Raises:
        ValueError: It takes positional arguments, or something that is no tensor with a free batch dimension alone.
    """
    positional, keywords = program.call_spec.in_spec.children()
    if positional.num_leaves or keywords.num_leaves != len(keywords.context):
        raise ValueError("the model takes something else than keyword tensors")
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    shapes: dict[str, TensorShape] = {}
    for keyword, placeholder in zip(keywords.context, program.graph_signature.user_inputs, strict=True):
        value = values.get(str(placeholder))
        if not isinstance(value, torch.Tensor) or value.dim() < 1:
            raise ValueError(f"the model's argument {keyword!r} is not a tensor with a batch dimension")
        batch, *tail = value.shape
        if any(isinstance(size, torch.SymInt) for size in tail):
            raise ValueError(f"tensor {keyword!r}: only the batch dimension may vary")
        if not isinstance(batch, torch.SymInt):
            raise ValueError(f"tensor {keyword!r}: the model fixes the number of rows to {batch}")  # noqa: TRY004
        bounds = program.range_constraints.get(batch.node.expr)
        max_rows = _UNBOUNDED if bounds is None or not bounds.upper.is_finite else int(bounds.upper)
        shapes[keyword] = TensorShape(dtype=value.dtype, tail=tuple(tail), max_rows=max_rows)
    return shapes


def zero_inputs(shapes: Mapping[str, TensorShape], num_rows: int) -> dict[str, torch.Tensor]:
    """Give tensors of zeros (masks: False) that the program takes."""
    return {name: torch.zeros((num_rows, *shape.tail), dtype=shape.dtype) for name, shape in shapes.items()}
