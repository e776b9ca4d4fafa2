"""What shadows said, on its way into `supervision/<fm>`: which of it enters.

An example has one outcome of an FM, whichever snapshot gave it, and besides one row of each shadow that scored it. So
a snapshot speaks of an example once: a shadow's row does not enter where that snapshot has one already, as the active
one or as a shadow. A worker appends it only after the example's outcome is in the same log, and a log is committed in
its order; so no outcome comes after a shadow's row of the same snapshot.
"""

import numpy as np
import pyarrow as pa

from das_service.sink.identity import Known, Verdict, settle_identity
from das_service.tables.duck import Duck
from das_service.tables.offline_store import rows_at
from schemas.tables import IS_SHADOW


def outcomes_of(rows: pa.Table) -> pa.Table:
    """Give the rows that are no shadow's, in their order; all of a table that has none."""
    if IS_SHADOW not in rows.column_names:
        return rows
    return rows_at(rows, np.flatnonzero(~rows[IS_SHADOW].to_numpy(zero_copy_only=False)))


def settle_shadows(rows: pa.Table, outcomes: Verdict, known: Known, duck: Duck) -> Verdict:
    """Give the verdict on rows of which some are shadows', once that on the others is known.

    outcomes: row numbers among the others. known: everything of the event days that rows touch, shadows included. A
    shadow's row that does not enter is counted nowhere.
    """
    is_shadow = rows[IS_SHADOW].to_numpy(zero_copy_only=False)
    places = np.flatnonzero(~is_shadow)
    enters = np.zeros(rows.num_rows, np.bool_)
    enters[places[outcomes.kept]] = True
    snapshots = rows["snapshot_id"].to_numpy(zero_copy_only=False)
    for snapshot_id in np.unique(snapshots[is_shadow].astype(str)).tolist():
        mine = np.flatnonzero((snapshots == snapshot_id) & (is_shadow | enters))
        verdict = settle_identity(rows.take(pa.array(mine)), known, duck, of_snapshot=snapshot_id)
        enters[mine[verdict.kept]] = True
    return Verdict(
        kept=np.flatnonzero(enters), duplicate=places[outcomes.duplicate], conflicting=places[outcomes.conflicting]
    )
