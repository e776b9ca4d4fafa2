"""What shadows and backfills said, on its way into `supervision/<fm>`: which of it enters.

An example has one outcome of an FM, whichever snapshot gave it. Besides, it has at most one row of each snapshot that a
backfill scored it with, and one of each shadow. A backfill's row does not enter where its snapshot has a row that is
served, a shadow's where its snapshot has any row; so a snapshot speaks of an example once, twice where a backfill says
to all what the snapshot said in the shadow. An outcome always enters, whatever was said besides. A worker appends a
shadow's row only after the example's outcome is in the same log, and a backfill leaves alone what a worker has still to
score; so no outcome comes after another row of the same snapshot.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from das_service.logs.records import BACKFILL_ROWS, SHADOW_ROWS
from das_service.sink.identity import Known, Verdict, settle_identity
from das_service.tables.duck import Duck
from das_service.tables.offline_store import rows_at
from schemas.tables import IS_BACKFILL, IS_SHADOW


def outcomes_of(rows: pa.Table) -> pa.Table:
    """Give the rows that are somebody's outcome, in their order; all of a table that has no others."""
    if IS_SHADOW not in rows.column_names:
        return rows
    return rows_at(rows, np.flatnonzero(~(_marked(rows, IS_SHADOW) | _marked(rows, IS_BACKFILL))))


def with_asides(numbers: Mapping[str, int], kept: pa.Table) -> dict[str, int]:
    """Give how many rows of shadows and of backfills a table has once it has these rows too. numbers: how many before.

    What there is none of yet is not named.
    """
    added = {SHADOW_ROWS: int(_marked(kept, IS_SHADOW).sum()), BACKFILL_ROWS: int(_marked(kept, IS_BACKFILL).sum())}
    return {name: numbers.get(name, 0) + number for name, number in added.items() if number}


def settle_asides(rows: pa.Table, outcomes: Verdict, served: Known, everything: Known, duck: Duck) -> Verdict:
    """Give the verdict on rows of which some are no outcomes, once that on the outcomes is known.

    outcomes: row numbers among the outcomes. served, everything: what is known of the event days that rows touch,
    without and with what shadows said. A row besides outcomes that does not enter is counted nowhere.
    """
    is_shadow, is_backfill = _marked(rows, IS_SHADOW), _marked(rows, IS_BACKFILL)
    places = np.flatnonzero(~(is_shadow | is_backfill))
    enters = np.zeros(rows.num_rows, np.bool_)
    enters[places[outcomes.kept]] = True
    snapshots = rows["snapshot_id"].to_numpy(zero_copy_only=False)
    for is_one, known in ((is_backfill, served), (is_shadow, everything)):
        for snapshot_id in np.unique(snapshots[is_one].astype(str)).tolist():
            mine = np.flatnonzero((snapshots == snapshot_id) & (is_one | enters))
            verdict = settle_identity(rows.take(pa.array(mine)), known, duck, of_snapshot=snapshot_id)
            enters[mine[verdict.kept]] = True
    return Verdict(
        kept=np.flatnonzero(enters), duplicate=places[outcomes.duplicate], conflicting=places[outcomes.conflicting]
    )


def _marked(rows: pa.Table, name: str) -> NDArray[np.bool_]:
    return np.asarray(rows[name].to_numpy(zero_copy_only=False), np.bool_)
