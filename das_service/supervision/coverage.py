"""The share of looked-up rows that had usable supervision, over about the last minute."""

import threading
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from das_service.metrics import Metrics
from das_service.supervision.answer import STATUSES

_HALF_LIFE_SECONDS = 60.0


class Coverage:
    """Counts looked-up rows by status, and keeps das_coverage_ratio. Threads share it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, str], tuple[float, float, float]] = {}

    def count_all(self, dataset: str, counts: Mapping[str, NDArray[np.int64]]) -> None:
        """Count the rows of one answer by FM and status."""
        for fm, by_status in counts.items():
            self.count(dataset, fm, by_status)

    def count(self, dataset: str, fm: str, counts: NDArray[np.int64]) -> None:
        """Count one answer: rows by status, in the order of STATUSES."""
        for status, number in zip(STATUSES, counts.tolist(), strict=True):
            if number:
                self._metrics.lookup_rows.labels(dataset, fm, status).inc(number)
        total, now = float(counts.sum()), time.monotonic()
        if not total:
            return
        with self._lock:
            present, rows, at = self._sums.get((dataset, fm), (0.0, 0.0, now))
            decay = 0.5 ** ((now - at) / _HALF_LIFE_SECONDS)
            present, rows = present * decay + float(counts[0]), rows * decay + total
            self._sums[dataset, fm] = (present, rows, now)
        self._metrics.coverage.labels(dataset, fm).set(present / rows)
