"""What a reader of training batches may ask for, as `GET .../batches` spells it, and the stream that it gets."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from das_service.batches.bounds import refuse_beyond, start_cursor
from das_service.batches.cursor import Cursor, decode_cursor
from das_service.batches.filters import FilterError, checked_filter, parse_filter
from das_service.batches.query import BATCH_ROWS, MOST_BATCH_ROWS, BatchQuery, all_columns, refuse_unknown
from das_service.batches.shards import common_block, parse_shard
from das_service.batches.stream import BatchStream, Going, Reading, split_cursor
from das_service.errors import BadRequestError
from das_service.registry import Catalog
from das_service.supervision.answer import EmbeddingFormat
from das_service.supervision.lookup_body import names_of

_MOST_CURSOR = 60_000
Settle = Callable[[Catalog, BatchQuery], None]


def _no_number(value: object) -> object:
    """Refuse what pydantic would take for seconds since 1970."""
    if isinstance(value, str) and "-" in value[1:]:
        return value
    raise ValueError("give a time as 2024-05-01T12:00:00Z")


_Time = Annotated[AwareDatetime, BeforeValidator(_no_number)]
_DAY_ONE = datetime(1970, 1, 1, tzinfo=UTC)


class BatchParameters(BaseModel):
    """The query parameters of a reader. Lists are repeated or separated by commas."""

    model_config = ConfigDict(extra="forbid")  # a misspelt filter must not give all rows

    fms: list[str] = Field([], description="FMs; none: labels alone.")
    outputs: list[str] | None = Field(None, description="Tasks and embeddings wanted of the FMs; default all.")
    columns: list[str] | None = Field(
        None,
        description="Features and tasks wanted, also ready_seq, closed_at, received_at, is_late; default: all features "
        "and tasks.",
    )
    embedding_format: EmbeddingFormat = "float16"
    max_freshness_gap_seconds: float | None = Field(
        None, ge=0, le=1e12, allow_inf_nan=False, description="A larger freshness gap is `stale`."
    )
    snapshot: list[str] = Field([], description="The only snapshot that counts: its id, or fm:id.")
    filter: str | None = Field(None, description='Conditions: [["display","!=","0"],["hour","in",[8,9]]].')
    since: _Time | None = Field(None, alias="from", description="First event_time, RFC 3339.")
    until: _Time | None = Field(None, alias="to", description="event_time before this, RFC 3339.")
    as_of: _Time | None = Field(None, description="Only what was closed and scored by then.")
    batch_rows: int = Field(BATCH_ROWS, ge=1, le=MOST_BATCH_ROWS, description="Rows of a batch.")
    shard: str | None = Field(None, max_length=32, description="Part i of n, as i/n.")
    split: str | None = Field(None, max_length=32, description="Part j of m of what the cursor has left, as j/m.")
    cursor: str | None = Field(None, max_length=_MOST_CURSOR, description="Where to go on.")
    follow: bool = Field(default=False, description="Go on behind the bounds, and wait for rows to close.")
    extend: bool = Field(default=False, description="Go on behind the cursor's bounds, up to what is closed now.")
    max_rows: int | None = Field(None, ge=0, description="End with the batch that reaches this.")

    @property
    def going(self) -> Going:
        """How to go on behind the bounds."""
        return "follow" if self.follow else "extend" if self.extend else "no"


def open_stream(reading: Reading, dataset: str, asked: BatchParameters, *, settle: Settle) -> BatchStream:
    """Check what is asked; give the stream, of which nothing is read yet. settle: waits until as_of is settled.

    Raises:
        DasError: What is asked can't be, or as_of is not settled.
    """
    catalog = reading.catalog()
    spec = catalog.spec(dataset)
    if asked.cursor is None:
        cursor = _start(reading, catalog, dataset, asked, settle)
    else:
        cursor = decode_cursor(asked.cursor, dataset=dataset, partitions=spec.partitions)
        refuse_beyond(reading.folder, cursor)
        _refuse_changes(cursor, _query(catalog, dataset, asked), asked)
    if asked.split is not None:
        cursor = split_cursor(cursor, asked.split)
    return BatchStream(reading, cursor, going=asked.going)


def _start(reading: Reading, catalog: Catalog, dataset: str, asked: BatchParameters, settle: Settle) -> Cursor:
    """Give the cursor before the first row."""
    query = _query(catalog, dataset, asked)
    refuse_unknown(catalog, dataset, query)
    if asked.as_of is not None:
        settle(catalog, query)
    partitions = catalog.spec(dataset).partitions
    try:
        chain = [] if asked.shard is None else [parse_shard(asked.shard, block=common_block(partitions))]
    except ValueError as error:
        raise BadRequestError(str(error), code="shard_invalid") from None
    return start_cursor(reading.folder, catalog, dataset, query, duck=reading.duck, chain=chain)


def _query(catalog: Catalog, dataset: str, asked: BatchParameters) -> BatchQuery:
    """Give what the parameters ask for; not yet checked against the dataset."""
    try:
        conditions = parse_filter(asked.filter) if asked.filter is not None else []
        return BatchQuery(
            fms=names_of(asked.fms),
            outputs=None if asked.outputs is None else names_of(asked.outputs),
            embedding_format=asked.embedding_format,
            max_freshness_gap_seconds=asked.max_freshness_gap_seconds,
            pinned=_pins(asked),
            columns=all_columns(catalog.spec(dataset)) if asked.columns is None else names_of(asked.columns),
            conditions=checked_filter(catalog.spec(dataset), conditions),
            from_us=_microseconds(asked.since),
            to_us=_microseconds(asked.until),
            as_of_us=_microseconds(asked.as_of),
            batch_rows=asked.batch_rows,
        )
    except FilterError as error:
        raise BadRequestError(f"filter: {error}", code="filter_invalid") from None


def _pins(asked: BatchParameters) -> dict[str, str]:
    """Give the snapshot of each FM that one is named for, as `id` where one FM is asked, or as `fm:id`.

    Raises:
        BadRequestError: snapshot_invalid.
    """
    pins = {}
    fms = names_of(asked.fms)
    for text in names_of(asked.snapshot):
        fm, colon, snapshot_id = text.partition(":")
        if not colon and len(fms) != 1:
            raise BadRequestError(
                f"snapshot={text}: say of which FM it is, as fm:id, where fms= does not name one FM alone",
                code="snapshot_invalid",
            )
        pins[fm if colon else fms[0]] = snapshot_id if colon else text
    return pins


def _microseconds(at: datetime | None) -> int | None:
    return None if at is None else (at - _DAY_ONE) // timedelta(microseconds=1)


_OF_QUERY = {
    "fms": "fms", "outputs": "outputs", "columns": "columns", "embedding_format": "embedding_format",
    "max_freshness_gap_seconds": "max_freshness_gap_seconds", "snapshot": "pinned", "filter": "conditions",
    "since": "from_us", "until": "to_us", "as_of": "as_of_us", "batch_rows": "batch_rows",
}  # fmt: skip


def _refuse_changes(cursor: Cursor, query: BatchQuery, asked: BatchParameters) -> None:
    """Raise if a parameter says other than the cursor does.

    Raises:
        BadRequestError: cursor_invalid.
    """
    mine, theirs, given = cursor.query.model_dump(mode="json"), query.model_dump(mode="json"), asked.model_fields_set
    changed = [name for name, field in _OF_QUERY.items() if name in given and mine[field] != theirs[field]]
    if asked.shard is not None and asked.shard not in {f"{part.number}/{part.total}" for part in cursor.chain[:1]}:
        changed.append("shard")
    if changed:
        raise BadRequestError(
            f"the cursor was made with another {', '.join(changed)}: leave out what it says, or start without it",
            code="cursor_invalid",
        )


def refuse_endless(asked: BatchParameters, *, as_json: bool) -> None:
    """Raise if what is asked for can't end, or can't go on.

    Raises:
        BadRequestError: malformed.
    """
    going_on = "follow" if asked.going == "follow" else "extend"
    if asked.going != "no" and (asked.as_of is not None or asked.until is not None):
        raise BadRequestError(f"{going_on} goes on with what closes later: leave out as_of and to")
    if asked.going == "follow" and as_json:
        raise BadRequestError("follow is an Arrow stream: leave out Accept, or ask for pages with cursor")
    if asked.going == "extend" and asked.cursor is None:
        raise BadRequestError("extend goes on behind a cursor: give one")
    if asked.split is not None and asked.cursor is None:
        raise BadRequestError("split shares what a cursor has left: give one, or ask for a shard", code="shard_invalid")
