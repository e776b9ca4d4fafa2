"""Reading training batches: one stream after the other, each going on where the last one broke off."""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypedDict

import httpx
import pyarrow as pa

from das_service.client.errors import DasClientError, UnreachableError
from das_service.client.http import Call, Caller, Clock
from schemas.wire import ARROW_STREAM, CURSOR_KEY, TruncatedStreamError, iter_marked

READ_SECONDS = 60.0  # a stream that follows sends something every ten seconds
OpenStream = Callable[[Mapping[str, Any]], AbstractContextManager[Any]]
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0


class BatchOptions(TypedDict, total=False):
    """What may be asked for, as in `GET .../batches`.

    fms: none gives labels alone. filter: conditions such as [["display", "!=", "0"], ["hour", "in", [8, 9]]].
    since, until: event_time in [since, until); as_of: what was closed and scored then; all aware. snapshot: the only
    ones that count, ids or fm:id. columns, outputs: default all.
    """

    fms: Sequence[str] | str
    outputs: Sequence[str] | None
    columns: Sequence[str] | None
    embedding_format: Literal["encoded", "float16", "float32"]
    max_freshness_gap_seconds: float | None
    snapshot: Sequence[str] | str | None
    filter: Sequence[Sequence[Any]] | None
    since: datetime | None
    until: datetime | None
    as_of: datetime | None
    batch_rows: int


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Rows in ready order, and the cursor behind the last of them."""

    rows: pa.RecordBatch
    cursor: str


class ReaderOptions(BatchOptions, total=False):
    """What is read of it, and how a reader goes on, as Client.batches says."""

    cursor: str | None
    shard: str | None
    split: str | None
    follow: bool
    extend: bool
    max_rows: int | None


def batch_params(options: ReaderOptions) -> dict[str, Any]:
    """Give the query parameters for options; what is not asked for is left out."""
    params: dict[str, Any] = {}
    for name, value in options.items():
        if value is None or value is False:
            continue
        if name == "filter":
            params[name] = json.dumps(value)
        elif isinstance(value, datetime):
            params[{"since": "from", "until": "to"}.get(name, name)] = value.isoformat()
        elif isinstance(value, str | int | float):
            params[name] = value
        else:
            params[name] = list(value)  # type: ignore[call-overload]
    return params


class BatchReader:
    """An iterator over batches. A lost connection or a restart of the service costs no row and repeats none.

    cursor: where the reader is; a reader that is made from it goes on there. One thread at a time.
    """

    def __init__(
        self, open_stream: OpenStream, params: Mapping[str, Any], *, where: str, timeout_seconds: float, clock: Clock
    ) -> None:
        """Name what is read; nothing is asked yet. timeout_seconds: the longest without an answer.

        open_stream: gives the Arrow stream for parameters as a file; where: from whom, in words.
        """
        self.cursor: str | None = params.get("cursor")
        self._open_stream = open_stream
        self._where = where
        self._params = dict(params)
        self._schema: pa.Schema | None = None
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._left: int | None = params.get("max_rows")
        self._batches = self._iter_all()

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self

    def __next__(self) -> TrainingBatch:
        return next(self._batches)

    def close(self) -> None:
        """Close the connection."""
        self._batches.close()

    def start(self) -> str:
        """Give the cursor before the first row that is left, asking the service if need be."""
        if self.cursor is None or (self.cursor == self._params.get("cursor") and "split" in self._params):
            self.cursor = None
            for _ in self._answers({**self._params, "max_rows": 0}):
                pass
        if self.cursor is None:
            raise DasClientError("the service's answer has no cursor", code="bad_answer")
        return self.cursor

    def schema(self) -> pa.Schema:
        """Give the columns of the batches, asking the service if need be."""
        if self._schema is None:
            for _ in self._answers({**self._params, "max_rows": 0}):
                pass
        if self._schema is None:
            raise DasClientError("the service's answer has no columns", code="bad_answer")
        return self._schema

    def _iter_all(self) -> Any:  # noqa: ANN401 - a generator
        while True:
            params = self._going_on()
            for batch in self._answers(params):
                self.cursor = batch.cursor
                if self._left is not None:
                    self._left = max(0, self._left - batch.rows.num_rows)
                if batch.rows.num_rows:
                    yield batch
            if not self._params.get("follow"):
                return

    def _going_on(self) -> dict[str, Any]:
        """Give the parameters for what is left."""
        params = dict(self._params)
        if self._left is not None:
            params["max_rows"] = self._left
        if self.cursor is None:
            return params
        if self.cursor != self._params.get("cursor"):  # then it holds the rest
            params = {name: params[name] for name in ("follow", "extend", "max_rows") if name in params}
        return {**params, "cursor": self.cursor}

    def _answers(self, params: Mapping[str, Any]) -> Iterator[TrainingBatch]:
        """Give the batches of a stream, of another one from the last cursor on when it breaks off.

        Raises:
            DasClientError: The service refuses, or gives no answer for timeout_seconds.
        """
        pause, deadline = _FIRST_PAUSE_SECONDS, self._clock.monotonic() + self._timeout_seconds
        while True:
            try:
                for batch in self._one_stream(params):
                    pause, deadline = _FIRST_PAUSE_SECONDS, self._clock.monotonic() + self._timeout_seconds
                    yield batch
            except (TruncatedStreamError, httpx.TransportError, DasClientError) as error:
                if isinstance(error, DasClientError) and not error.retryable:
                    raise
                if self._clock.monotonic() + pause >= deadline:
                    raise _told(error, self._where) from error
            else:
                return
            self._clock.sleep(pause * (0.5 + self._clock.chance() / 2))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            params = self._going_on() if params.get("max_rows") != 0 else params

    def _one_stream(self, params: Mapping[str, Any]) -> Iterator[TrainingBatch]:
        with self._open_stream(params) as stream:
            for rows, marks in iter_marked(stream):
                self._schema = rows.schema.remove_metadata()
                cursor = marks.get(CURSOR_KEY)
                if cursor is not None:
                    yield TrainingBatch(rows, cursor.decode())
                elif self.cursor is None and rows.schema.metadata:
                    self.cursor = rows.schema.metadata[CURSOR_KEY].decode()


@contextmanager
def http_stream(caller: Caller, path: str, params: Mapping[str, Any]) -> Iterator["_Body"]:
    """Give a service's answer to `GET .../batches`."""
    call = Call(
        method="GET", path=path, params=params, headers={"Accept": ARROW_STREAM}, attempt_seconds=READ_SECONDS
    )  # fmt: skip
    with caller.streamed(call) as response:
        yield _Body(response)


class _Body(io.RawIOBase):
    """The body of an answer as a file."""

    def __init__(self, response: httpx.Response) -> None:
        self._pieces = response.iter_raw()
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Give so many bytes, fewer at the end alone."""
        found, left = [], size if size >= 0 else 1 << 62
        while left:
            if not self._held:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._held = memoryview(piece)
            taken = self._held[:left]
            found.append(taken)
            self._held = self._held[len(taken) :]
            left -= len(taken)
        return b"".join(found)


def _told(error: Exception, where: str) -> DasClientError:
    if isinstance(error, DasClientError):
        return error
    return UnreachableError(
        f"no answer from {where}: {error or type(error).__name__}", code="unreachable", retryable=True
    )
