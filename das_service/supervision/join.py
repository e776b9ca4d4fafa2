"""The offline join: what FMs said of a caller's rows, from the tables, window by window, in the caller's order.

Each window and FM is a join of its own (`window_join`). Rows that the tables lack are looked for in the online store,
where their partition has entries on the way.

An example may have supervision of several snapshots. The earliest scored that is valid counts (trained_through <=
event_time as stored; of two scored at the same instant the smaller snapshot_id); if none is valid, the row is leaky.

Source: docs/adr/0007-the-offline-join.md
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import redis
from numpy.typing import NDArray

from das_service.folder import Folder
from das_service.registry import Catalog
from das_service.supervision.answer import (
    STATUSES,
    Judged,
    LookupQuery,
    refuse_unknown_outputs,
    supervision_columns,
)
from das_service.supervision.buffers import BufferPool
from das_service.supervision.fm_tables import FmTables, Limits
from das_service.supervision.window_join import BATCH_ROWS, WindowJoin
from das_service.supervision.windows import Window
from das_service.tables.duck import Duck
from schemas.dataset import DatasetSpec

_ID_BYTES = 256
_ROW_BYTES = 32
_WINDOW_ROWS, _WINDOW_BYTES = 1_000_000, 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The supervision of a window's rows, and per FM how many of them have each status (in the order of STATUSES)."""

    columns: pa.Table
    counts: Mapping[str, NDArray[np.int64]]


class OfflineJoin:
    """Joins rows with the tables of a dataset as they are when it is made. Threads may share it."""

    def __init__(
        self,
        duck: Duck,
        folder: Folder,
        catalog: Catalog,
        dataset: str,
        query: LookupQuery,
        *,
        client: redis.Redis | None,
        limits: Mapping[str, Limits] | None = None,
        pool: BufferPool | None = None,
    ) -> None:
        """Look at the tables; client: the online store, None if it can't be asked (what is on the way is missing).

        limits: by FM what counts, for windows that know their rows' partitions; then there is no client. pool: of a
        process that joins again and again, default one of its own.

        Raises:
            UnknownNameError: The dataset or an FM is not declared.
            InvalidRowsError: An output is not one of any FM's.
        """
        self.spec: DatasetSpec = catalog.spec(dataset)
        records = [catalog.fm(dataset, fm) for fm in query.fms]
        refuse_unknown_outputs(records, query)
        self._limits = limits or {}
        if limits is not None:
            records = [limits[record.fm].known(record) for record in records]
        self._duck = duck
        self._query = query
        self._pool = pool or BufferPool()
        self._fms = [FmTables.open(folder, catalog, dataset, record, client) for record in records]

    @property
    def schema(self) -> pa.Schema:
        """Columns that are added, in their order."""
        fields: list[pa.Field] = []
        for fm in self._fms:
            empty = {name: np.empty((0, *shape), kind) for name, kind, shape in fm.layout(self._query)}
            judged = Judged(np.zeros(0, np.int8), empty, fm.record.snapshots, fm.trained_through_us)
            fields += [field for field, _ in supervision_columns(judged, fm.record, self._query)]
        return pa.schema(fields)

    def join(self, window: Window) -> Joined:
        """Give the supervision of the window's rows, in their order.

        Raises:
            OverloadedError: No permit for DuckDB came free.
            TooLargeError: The ids take more than a window may.
            UnavailableError: The memory is used up, or the registry lags behind the tables.
            DiskReserveError: The spill disk is full or broken.
        """
        fields: list[pa.Field] = []
        arrays: list[pa.Array] = []
        counts = {}
        for fm in self._fms:
            judged = self._judge(window, fm)
            counts[fm.record.fm] = np.bincount(judged.status, minlength=len(STATUSES))
            for field, array in supervision_columns(judged, fm.record, self._query):
                fields.append(field)
                arrays.append(array)
        return Joined(columns=pa.table(arrays, schema=pa.schema(fields)), counts=counts)

    def _judge(self, window: Window, fm: FmTables) -> Judged:
        with self._duck.room_for("the join"), self._duck.cursor() as cursor:
            limits = self._limits.get(fm.record.fm)
            reach = {} if limits is None or window.partition is None else limits.reach(window.partition)
            window.register(cursor, max_id_bytes=_ID_BYTES * max(window.num_rows, BATCH_ROWS), more=reach)
            return WindowJoin(cursor, window, fm, self._query, self.spec, self._pool, limits).judge()


def window_rows(bytes_per_row: int) -> int:
    """Give how many rows a window may have when the supervision of a row, by all FMs, takes so many bytes."""
    return max(BATCH_ROWS, min(_WINDOW_ROWS, _WINDOW_BYTES // (bytes_per_row + _ROW_BYTES)))
