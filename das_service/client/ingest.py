"""Bulk ingest of the client: many requests, a bounded number in flight, one account of them all."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import pyarrow as pa

from das_service.client.errors import RowError, RowsRefusedError, parse_row_errors

MAX_ERRORS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestResult:
    """What became of the rows that were handed in.

    accepted: rows on disk, repeats included. rejected: rows refused, of which `errors` describes the first 1,000.
    positions: per partition where the last chunk lies in its log. scored: with wait="scored", whether every accepted
    row had supervision in time; else None.
    """

    accepted: int = 0
    rejected: int = 0
    errors: tuple[RowError, ...] = ()
    errors_truncated: bool = False
    positions: Mapping[int, int] = field(default_factory=dict)
    scored: bool | None = None

    def plus(self, other: "IngestResult", *, first_row: int) -> "IngestResult":
        """Give the account of both; other's rows start at first_row of what was handed in."""
        moved = [replace(error, row=error.row + first_row) for error in other.errors]
        errors = (*self.errors, *moved)
        flags = [flag for flag in (self.scored, other.scored) if flag is not None]
        return IngestResult(
            accepted=self.accepted + other.accepted,
            rejected=self.rejected + other.rejected,
            errors=errors[:MAX_ERRORS],
            errors_truncated=self.errors_truncated or other.errors_truncated or len(errors) > MAX_ERRORS,
            positions={**self.positions, **other.positions},
            scored=all(flags) if flags else None,
        )


def parse_ingest_result(body: Mapping[str, Any]) -> IngestResult:
    """Give the result that an answer of the door spells."""
    return IngestResult(
        accepted=int(body.get("accepted", 0)),
        rejected=int(body.get("rejected", 0)),
        errors=parse_row_errors(body),
        errors_truncated=bool(body.get("errors_truncated", False)),
        positions={int(partition): int(seq) for partition, seq in (body.get("positions") or {}).items()},
        scored=body.get("scored"),
    )


class _Send(Protocol):
    def __call__(self, chunk: pa.Table) -> IngestResult: ...


def ingest_chunks(
    send: _Send,
    chunks: Iterator[pa.Table],
    *,
    concurrency: int,
    on_progress: Callable[[IngestResult], None] | None,
) -> IngestResult:
    """Send the chunks with at most `concurrency` of them in flight and give the account of all.

    The chunks are taken from the iterator as places fall free, so that memory holds `concurrency` + 1 of them.
    on_progress is called in the caller's thread, in order, with the account so far.

    Raises:
        DasClientError: A chunk could not be sent; those before it were, and so may those in flight be.
    """
    total = IngestResult()
    first_row = 0
    in_flight: deque[tuple[Future[IngestResult], int]] = deque()

    def settle() -> None:
        nonlocal total, first_row
        future, rows = in_flight.popleft()
        total = total.plus(future.result(), first_row=first_row)
        first_row += rows
        if on_progress is not None:
            on_progress(total)

    with ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="das-ingest") as pool:
        try:
            for chunk in chunks:
                if len(in_flight) >= concurrency:
                    settle()
                in_flight.append((pool.submit(_send_chunk, send, chunk), chunk.num_rows))
            while in_flight:
                settle()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return total


def _send_chunk(send: _Send, chunk: pa.Table) -> IngestResult:
    """Give the chunk's account; all rows refused by their values is an account too, a misfit of the schema is not."""
    try:
        return send(chunk)
    except RowsRefusedError as error:
        if not error.errors:
            raise
        return parse_ingest_result(error.problem)
