"""The student's side: `AugmentedDataset` (batches as tensors), `heads` and `losses` to distil, metrics, students."""

from vm_training.heads import AuxiliaryHead, GradScale, StudentAdapter
from vm_training.loader import AugmentedDataset
from vm_training.tensors import Batch, Supervision

__all__ = ["AugmentedDataset", "AuxiliaryHead", "Batch", "GradScale", "StudentAdapter", "Supervision"]
