"""as_of: the rows that were closed at a time, with what FMs had said by then, the same whenever it is asked.

That holds once nothing can come any more that belongs before that time: the sink has looked for rows to close since
(each turn says so, and later ones close with later times), and what was published by then is in the tables.
"""

import time
from datetime import datetime

import redis

from das_service.batches.bounds import wait_committed
from das_service.batches.query import BatchQuery
from das_service.errors import BadRequestError, ConflictError
from das_service.folder import Folder
from das_service.logs.records import dead_log, scored_log
from das_service.registry import Catalog
from schemas import keys

_WAIT_SECONDS = 8.0
_POLL_SECONDS = 0.2


def refuse_open_as_of(
    client: redis.Redis, folder: Folder, catalog: Catalog, dataset: str, query: BatchQuery, *, now: datetime
) -> None:
    """Wait until as_of is settled, or raise. now: of the clock, aware.

    Raises:
        BadRequestError: as_of_in_future.
        ConflictError: as_of_too_new: the sink has not come that far.
    """
    as_of_us = query.as_of_us or 0
    if as_of_us > now.timestamp() * 1_000_000:
        raise BadRequestError("as_of lies in the future: what will be known then can't be told", code="as_of_in_future")
    deadline = time.monotonic() + _WAIT_SECONDS
    while closed_through(client, dataset) <= as_of_us:
        if time.monotonic() >= deadline:
            raise _too_new("rows may still be closed that belong before it")
        time.sleep(_POLL_SECONDS)
    kinds = [kind for fm in query.fms for kind in (scored_log(fm), dead_log(fm))]
    partitions = catalog.spec(dataset).partitions
    if kinds and not wait_committed(client, folder, dataset, kinds, partitions=partitions, deadline=deadline):
        raise _too_new("supervision of before it is still on its way into the tables")


def closed_through(client: redis.Redis, dataset: str) -> int:
    """Give a time in microseconds: whatever is closed from now on has a later closed_at; -1 if none is known."""
    return int(client.hget(keys.CLOSED_THROUGH, dataset) or -1)


def _too_new(why: str) -> ConflictError:
    return ConflictError(f"as_of is too new: {why}; is the sink at work? try again", code="as_of_too_new")
