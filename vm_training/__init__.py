"""The student's side: `AugmentedDataset` (training batches as tensors), `losses` (distillation) and `metrics`."""

from vm_training.loader import AugmentedDataset
from vm_training.tensors import Batch

__all__ = ["AugmentedDataset", "Batch"]
