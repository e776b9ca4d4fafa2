"""Waiting until rows that were just taken have supervision of every required FM.

Because all rows are waited for, a look asks for a few of them alone, and for the next ones only when these are settled,
scored or failed: what a long wait costs the server does not grow with its rows.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import redis

from das_service.ingest import split_by_partition
from das_service.redis_client import ScriptCall, run_scripts, script
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.supervision import FAILED

ROWS_PER_LOOK = 1_000
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.01, 0.25


@dataclass(frozen=True, slots=True)
class Awaited:
    """Rows of one partition that one FM has yet to score: their digests, one after the other."""

    fm: str
    partition: int
    digests: bytes


def awaited_rows(batch: pa.RecordBatch, spec: DatasetSpec, fms: Sequence[str]) -> list[Awaited]:
    """Give what has to be scored before all rows of the batch (example_schema) have supervision of all FMs."""
    parts = [
        (partition, keys.digest_bytes(part.column("example_digest")))
        for partition, part in split_by_partition(batch.select(["example_digest"]), spec.partitions)
    ]
    return [Awaited(fm, partition, digests) for fm in fms for partition, digests in parts]


def still_awaited(client: redis.Redis, dataset: str, awaited: Sequence[Awaited]) -> tuple[list[Awaited], int]:
    """Give (what is still not scored, how many rows were found failed)."""
    calls = [
        ScriptCall(
            script("known"),
            [keys.counters(dataset, item.partition)],
            [keys.online_prefix(dataset, item.partition, item.fm), item.digests],
        )
        for item in awaited
    ]
    left, failed = [], 0
    for item, reply in zip(awaited, run_scripts(client, calls), strict=True):
        if isinstance(reply, Exception):
            raise reply
        known = set(reply[0::2])
        failed += sum(head[1] == FAILED for head in reply[1::2])
        rest = [item.digests[at : at + 16] for at in range(0, len(item.digests), 16) if at // 16 not in known]
        if rest:
            left.append(Awaited(item.fm, item.partition, b"".join(rest)))
    return left, failed


async def wait_until_scored(
    look: Callable[[list[Awaited]], Awaitable[tuple[list[Awaited], int]]],
    awaited: list[Awaited],
    *,
    timeout_seconds: float,
) -> bool:
    """Give whether all rows got supervision in time; it ends as soon as every row is scored or failed.

    look gives which of the rows that it is handed are still not scored, and how many it found failed: such a row never
    will be.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    delay, failed = _FIRST_DELAY_SECONDS, 0
    while awaited:
        asked, rest = first_rows(awaited, ROWS_PER_LOOK)
        unsettled, newly_failed = await look(asked)
        awaited, failed = [*unsettled, *rest], failed + newly_failed
        if not unsettled:
            continue
        left = deadline - loop.time()
        if left <= 0:
            break
        await asyncio.sleep(min(delay, left))
        delay = min(delay * 1.5, _LONGEST_DELAY_SECONDS)
    return not awaited and failed == 0


def first_rows(awaited: Sequence[Awaited], num_rows: int) -> tuple[list[Awaited], list[Awaited]]:
    """Give (the first num_rows rows, the others), in their order."""
    first: list[Awaited] = []
    left = 16 * num_rows
    for place, item in enumerate(awaited):
        first.append(replace(item, digests=item.digests[:left]))
        if len(item.digests) >= left:
            beyond = [replace(item, digests=item.digests[left:])] if len(item.digests) > left else []
            return first, [*beyond, *awaited[place + 1 :]]
        left -= len(item.digests)
    return first, []
