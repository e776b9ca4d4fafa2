"""The teacher's side: features to tensors, snapshot folders, the engine and the worker around it."""

from fm_inference.export import export_snapshot
from fm_inference.signature import Signature

__all__ = ["Signature", "export_snapshot"]
