"""What a student minimises, where some of its rows have a teacher's logit and some have none.

All tensors are of shape (B,), logits raw (before the sigmoid); h is binary cross-entropy. Each term is a mean over the
rows that have it, so that coverage changes how many rows speak, not how loud each one is; what stands in the other rows
(NaN, as a null becomes) touches neither the loss nor its gradient, and a term that no row has is 0.

sampling_rate: the share of the negatives that the student's rows keep, where the teacher speaks of full traffic
(`vm_training.sampling`).

Source: ExFM (arXiv 2502.17494).
"""

from torch import Tensor, sigmoid, where
from torch.nn.functional import binary_cross_entropy_with_logits

from vm_training.sampling import to_sampled


def label_loss(logit_B: Tensor, label_B: Tensor, labeled_B: Tensor | None = None) -> Tensor:
    """Give mean h(z, y) over the labelled rows: of a served head, and of a student adapter (L_A).

    label_B: of the logits' dtype, within [0, 1]. labeled_B: a boolean; None is where the label is not NaN.

    Raises:
        ValueError: The shapes differ, or there are no rows.
    """
    mask_B = ~label_B.isnan() if labeled_B is None else labeled_B
    _refuse_shapes(logit_B, label_B, mask_B)
    return _mean_cross_entropy(logit_B, label_B, mask_B)


def auxiliary_loss(
    logit_B: Tensor, teacher_logit_B: Tensor, present_B: Tensor, *, alpha: float = 1.0, sampling_rate: float = 1.0
) -> Tensor:
    """Give mean h(z_D, min(1, alpha p_F)) over the rows present: what a distill head minimises.

    alpha scales the target and so breaks the calibration of the head that learns it: it is for heads that nobody
    serves. No gradient flows to the teacher. With a student adapter's logits as the teacher's it is L_sa.

    Raises:
        ValueError: The shapes differ, there are no rows, or the sampling rate is no share.
    """
    _refuse_shapes(logit_B, teacher_logit_B, present_B)
    teacher_B = to_sampled(where(present_B, teacher_logit_B.detach(), 0.0), sampling_rate)
    return _mean_cross_entropy(logit_B, (alpha * sigmoid(teacher_B)).clamp(max=1.0), present_B)


def distillation_loss(
    logit_B: Tensor,
    label_B: Tensor,
    teacher_logit_B: Tensor,
    present_B: Tensor,
    *,
    labeled_B: Tensor | None = None,
    weight: float = 1.0,
    sampling_rate: float = 1.0,
) -> Tensor:
    """Give the plain (single head) loss: mean h(z, y) of rows labelled + weight * mean h(z, p_F) of rows present.

    The served logit learns the teacher's bias with its word: `heads.AuxiliaryHead` keeps the two apart.

    Raises:
        ValueError: The shapes differ, there are no rows, or the sampling rate is no share.
    """
    taught = auxiliary_loss(logit_B, teacher_logit_B, present_B, sampling_rate=sampling_rate)
    return label_loss(logit_B, label_B, labeled_B) + weight * taught


def _mean_cross_entropy(logit_B: Tensor, target_B: Tensor, mask_B: Tensor) -> Tensor:
    # masked before and after: a NaN times the zero gradient of the row that it stands in would be NaN
    clean_B, wanted_B = where(mask_B, logit_B, 0.0), where(mask_B, target_B, 0.0)
    loss_B = binary_cross_entropy_with_logits(clean_B, wanted_B, reduction="none")
    return where(mask_B, loss_B, 0.0).sum() / mask_B.sum().clamp(min=1)


def _refuse_shapes(*tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors}) != 1 or tensors[0].dim() != 1 or len(tensors[0]) == 0:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"one value per row and at least one row are needed, the shapes are {shapes}")
