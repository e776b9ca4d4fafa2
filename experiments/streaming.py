"""The stream as a product would send it: impressions in the order of time, and labels as they become known.

Day after day of event time: first the labels whose time comes before the day ends, then the day's impressions. So a
label may come before its impression, and is never held back until the service has closed what it belongs to.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from das_service.client import Client
from das_service.up.supervisor import SupervisorError
from experiments.data.complete_journey import DATASET_SPEC, EXAMPLE_COLUMNS, LABEL_COLUMN, LABEL_WINDOW_SECONDS
from experiments.data.label_delays import build_labels

CHUNK_ROWS: Final = 5_000
CLIENTS: Final = 2
_DAY_US: Final = 86_400_000_000
_SLACK_US: Final = 3_600_000_000  # partitions' latest impressions lie this far apart at most
_LATENESS_US: Final = DATASET_SPEC["allowed_lateness_seconds"] * 1_000_000


class Streamer:
    """Posts weeks of impressions and their labels; writes each id down once its request was answered."""

    def __init__(self, client: Client, dataset: str, ledger: Path) -> None:
        self.posted = 0
        self._client = client
        self._dataset = dataset
        self._ledger = pq.ParquetWriter(ledger, pa.schema([("example_id", pa.string())]))
        self._labels: pa.Table | None = None
        self._times: list[npt.NDArray[np.int64]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ledger.close()

    def post_week(self, path: Path, *, on_progress: Callable[[int], None]) -> None:
        """Post the impressions of a week file, in the order of time, each day after the labels known by its end.

        Raises:
            SupervisorError: The service refused a row.
        """
        table = pq.read_table(path, columns=[*EXAMPLE_COLUMNS, LABEL_COLUMN])
        labels = build_labels(table)
        self._labels = labels if self._labels is None else _in_order(pa.concat_tables([self._labels, labels]))
        for end_us, part in _iter_days(table.select(list(EXAMPLE_COLUMNS))):
            self._post_labels(before_us=end_us)
            self._post_impressions(part, on_progress)

    def post_other_labels(self) -> None:
        """Post the labels that become known after the last impression."""
        self._post_labels(before_us=2**62)

    def num_settled(self) -> int:
        """Give how many of the posted impressions have their label windows over for certain."""
        if not self._times:
            return 0
        times = np.concatenate(self._times)
        last_us = times[-1] - LABEL_WINDOW_SECONDS * 1_000_000 - _LATENESS_US - _SLACK_US
        return int(np.searchsorted(times, last_us))

    def _post_labels(self, *, before_us: int) -> None:
        if self._labels is None:
            return
        count = int(np.searchsorted(self._labels["label_time"].cast(pa.int64()).to_numpy(), before_us))
        due, self._labels = self._labels.slice(0, count), self._labels.slice(count)
        if count:
            result = self._client.label_batches(self._dataset, due, concurrency=CLIENTS, rows_per_request=CHUNK_ROWS)
            _refuse_rejections(result, "labels")

    def _post_impressions(self, part: pa.Table, on_progress: Callable[[int], None]) -> None:
        shown = 0

        def progress(result: Any) -> None:  # noqa: ANN401
            nonlocal shown
            on_progress(result.accepted - shown)
            shown = result.accepted

        result = self._client.ingest_batches(
            self._dataset, part, concurrency=CLIENTS, rows_per_request=CHUNK_ROWS, on_progress=progress
        )
        _refuse_rejections(result, "impressions")
        self._ledger.write_table(pa.table({"example_id": part["example_id"]}))
        self._times.append(part["event_time"].cast(pa.int64()).to_numpy())
        self.posted += result.accepted


def _refuse_rejections(result: Any, what: str) -> None:  # noqa: ANN401
    if result.rejected:
        raise SupervisorError(f"the service refused {result.rejected} {what}: {result.errors[:3]}")


def _iter_days(table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """Give (end of the day in microseconds, its rows) of a table in the order of event_time."""
    days = table["event_time"].cast(pa.int64()).to_numpy() // _DAY_US
    starts = np.flatnonzero(np.diff(days, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(days)], strict=True):
        yield int(days[start] + 1) * _DAY_US, table.slice(int(start), int(stop - start))


def _in_order(labels: pa.Table) -> pa.Table:
    return labels.take(pc.sort_indices(labels, [("label_time", "ascending")]))


def read_closed(client: Client, dataset: str, *, cursor: str | None) -> tuple[pa.Table, str | None]:
    """Give the rows that have closed since a cursor, in the order of event_time, and the cursor behind them."""
    if cursor is None:
        features = [name for name in EXAMPLE_COLUMNS if name not in {"example_id", "event_time"}]
        reader = client.batches(dataset, columns=[*features, LABEL_COLUMN])
    else:
        reader = client.batches(dataset, cursor=cursor, extend=True)
    batches = [batch.rows for batch in reader]
    table = pa.Table.from_batches(batches) if batches else pa.table({})
    return (table.sort_by("event_time") if batches else table), reader.cursor
