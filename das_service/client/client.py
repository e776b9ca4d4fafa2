"""The client of the service. Needs httpx and pyarrow, nothing else; pandas and polars frames are taken as they are.

client = Client("http://127.0.0.1:8000")
client.ingest("ads", frame)                                    # returns once the rows are on disk
table = client.lookup("ads", ids, fms=["teacher"])             # one row per id, in their order, as Arrow

Every call may be repeated without harm, and is, within its deadline, when the connection or the service fails.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, Unpack

import httpx
import pyarrow as pa

from das_service.client.arrow import ROWS_PER_REQUEST, iter_chunks, plain_table, to_table
from das_service.client.augment import run_augment
from das_service.client.batches import BatchOptions, BatchReader, ReaderOptions, batch_params, http_stream
from das_service.client.errors import (
    DasClientError,
    LostRaceError,
    RowsRefusedError,
    SnapshotRejectedError,
    count_from,
)
from das_service.client.frames import cut_at_days, join_keys, own_table, refuse_collision, with_columns
from das_service.client.http import ATTEMPT_SECONDS, Call, Caller, Clock, json_object, parse_problem, path_of
from das_service.client.ingest import IngestResult, ingest_chunks, parse_ingest_result
from das_service.client.progress import shown_progress
from schemas.wire import ARROW_STREAM, read_table, write_table

DEFAULT_URL = "http://127.0.0.1:8000"
IDS_PER_REQUEST = 20_000
ROWS_PER_AUGMENT = 1_000_000
AUGMENT_SECONDS = 600.0
_PIECES_AT_ONCE = 2
ANSWER_TOO_LARGE = "answer_too_large"
EmbeddingFormat = Literal["encoded", "float16", "float32"]


class Client:
    """A connection to one service. Threads may share it; close it, or use it in a `with`.

    url: of the API, default DAS_API_URL; token: default DAS_TOKEN. timeout_seconds: the longest that one call takes,
    all its retries included; a piece of augment that the service has taken may take AUGMENT_SECONDS.

    Raises:
        DasClientError: The url or the token can't be one (codes `bad_url`, `bad_token`).
    """

    FOLLOW_SECONDS = 1.0  # how often a loader that follows looks for more

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        timeout_seconds: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or Clock()
        self._token = (token or os.environ.get("DAS_TOKEN") or "").strip() or None
        self._transport = transport
        self._caller = Caller(
            url or os.environ.get("DAS_API_URL") or DEFAULT_URL,
            token=self._token,
            timeout_seconds=timeout_seconds,
            transport=transport,
            clock=self._clock,
        )

    @property
    def url(self) -> str:
        """Where the service is."""
        return self._caller.url

    def close(self) -> None:
        """Close the connections."""
        self._caller.close()

    def clone(self, *, clock: Clock | None = None) -> "Client":
        """Give another client of the same service, with connections of its own."""
        return Client(
            self.url,
            token=self._token,
            timeout_seconds=self._caller.timeout_seconds,
            transport=self._transport,
            clock=clock or self._clock,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle where it leads and with which token, no connection: what a loader's worker process needs."""
        return partial(Client, self.url, token=self._token, timeout_seconds=self._caller.timeout_seconds), ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---- datasets

    def put_dataset(self, dataset: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Declare a dataset, or let it grow by nullable features, and give the declaration that holds now.

        Raises:
            ConflictError: Another declaration is stored; `problem["differences"]` says where they differ.
        """
        return self._json("PUT", path_of("datasets", dataset), json=dict(spec))

    def get_dataset(self, dataset: str) -> dict[str, Any]:
        """Give a dataset's declaration."""
        return self._json("GET", path_of("datasets", dataset))

    def list_datasets(self) -> list[dict[str, Any]]:
        """Give the declared datasets."""
        return list(self._json("GET", "/v1/datasets")["datasets"])

    # ---- ingest

    def ingest(
        self,
        dataset: str,
        rows: Any,  # noqa: ANN401 - whatever holds a table
        *,
        on_error: Literal["skip", "abort"] = "skip",
        wait: Literal["none", "scored"] = "none",
        timeout_seconds: float = 10.0,
    ) -> IngestResult:
        """Hand in examples by one request and give what became of them, once they are on disk.

        rows: an Arrow table or batch, a pandas or polars frame, or a list of dicts. Rows of bad values are left out
        (on_error="abort": then none is taken). wait="scored" waits for their supervision, up to timeout_seconds.

        Raises:
            RowsRefusedError: None of the rows was taken; `errors` says why.
        """
        table = to_table(rows)
        params: dict[str, Any] = {"on_error": on_error}
        waiting = 0.0
        if wait == "scored":
            params |= {"wait": wait, "timeout_seconds": timeout_seconds}
            waiting = timeout_seconds
        call = Call(
            method="POST",
            path=path_of("datasets", dataset, "examples"),
            params=params,
            headers={"Content-Type": ARROW_STREAM, "Accept": "application/json"},
            content=write_table(table),
            attempt_seconds=ATTEMPT_SECONDS + waiting,
        )
        answer = self._caller.send(call, timeout_seconds=self._caller.timeout_seconds + waiting)
        return parse_ingest_result(json_object(answer))

    def ingest_batches(
        self,
        dataset: str,
        batches: Any,  # noqa: ANN401
        *,
        concurrency: int = 4,
        rows_per_request: int = ROWS_PER_REQUEST,
        on_progress: Callable[[IngestResult], None] | None = None,
        progress: bool = False,
    ) -> IngestResult:
        """Hand in any number of examples, some requests at a time, and give the account of all of them.

        batches: a table or frame, an Arrow reader, or an iterable of tables, frames or batches: it is read as the rows
        are sent. Rows of bad values are left out and counted. on_progress gets the account after each request;
        progress=True draws a bar on stderr or in a notebook, by `rich`. To go on after an error, hand in the same
        again: repeats change nothing.

        Raises:
            DasClientError: A request failed for good; the rows before it are on disk. Or there is no rich.
        """
        chunks = iter_chunks(batches, rows=rows_per_request)
        with shown_progress("ingest", batches, on_progress, progress=progress) as told:
            return ingest_chunks(partial(self.ingest, dataset), chunks, concurrency=concurrency, on_progress=told)

    def labels(
        self,
        dataset: str,
        data: Any,  # noqa: ANN401 - whatever holds a table
        *,
        on_error: Literal["skip", "abort"] = "skip",
    ) -> IngestResult:
        """Hand in labels and give what became of them; accepted ones are on disk.

        data: one table of at most 5,000 or so rows with example_id, label_time (aware) and a column per task, from 0 to
        1, null where nothing is said.

        Raises:
            RowsRefusedError: No label was stored.
        """
        call = Call(
            method="POST",
            path=path_of("datasets", dataset, "labels"),
            params={"on_error": on_error},
            headers={"Content-Type": ARROW_STREAM, "Accept": "application/json"},
            content=write_table(to_table(data)),
        )
        return parse_ingest_result(json_object(self._caller.send(call)))

    def label_batches(
        self,
        dataset: str,
        data: Any,  # noqa: ANN401 - a table, or an iterable of tables
        *,
        concurrency: int = 2,
        rows_per_request: int = ROWS_PER_REQUEST,
        on_progress: Callable[[IngestResult], None] | None = None,
        progress: bool = False,
    ) -> IngestResult:
        """Hand in any number of labels, as ingest_batches does examples, and give one account of all."""
        chunks = iter_chunks(data, rows=rows_per_request)
        with shown_progress("labels", data, on_progress, progress=progress) as told:
            return ingest_chunks(partial(self.labels, dataset), chunks, concurrency=concurrency, on_progress=told)

    # ---- supervision

    def lookup(
        self,
        dataset: str,
        example_ids: Any,  # noqa: ANN401 - a sequence or an Arrow array
        *,
        fms: Sequence[str],
        outputs: Sequence[str] | None = None,
        embedding_format: EmbeddingFormat = "float16",
        event_times: Sequence[datetime] | pa.Array | None = None,
        max_freshness_gap_seconds: float | None = None,
    ) -> pa.Table:
        """Give the supervision of examples from the online store: one row per id, in their order, repeats included.

        event_times: of the same rows, where the caller knows them: an id with another event_time is then not taken
        for this example. Long lists are asked for in several requests, as many as the service's bound on an answer
        makes necessary.

        Raises:
            TruncatedStreamError: An answer was cut on its way.
        """
        request = _lookup_table(example_ids, event_times)
        call = Call(
            method="POST",
            path=path_of("datasets", dataset, "supervision", "lookup"),
            params=_supervision_params(fms, outputs, embedding_format, max_freshness_gap_seconds),
            headers={"Content-Type": ARROW_STREAM, "Accept": ARROW_STREAM},
        )
        answers = list(self._iter_answers(call, request))
        return _one_table(answers)

    def augment(
        self,
        dataset: str,
        table: Any,  # noqa: ANN401 - whatever holds a table
        *,
        fms: Sequence[str],
        outputs: Sequence[str] | None = None,
        embedding_format: EmbeddingFormat = "float16",
        max_freshness_gap_seconds: float | None = None,
        on_progress: Callable[[int], None] | None = None,
        progress: bool = False,
    ) -> Any:  # noqa: ANN401 - the same kind of table
        """Give a trainer's own rows with supervision from the offline tables: same rows, same order, columns appended.

        table: an Arrow table, a pandas or polars frame, or rows, with example_id and event_time (aware) and any columns
        of your own, which stay here. The answer is a frame of the same library, else an Arrow table. Long tables are
        sent in pieces; on_progress gets the number of rows done after each, and progress=True draws a bar on stderr
        or in a notebook, by `rich`. Millions of rows are faster by augment_files.

        Raises:
            TypeError: It is no table.
            ValueError: A key column is missing, or one of yours has the name of one that is added.
            TruncatedStreamError: An answer was cut on its way.
        """
        table = own_table(table)
        request = join_keys(table)
        call = Call(
            method="POST",
            path=path_of("datasets", dataset, "supervision", "augment"),
            params={
                **_supervision_params(fms, outputs, embedding_format, max_freshness_gap_seconds),
                "columns": "supervision",
            },
            headers={"Content-Type": ARROW_STREAM, "Accept": ARROW_STREAM},
            attempt_seconds=AUGMENT_SECONDS,
        )

        def send(first_row: int, rows: pa.Table) -> pa.Table:
            piece = replace(call, content=write_table(rows.combine_chunks()))  # a chunk is a batch: they are counted
            try:
                answer = self._caller.send(
                    piece, timeout_seconds=AUGMENT_SECONDS, retry_seconds=self._caller.timeout_seconds
                )
            except RowsRefusedError as error:
                raise count_from(error, first_row) from None
            return read_table(answer.content)

        pieces = cut_at_days(request, most_rows=ROWS_PER_AUGMENT)
        answers: list[pa.Table] = []
        with (
            shown_progress("augment", request, on_progress, progress=progress) as told,
            ThreadPoolExecutor(_PIECES_AT_ONCE, thread_name_prefix="augment") as threads,
        ):
            try:
                for (start, rows), answer in zip(pieces, threads.map(send, *zip(*pieces, strict=True)), strict=True):
                    answers.append(answer)
                    refuse_collision(table, answer.schema.names)
                    told(start + rows.num_rows)
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return with_columns(table, _one_table(answers))

    def augment_files(
        self,
        dataset: str,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str],
        *,
        fms: Sequence[str],
        outputs: Sequence[str] | None = None,
        max_freshness_gap_seconds: float | None = None,
        folder: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> dict[str, Any]:
        """Join Parquet files where the tables are: no row goes over HTTP. Give rows, statuses and seconds.

        source: a Parquet file, or a folder of them; target: where the same rows go, in the same order, with supervision
        appended, embeddings as encoded. The join is `das augment` in a process of its own on this machine, which needs
        das-service[service] and must see the tables: folder names that of a `das up`, else DAS_TABLES_URI counts. A
        progress bar is shown on a terminal.

        Raises:
            DasClientError: It was refused; the message says why, and target is as it was.
        """
        return run_augment(
            [os.fspath(source), os.fspath(target)],
            {
                "--dataset": [dataset],
                "--fm": _names(fms),
                "--output": _names(outputs or ()),
                "--max-freshness-gap-seconds": [] if max_freshness_gap_seconds is None else [max_freshness_gap_seconds],
                "--folder": [] if folder is None else [os.fspath(folder)],
            },
            flags=["--overwrite"] if overwrite else [],
        )

    # ---- training batches

    def batches(
        self,
        dataset: str,
        *,
        cursor: str | None = None,
        shard: str | None = None,
        split: str | None = None,
        follow: bool = False,
        extend: bool = False,
        max_rows: int | None = None,
        **options: Unpack[BatchOptions],
    ) -> BatchReader:
        """Give a reader of closed rows: features, labels and supervision, in ready order, each row once.

        cursor: where to go on; what it was made with may be left out. shard: part i of n, as "i/n"; split: part j of m
        of what the cursor has left. follow goes on behind what is closed now, and waits; extend goes on behind a
        cursor's rows up to what is closed now. max_rows: end with the batch that reaches it. options: BatchOptions.

        Raises (as it is read):
            DasClientError: The service refuses, or gives no answer for the client's timeout_seconds.
        """
        asked: ReaderOptions = {
            "cursor": cursor, "shard": shard, "split": split, "follow": follow, "extend": extend, "max_rows": max_rows,
            **options,
        }  # fmt: skip
        return BatchReader(
            partial(http_stream, self._caller, path_of("datasets", dataset, "batches")),
            batch_params(asked),
            where=self._caller.url,
            timeout_seconds=self._caller.timeout_seconds,
            clock=self._clock,
        )

    def _iter_answers(self, call: Call, request: pa.Table) -> Iterator[pa.Table]:
        """Give the answers for consecutive pieces of the request; a piece whose answer is too large is halved."""
        start, size = 0, min(IDS_PER_REQUEST, max(1, request.num_rows))
        while start == 0 or start < request.num_rows:
            try:
                answer = self._caller.send(replace(call, content=write_table(request.slice(start, size))))
            except DasClientError as error:
                if error.code != ANSWER_TOO_LARGE or size == 1:
                    raise
                size //= 2
                continue
            yield read_table(answer.content)
            start += size

    # ---- FMs and snapshots

    def put_fm(self, dataset: str, fm: str, *, required: bool = True) -> dict[str, Any]:
        """Declare an FM. required: its unscored examples stay in the log, and count as unfinished."""
        return self._json("PUT", path_of("datasets", dataset, "fms", fm), json={"required": required})

    def get_fm(self, dataset: str, fm: str) -> dict[str, Any]:
        """Give an FM: required, outputs, active snapshot."""
        return self._json("GET", path_of("datasets", dataset, "fms", fm))

    def list_fms(self, dataset: str) -> list[dict[str, Any]]:
        """Give the FMs of a dataset."""
        return list(self._json("GET", path_of("datasets", dataset, "fms"))["fms"])

    def register_snapshot(self, dataset: str, fm: str, *, snapshot_id: str, uri: str, sha256: str) -> dict[str, Any]:
        """Register a snapshot that lies under DAS_SNAPSHOTS_URI, so that a worker validates it.

        sha256: the hex SHA-256 of its snapshot.json.
        """
        body = {"snapshot_id": snapshot_id, "uri": uri, "sha256": sha256}
        return self._json("POST", path_of("datasets", dataset, "fms", fm, "snapshots"), json=body)

    def get_snapshot(self, dataset: str, fm: str, snapshot_id: str) -> dict[str, Any]:
        """Give a snapshot: state, reasons, trained_through."""
        return self._json("GET", path_of("datasets", dataset, "fms", fm, "snapshots", snapshot_id))

    def list_snapshots(self, dataset: str, fm: str) -> list[dict[str, Any]]:
        """Give an FM's snapshots in the order of their registration."""
        return list(self._json("GET", path_of("datasets", dataset, "fms", fm, "snapshots"))["snapshots"])

    def wait_for_snapshot(
        self, dataset: str, fm: str, snapshot_id: str, *, timeout_seconds: float = 300.0, poll_seconds: float = 0.25
    ) -> dict[str, Any]:
        """Give a snapshot once a worker has looked at it and found it good.

        Raises:
            SnapshotRejectedError: The worker refused it; the message has the reasons.
            DasClientError: No worker has looked at it in time (code `snapshot_timeout`).
        """
        deadline = self._clock.monotonic() + timeout_seconds
        while True:
            snapshot = self.get_snapshot(dataset, fm, snapshot_id)
            if snapshot["state"] == "rejected":
                reasons = "; ".join(snapshot.get("reasons") or ["no reason was given"])
                raise SnapshotRejectedError(
                    f"snapshot {snapshot_id} of {dataset}/{fm} was rejected: {reasons}",
                    code="snapshot_rejected",
                    problem=snapshot,
                )
            if snapshot["state"] != "validating":
                return snapshot
            if self._clock.monotonic() >= deadline:
                raise DasClientError(
                    f"snapshot {snapshot_id} of {dataset}/{fm} is still validating after {timeout_seconds:g} s: "
                    "is a worker running? `das status` says",
                    code="snapshot_timeout",
                    retryable=True,
                )
            self._clock.sleep(poll_seconds)

    def active(self, dataset: str, fm: str) -> tuple[str | None, str | None]:
        """Give the id of the active snapshot, None before the first, and the ETag for activate_snapshot."""
        answer = self._caller.send(Call(method="GET", path=path_of("datasets", dataset, "fms", fm, "active")))
        return json_object(answer).get("snapshot_id"), answer.headers.get("ETag")

    def activate_snapshot(
        self, dataset: str, fm: str, snapshot_id: str, *, if_match: str | None = None
    ) -> dict[str, Any]:
        """Let a validated snapshot score from now on; naming a former one rolls back.

        if_match: the ETag of the state that the decision was made on; default: the state as it is now.

        Raises:
            LostRaceError: Somebody else changed it since.
            ConflictError: The snapshot is not validated, or it is retired.
        """
        etag = if_match if if_match is not None else self.active(dataset, fm)[1]
        headers = {"If-Match": etag} if etag else {}
        try:
            path = path_of("datasets", dataset, "fms", fm, "active")
            return self._json("PUT", path, json={"snapshot_id": snapshot_id}, headers=headers)
        except LostRaceError:
            if if_match is None and self.active(dataset, fm)[0] == snapshot_id:
                return {"snapshot_id": snapshot_id}  # our own first try, whose answer was lost
            raise

    def roll_back_snapshot(self, dataset: str, fm: str, *, if_match: str | None = None) -> dict[str, Any]:
        """Let the snapshot score that was active before the present one, which can publish nothing any more.

        if_match: as in activate_snapshot.

        Raises:
            LostRaceError: Somebody else changed it since; look at it before you try again.
            ConflictError: There is none to go back to.
        """
        etag = if_match if if_match is not None else self.active(dataset, fm)[1]
        path = path_of("datasets", dataset, "fms", fm, "rollback")
        return self._json("POST", path, headers={"If-Match": etag} if etag else {})

    def shadow(self, dataset: str, fm: str) -> dict[str, Any]:
        """Give which snapshot scores beside the active one, and what share: snapshot_id (None: none), share."""
        return self._json("GET", path_of("datasets", dataset, "fms", fm, "shadow"))

    def shadow_snapshot(self, dataset: str, fm: str, snapshot_id: str, *, share: float = 0.1) -> dict[str, Any]:
        """Let a validated snapshot score a share of the examples beside the active one; its answers are not served.

        Raises:
            ConflictError: It is not validated, or retired, or active, or there is no active one.
        """
        path = path_of("datasets", dataset, "fms", fm, "shadow")
        return self._json("PUT", path, json={"snapshot_id": snapshot_id, "share": share})

    def end_shadow(self, dataset: str, fm: str) -> dict[str, Any]:
        """Let no snapshot score beside the active one any more."""
        return self._json("DELETE", path_of("datasets", dataset, "fms", fm, "shadow"))

    def retire_snapshot(self, dataset: str, fm: str, snapshot_id: str) -> dict[str, Any]:
        """Let a snapshot never score again, and give it; what it said stays readable.

        Raises:
            ConflictError: It is the active one or the shadow.
        """
        return self._json("POST", path_of("datasets", dataset, "fms", fm, "snapshots", snapshot_id, "retire"))

    def audit(self, dataset: str, fm: str) -> list[dict[str, Any]]:
        """Give the last changes of an FM and its snapshots, the oldest first: at, who, what, before, after."""
        return list(self._json("GET", path_of("datasets", dataset, "fms", fm, "audit"))["entries"])

    # ---- operations

    def status(self) -> dict[str, Any]:
        """Give the state of the whole service (`/v1/status`)."""
        return self._json("GET", "/v1/status")

    def ready(self) -> dict[str, Any]:
        """Give what /health/ready says: `ready`, and `problems` in plain words; "not ready" is an answer."""
        answer = self._caller.ask_once("/health/ready")
        return {**parse_problem(answer), "ready": answer.is_success}

    def dead_letters(self, dataset: str, fm: str, *, limit: int = 100) -> list[dict[str, Any]]:
        """Give the examples that an FM failed on, with the reasons."""
        answer = self._json("GET", path_of("datasets", dataset, "dead-letters"), params={"fm": fm, "limit": limit})
        return list(answer["dead_letters"])

    def replay_dead_letters(self, dataset: str, fm: str, *, example_ids: Iterable[str] | None = None) -> dict[str, Any]:
        """Let an FM try its dead letters again, all or those of example_ids, and give how many."""
        body = {"fm": fm} if example_ids is None else {"fm": fm, "example_ids": list(example_ids)}
        return self._json("POST", path_of("datasets", dataset, "dead-letters", "replay"), json=body)

    def _json(
        self,
        method: str,
        path: str,
        *,
        json: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        call = Call(method=method, path=path, json=json, params=params or {}, headers=headers or {})
        return json_object(self._caller.send(call))


def _supervision_params(
    fms: Sequence[str], outputs: Sequence[str] | None, embedding_format: EmbeddingFormat, max_gap: float | None
) -> dict[str, Any]:
    params: dict[str, Any] = {"fms": _names(fms), "embedding_format": embedding_format}
    if outputs is not None:
        params["outputs"] = _names(outputs)
    if max_gap is not None:
        params["max_freshness_gap_seconds"] = max_gap
    return params


def _one_table(answers: Sequence[pa.Table]) -> pa.Table:
    """Give the answers as one; columns of an FM whose first snapshot was validated in between are null before that."""
    if len(answers) == 1:
        return answers[0]
    return pa.concat_tables(answers, promote_options="default").unify_dictionaries()


def _lookup_table(example_ids: Any, event_times: Any) -> pa.Table:  # noqa: ANN401
    columns = {"example_id": _array(example_ids, pa.string())}
    if event_times is not None:
        columns["event_time"] = _array(event_times, pa.timestamp("us", "UTC"))
    return plain_table(pa.table(columns))


def _array(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:  # noqa: ANN401
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    try:
        return pa.array(_names(values) if isinstance(values, str) else values, kind)
    except pa.ArrowTypeError as error:
        raise TypeError(f"values of type {kind} are needed: {error}") from error


def _names(names: Sequence[str]) -> list[str]:
    """Give names as a list; a single one may be given as it is, which else would be taken apart into letters."""
    return [names] if isinstance(names, str) else list(names)
