"""How long the parts of one request took: in das_stage_seconds, and told to the caller as Server-Timing."""

import time

from das_service.metrics import Metrics


class Stages:
    """A stop watch of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._at = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def end(self, stage: str) -> None:
        """Say that a stage is over; the next begins."""
        now = time.perf_counter()
        self._seconds[stage] = now - self._at
        self._metrics.stage_seconds.labels("api", stage).observe(now - self._at)
        self._at = now

    def headers(self) -> dict[str, str]:
        """Give the Server-Timing header, in milliseconds."""
        parts = [f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in self._seconds.items()]
        return {"Server-Timing": ", ".join(parts)}
