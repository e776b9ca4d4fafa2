"""How many threads a process that runs a model may use."""

import os

from das_service.settings import Settings


def bound_threads(settings: Settings) -> None:
    """Spinning BLAS threads alone cost a quarter of the throughput, so they are bounded before torch is loaded."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, str(settings.torch_threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
