"""How far a reader reads: fixed when it starts, from what is durable then."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import redis

from das_service.batches.cursor import Cursor, FmBounds
from das_service.batches.query import BatchQuery
from das_service.batches.shards import Shard
from das_service.errors import DasError
from das_service.folder import Folder
from das_service.logs.records import Mark, dead_log, read_mark, ready_name, scored_log, table_of_log
from das_service.logs.streams import LogCounters, read_counters
from das_service.registry import Catalog
from das_service.tables.duck import Duck, source_of
from das_service.tables.offline_store import TableReader, table_place
from schemas.entries import Position
from schemas.tables import CLOSED

_ALL = (1 << 63) - 1  # positions: the time decides


def start_cursor(
    folder: Folder, catalog: Catalog, dataset: str, query: BatchQuery, *, duck: Duck, chain: Sequence[Shard] = ()
) -> Cursor:
    """Give the cursor before all rows that are closed now, or were at as_of; that cursor is the same whenever asked.

    event_time is looked at as rows are read.

    Raises:
        OverloadedError: No permit for DuckDB came free.
    """
    partitions = catalog.spec(dataset).partitions
    end = closed_ends(folder, dataset, partitions)  # read first: what closed rows waited for is in what is read next
    if query.as_of_us is None:
        fms = _fm_bounds(folder, catalog, dataset, query.fms)
    else:
        end = _ends_at(folder, dataset, end, query.as_of_us, duck)
        fms = {fm: _bounds_at(catalog, dataset, fm, query.as_of_us) for fm in query.fms}
    return Cursor(dataset=dataset, query=query, fms=fms, low=(0,) * partitions, end=end, chain=tuple(chain))


def _ends_at(folder: Folder, dataset: str, end: tuple[int, ...], as_of_us: int, duck: Duck) -> tuple[int, ...]:
    """Give per partition the ready_seq after the last row that was closed by then: closed_at never goes back."""
    reader = TableReader(table_place(folder, dataset, CLOSED))
    reader.refresh()
    found = [0] * len(end)
    files = [file for each in reader.days.values() for file in each]
    with duck.room_for("as_of"), duck.cursor() as cursor:
        source = source_of(cursor, "closed", reader.rows_of(files))
        if source is not None:
            query = (
                f"SELECT _partition, max(ready_seq) + 1 FROM {source} "  # noqa: S608 - a name of ours
                f"WHERE epoch_us(closed_at) <= {as_of_us} GROUP BY _partition"
            )
            for partition, after in cursor.sql(query).fetchall():
                found[partition] = min(after, end[partition])
    return tuple(found)


def _bounds_at(catalog: Catalog, dataset: str, fm: str, as_of_us: int) -> FmBounds:
    """Give bounds for what was available at a time, which each row of the FM's tables says itself."""
    partitions = catalog.spec(dataset).partitions
    at = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=as_of_us)
    known = [catalog.snapshot(dataset, fm, name).registered_at <= at for name in catalog.fm(dataset, fm).snapshots]
    return FmBounds(
        snapshots=known.index(False) if False in known else len(known),
        supervision=(_ALL,) * partitions,
        dead_letters=(_ALL,) * partitions,
    )


def next_cursor(folder: Folder, catalog: Catalog, cursor: Cursor) -> Cursor:
    """Give the cursor that goes on behind a finished one, up to what is closed now."""
    end = closed_ends(folder, cursor.dataset, len(cursor.end))
    if not any(map(int.__gt__, end, cursor.end)):
        return cursor
    bounds = _fm_bounds(folder, catalog, cursor.dataset, cursor.query.fms)
    return cursor.model_copy(update={"low": cursor.end, "end": tuple(map(max, end, cursor.end)), "fms": bounds})


def closed_ends(folder: Folder, dataset: str, partitions: int) -> tuple[int, ...]:
    """Give per partition the ready_seq after the last row that is durably closed."""
    mark = read_mark(folder, dataset, CLOSED)
    numbers: Mapping[str, int] = {} if mark is None else mark.numbers
    return tuple(numbers.get(ready_name(partition), 0) for partition in range(partitions))


def refuse_beyond(folder: Folder, cursor: Cursor) -> None:
    """Refuse a cursor that is about rows which the tables do not have, as after a restore of older ones.

    Raises:
        DasError: 410, cursor_expired.
    """
    ends = closed_ends(folder, cursor.dataset, len(cursor.end))
    if any(map(int.__gt__, cursor.end, ends)):
        raise DasError(
            "the cursor is about rows that the tables do not hold: were older ones put back? start again without it",
            code="cursor_expired",
            http_status=410,
        )


def _fm_bounds(folder: Folder, catalog: Catalog, dataset: str, fms: Sequence[str]) -> dict[str, FmBounds]:
    partitions = catalog.spec(dataset).partitions
    return {
        fm: FmBounds(
            snapshots=len(catalog.fm(dataset, fm).snapshots),
            supervision=_positions(folder, dataset, scored_log(fm), partitions),
            dead_letters=_positions(folder, dataset, dead_log(fm), partitions),
        )
        for fm in fms
    }


def _positions(folder: Folder, dataset: str, kind: str, partitions: int) -> tuple[int, ...]:
    mark = _mark_of(folder, dataset, kind)
    return tuple(_number(None if mark is None else mark.positions.get(p)) for p in range(partitions))


def _mark_of(folder: Folder, dataset: str, kind: str) -> Mark | None:
    table = table_of_log(kind)
    return None if table is None else read_mark(folder, dataset, table)


def _number(position: Position | None) -> int:
    return -1 if position is None else position.number


def wait_committed(
    client: redis.Redis,
    folder: Folder,
    dataset: str,
    kinds: Sequence[str],
    *,
    partitions: int,
    deadline: float,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Wait until the tables hold what the logs hold now; give whether they do. deadline: monotonic seconds."""
    counters = read_counters(client, dataset, range(partitions), kinds)
    wanted = {at: _last(counted) for at, counted in counters.items()}
    while True:
        marks = {kind: _mark_of(folder, dataset, kind) for kind in kinds}
        positions = {kind: {} if mark is None else mark.positions for kind, mark in marks.items()}
        if all(_number(positions[kind].get(p)) >= number for (p, kind), number in wanted.items()):
            return True
        if time.monotonic() >= deadline:
            return False
        sleep(0.1)


def _last(counted: LogCounters) -> int:
    if counted.last < 0:
        return _number(counted.older)
    return Position(epoch=counted.epoch, seq=counted.last).number
