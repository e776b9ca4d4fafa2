"""What a student minimises, where some of its rows have a teacher's logit and some have none.

All tensors are of shape (B,), logits raw (before the sigmoid); h is binary cross-entropy. A term over the teacher's
word is a mean over the rows that have it, so that coverage changes how many rows speak, not how loud each one is; what
stands in the other rows (NaN, as a null becomes) touches neither the loss nor its gradient.
"""

from torch import Tensor, sigmoid, where
from torch.nn.functional import binary_cross_entropy_with_logits


def distillation_loss(logit_B: Tensor, label_B: Tensor, teacher_logit_B: Tensor, present_B: Tensor) -> Tensor:
    """Give the plain (single head) loss: mean h(z, y) + mean h(z, p_F) over the rows present (none: nothing is added).

    label_B is of the logits' dtype, within [0, 1]; present_B is a boolean. No gradient flows to the teacher.

    Raises:
        ValueError: The shapes differ, or there are no rows.

    Source: ExFM (arXiv 2502.17494), the single-head baseline of its auxiliary head.
    """
    if len({tensor.shape for tensor in (logit_B, label_B, teacher_logit_B, present_B)}) != 1 or len(logit_B) == 0:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (logit_B, label_B, teacher_logit_B, present_B))
        raise ValueError(f"one value per row and at least one row are needed, the shapes are {shapes}")
    target_B = sigmoid(where(present_B, teacher_logit_B.detach(), 0.0))
    from_teacher_B = binary_cross_entropy_with_logits(logit_B, target_B, reduction="none")
    taught = where(present_B, from_teacher_B, 0.0).sum() / present_B.sum().clamp(min=1)
    return binary_cross_entropy_with_logits(logit_B, label_B) + taught
