"""Examples that an FM failed on: listed from its table and from its log before the table, and tried again."""

import datetime as dt
from collections.abc import Collection
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import redis

from das_service.folder import Folder
from das_service.logs.records import dead_log, read_mark
from das_service.logs.streams import read_after
from das_service.sink.rescore import Rescorer
from das_service.tables.duck import Duck
from das_service.tables.offline_store import OUTCOME, TablePlace, TableReader, table_place
from schemas.dataset import DatasetSpec
from schemas.entries import Entry
from schemas.tables import dead_letters_table, dead_schema, supervision_table

_COLUMNS = ("example_id", "event_time", "snapshot_id", "failed_at", "reason")
_ENTRIES_PER_PARTITION = 20


def list_dead_letters(
    client: redis.Redis, tables: Folder, dataset: str, fm: str, *, partitions: int, limit: int
) -> list[dict[str, Any]]:
    """Give up to limit dead letters: first those that are not in the table yet, then those of the newest event days.

    Examples that were scored later are not listed.
    """
    letters = _logged(client, tables, dataset, fm, partitions, limit=limit)
    seen = {(letter["example_id"], letter["event_time"]) for letter in letters}
    table = TableReader(table_place(tables, dataset, dead_letters_table(fm)))
    if table.refresh() < 0:
        return letters
    place = table_place(tables, dataset, dead_letters_table(fm))
    scored_place = table_place(tables, dataset, supervision_table(fm))
    scored = TableReader(scored_place)
    scored.refresh()
    for day in sorted(table.days, reverse=True):
        if len(letters) >= limit:
            break
        files = pads.dataset(table.files_of_days([day]), filesystem=place.filesystem, format="parquet")
        for batch in files.to_batches(columns=list(_COLUMNS)):
            later = _scored(scored, scored_place, day, batch["example_id"])
            rows = [row for row in batch.to_pylist() if row["example_id"] not in later]
            letters += [row for row in rows if (row["example_id"], row["event_time"]) not in seen]
            if len(letters) >= limit:
                break
    return letters[:limit]


def _scored(scored: TableReader, place: TablePlace, day: dt.date, example_ids: pa.Array) -> set[str]:
    """Give which of these examples of an event day have supervision."""
    paths = scored.files_of_days([day], kinds=(OUTCOME,))
    if not paths or len(example_ids) == 0:
        return set()
    files = pads.dataset(paths, filesystem=place.filesystem, format="parquet")
    found = files.to_table(columns=["example_id"], filter=pads.field("example_id").isin(example_ids))
    return set(found["example_id"].to_pylist())


def _logged(
    client: redis.Redis, tables: Folder, dataset: str, fm: str, partitions: int, *, limit: int
) -> list[dict[str, Any]]:
    mark = read_mark(tables, dataset, dead_letters_table(fm))
    positions = {} if mark is None else mark.positions
    letters: list[dict[str, Any]] = []
    for partition in range(partitions):  # one at a time: twenty entries may be 80 MB
        after = {partition: positions.get(partition)}
        for entry in read_after(client, dataset, dead_log(fm), after, count=_ENTRIES_PER_PARTITION)[partition]:
            letters += _letters_of(entry, most=limit - len(letters))
            if len(letters) == limit:
                return letters
    return letters


def _letters_of(entry: Entry, *, most: int) -> list[dict[str, Any]]:
    failed_at = pa.scalar(entry.taken_at_us, pa.timestamp("us", "UTC")).as_py()
    rows = entry.batch(dead_schema()).slice(0, most).select(["example_id", "event_time", "reason"]).to_pylist()
    found = [{**row, "snapshot_id": entry.meta.get("snapshot_id"), "failed_at": failed_at} for row in rows]
    return [{column: letter[column] for column in _COLUMNS} for letter in found]


def replay_dead_letters(
    client: redis.Redis,
    tables: Folder,
    dataset: str,
    fm: str,
    *,
    spec: DatasetSpec,
    epoch: int,
    duck: Duck,
    example_ids: Collection[str] | None,
) -> int:
    """Let an FM try its dead letters (these ids, default all) again, and give how many.

    Raises:
        OverloadedError: The log of what it tries again is full; what was appended stays.
    """
    rescorer = Rescorer(client, tables, duck, dataset=dataset, spec=spec, epoch=epoch)
    return rescorer.replay_dead_letters(fm, example_ids=example_ids)
