"""How long rows waited while a lane published nothing: what a switch of snapshots, or anything else, held up."""

import time
from collections.abc import Sequence

from das_service.metrics import Metrics


class PublishPace:
    """Measures the gaps between a lane's publishes. One thread notes them."""

    def __init__(self, metrics: Metrics, dataset: str, fm: str) -> None:
        self._gaps = metrics.publish_gap_seconds.labels(dataset, fm)
        self._switch = metrics.switch_gap_seconds.labels(dataset, fm)
        self._published_at: float | None = None
        self._snapshot_id: str | None = None

    def note(self, snapshot_id: str, taken_at_us: Sequence[int]) -> None:
        """Take notice of a publish just made, of entries that the server took at these times.

        The gap begins at the publish before, or when the oldest of the entries came if that is later: an idle lane
        holds nothing up.
        """
        now, waited = time.monotonic(), time.time() - min(taken_at_us) / 1e6
        if self._published_at is not None:
            gap = max(0.0, min(now - self._published_at, waited))
            self._gaps.observe(gap)
            if snapshot_id != self._snapshot_id:
                self._switch.set(gap)
        self._published_at, self._snapshot_id = now, snapshot_id
