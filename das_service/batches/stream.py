"""One reader's stream of training batches, from its first cursor to its end, or on and on.

Pages are made as they are read; their size is what the readers of this process may hold together, shared evenly.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import ValidationError

from das_service.batches.bounds import next_cursor
from das_service.batches.cursor import Cursor, encode_cursor
from das_service.batches.pages import Counts, Page, PageReader
from das_service.batches.reader import MarkedBatch, empty_batch, iter_batches, iter_ranges
from das_service.batches.shards import fitting_block, parse_shard
from das_service.errors import BadRequestError, OverloadedError
from das_service.folder import Folder
from das_service.registry import Catalog
from das_service.tables.duck import Duck
from schemas.wire import CURSOR_KEY, iter_marked_parts

Going: TypeAlias = Literal["no", "extend", "follow"]
_Coming: TypeAlias = "deque[tuple[Future[Page], int]]"
KEEP_ALIVE_SECONDS = 10.0
REOPEN_SECONDS = 600.0
_LEAST_PAGE_BYTES, _MOST_PAGE_BYTES = 8 * 1024 * 1024, 96 * 1024 * 1024
_PAGES_AHEAD = 2
_PAGES_EACH = 1 + _PAGES_AHEAD  # the one that is read, and those that come
_FIRST_ROW_BYTES = 1024
_FIRST_PAGE_ROWS, _MOST_PAGE_ROWS = 16_384, 262_144  # the first rows come soon; each page may be twice as long
_PERMIT_TRIES = 10
_PAGES_AT_ONCE = 2


class PageBudget:
    """What the pages of all readers of a process may take together. Threads share it."""

    def __init__(self, *, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._readers = 0
        self._lock = threading.Lock()

    @contextmanager
    def reader(self) -> Iterator[None]:
        """Count a reader in for as long as this lasts."""
        with self._lock:
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1

    @property
    def page_bytes(self) -> int:
        """What one reader's page may take."""
        share = self._total_bytes // max(1, self._readers) // _PAGES_EACH
        return max(_LEAST_PAGE_BYTES, min(_MOST_PAGE_BYTES, share))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a stream is read from. pool: makes the pages; count: is told of the statuses of rows that were joined."""

    duck: Duck
    pool: Executor
    folder: Folder
    catalog: Callable[[], Catalog]
    budget: PageBudget
    count: Callable[[str, Counts], None]


def page_pool() -> ThreadPoolExecutor:
    """Give the threads that make pages, for all readers of a process."""
    return ThreadPoolExecutor(_PAGES_AT_ONCE, thread_name_prefix="pages")


def split_cursor(cursor: Cursor, text: str) -> Cursor:
    """Give the cursor of one of several readers that share what another has left.

    Raises:
        BadRequestError: shard_invalid.
    """
    total = 1
    for shard in cursor.chain:
        total *= shard.total
    try:
        wanted = parse_shard(text, block=1)
    except ValueError as error:
        raise BadRequestError(str(error), code="shard_invalid") from None
    block = fitting_block(cursor.num_rows // total, total=wanted.total, partitions=len(cursor.low))
    shard = wanted.model_copy(update={"block": block})
    try:
        return Cursor.model_validate({**cursor.model_dump(), "chain": (*cursor.chain, shard)})
    except ValidationError as error:
        raise BadRequestError(error.errors()[0]["msg"], code="shard_invalid") from None


class BatchStream:
    """The batches from a cursor on. One thread at a time."""

    def __init__(self, reading: Reading, cursor: Cursor, *, going: Going = "no") -> None:
        """Check the cursor against what is declared, and look at the tables.

        Raises:
            UnknownNameError, BadRequestError, InvalidRowsError: The query names what is not there.
        """
        self._reading = reading
        self.cursor = cursor
        self._going = going
        self._row_bytes = float(_FIRST_ROW_BYTES)
        self._most_rows = _FIRST_PAGE_ROWS
        self._pages = self._open(cursor)
        self.schema = self._pages.schema

    def _open(self, cursor: Cursor) -> PageReader:
        self._opened_at = time.monotonic()
        return PageReader(self._reading.duck, self._reading.folder, self._reading.catalog(), cursor)

    def iter_parts(self, *, max_rows: int | None = None) -> Generator[bytes | None, None, None]:
        """Give the Arrow stream, a part per batch; None where nothing is closed yet: ask again later."""
        return iter_marked_parts(
            self.schema,
            (None if item is None else (item[0], _marks(item[1])) for item in self.iter_marked(max_rows=max_rows)),
            metadata=_marks(self.cursor),
            at_once=self._going == "follow",
        )

    def iter_marked(self, *, max_rows: int | None = None) -> Iterator[MarkedBatch | None]:
        """Give batches with the cursors behind them, up to the one that reaches max_rows rows."""
        left = max_rows
        if left == 0:
            return
        for item in self._iter_segments():
            if item is not None and left is not None:
                batch, _ = item
                if batch.num_rows >= left:
                    yield item
                    return
                left -= batch.num_rows
            yield item

    def _iter_segments(self) -> Iterator[MarkedBatch | None]:
        while True:
            with self._reading.budget.reader():
                for batch, cursor in iter_batches(self._iter_pages(), self.schema, self.cursor):
                    self.cursor = cursor
                    yield batch, cursor
            following = yield from self._next_segment()
            if following is None:
                return
            self.cursor = following
            self._pages = self._open(following)
            if self._pages.schema != self.schema:
                return  # an FM has got its first snapshot: who goes on from the cursor sees its columns

    def _next_segment(self) -> Generator[MarkedBatch | None, None, Cursor | None]:
        """Give where to go on, None for nowhere; while following, what keeps the connection alive until then."""
        if self._going == "no":
            return None
        quiet_since = time.monotonic()
        while True:
            following = next_cursor(self._reading.folder, self._reading.catalog(), self.cursor)
            if following is not self.cursor:
                if self._going == "extend":
                    self._going = "no"
                return following
            if self._going == "extend":
                return None
            if time.monotonic() - quiet_since >= KEEP_ALIVE_SECONDS:
                quiet_since = time.monotonic()
                yield empty_batch(self.schema), self.cursor
            else:
                yield None

    # ---- pages

    def _iter_pages(self) -> Iterator[tuple[Page, int]]:
        """Give the pages up to the cursor's bounds, and how far each looked; others are made while one is read."""
        ranges = iter_ranges(self.cursor, self._page_rows)
        coming: _Coming = deque()
        self._submit(ranges, coming)
        try:
            while coming:
                future, through = coming.popleft()
                page = future.result()
                if page.num_rows:
                    self._row_bytes = max(1.0, page.nbytes / page.num_rows)
                self._submit(ranges, coming)
                self._reading.count(self.cursor.dataset, page.counts)
                yield page, through
        finally:
            for later, _ in coming:
                later.cancel()

    def _submit(self, ranges: Iterator[list[tuple[int, int]]], coming: _Coming) -> None:
        while len(coming) < _PAGES_AHEAD and (part := next(ranges, None)) is not None:
            coming.append((self._reading.pool.submit(self._read, part), part[-1][1]))

    def _page_rows(self) -> int:
        most = min(self._most_rows, _MOST_PAGE_ROWS)
        self._most_rows = 2 * most
        return max(1, min(most, int(self._reading.budget.page_bytes / self._row_bytes)))

    def _read(self, ranges: list[tuple[int, int]]) -> Page:
        if time.monotonic() - self._opened_at > REOPEN_SECONDS:  # files that compaction replaced go away some day
            self._pages = self._open(self.cursor)
        for _ in range(_PERMIT_TRIES - 1):
            try:
                return self._pages.read(ranges)
            except OverloadedError:  # others hold DuckDB: a stream that has begun waits on
                continue
        return self._pages.read(ranges)


def _marks(cursor: Cursor) -> Mapping[bytes, bytes]:
    return {CURSOR_KEY: encode_cursor(cursor).encode()}
