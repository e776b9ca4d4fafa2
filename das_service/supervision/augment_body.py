"""A table to augment as JSON: rows, and what is asked about them."""

from collections.abc import Sequence
from typing import Annotated, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from das_service.door.json_body import JSON_SHARE, parse_model
from das_service.door.spool import Spool
from das_service.door.validation import BodyLimits
from das_service.errors import InvalidRowsError, TooLargeError
from das_service.supervision.answer import EmbeddingFormat, LookupQuery
from das_service.supervision.augment import Upload, refuse_bad_rows
from das_service.supervision.lookup_body import EventTime, Gap, Names
from schemas.dataset import TIMESTAMP

Echo = Literal["all", "supervision"]
_CELL_BYTES = 8


class AugmentRow(BaseModel):
    """One row of a trainer's table; any other members are its own columns."""

    model_config = ConfigDict(frozen=True, extra="allow")

    example_id: str
    event_time: EventTime


class AugmentBody(BaseModel):
    """The JSON body of augment."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "example": {
                "fms": ["teacher"],
                "rows": [{"example_id": "a", "event_time": "2024-05-01T12:00:00Z", "label": 1}],
            }
        },
    )

    fms: Annotated[Names, Field(min_length=1, description="FMs of the dataset.")]
    rows: Annotated[tuple[AugmentRow, ...], Field(fail_fast=True)] = Field(
        description="The trainer's rows; their order and repeats are kept."
    )
    outputs: Names | None = Field(None, description="Tasks and embeddings wanted; default: all.")
    embedding_format: EmbeddingFormat = Field("float16", description="How embeddings are handed out.")
    max_freshness_gap_seconds: Gap | None = Field(None, description="A larger event_time - trained_through is stale.")
    columns: Echo = Field("all", description="supervision leaves the caller's own columns out of the answer.")


def parse_augment_json(spool: Spool, limits: BodyLimits) -> tuple[Upload, LookupQuery, Echo]:
    """Give the table of a JSON body and what is asked.

    Raises:
        BadRequestError: It is not JSON.
        InvalidRowsError: It has another shape, or the columns of the rows have no common type.
        TooLargeError: It has too many bytes or rows.
    """
    most = limits.max_decoded_bytes // JSON_SHARE
    if spool.num_bytes > most:
        raise TooLargeError(f"a JSON body may have {most} bytes; send Arrow for more")
    asked = parse_model(bytes(spool.data), AugmentBody, max_bytes=most)
    if len(asked.rows) > limits.max_rows:
        raise TooLargeError(
            f"the body has {len(asked.rows)} rows; a JSON request may have {limits.max_rows}: send Arrow"
        )
    _refuse_sparse(asked.rows, limits.max_decoded_bytes)
    table = _table(asked.rows)
    upload = Upload(schema=table.schema, source=table)
    refuse_bad_rows(upload.batches())
    query = LookupQuery(
        fms=tuple(dict.fromkeys(asked.fms)),
        outputs=asked.outputs,
        embedding_format=asked.embedding_format,
        max_freshness_gap_seconds=asked.max_freshness_gap_seconds,
    )
    return upload, query, asked.columns


def _refuse_sparse(rows: Sequence[AugmentRow], max_bytes: int) -> None:
    """Refuse rows whose table would be far larger than they are: a key of any row is a column of all of them.

    Raises:
        TooLargeError: It would.
    """
    columns: dict[tuple[int, str], int] = {}
    num_elements = sum(_note_columns(row.model_extra or {}, 0, columns) for row in rows)
    num_bytes = _CELL_BYTES * len(columns) * (len(rows) + num_elements)
    if num_bytes > max_bytes:
        raise TooLargeError(
            f"the rows have {len(columns)} columns of their own: as a table they take {num_bytes} bytes and may take "
            f"{max_bytes}; send fewer columns or rows, or Arrow"
        )


def _note_columns(value: object, parent: int, columns: dict[tuple[int, str], int]) -> int:
    """Number the columns that a value makes, by the one it lies in; give how many elements its lists have."""
    if isinstance(value, dict):
        places = [(columns.setdefault((parent, name), len(columns) + 1), item) for name, item in value.items()]
        return sum(_note_columns(item, place, columns) for place, item in places)
    if isinstance(value, list):
        return len(value) + sum(_note_columns(item, parent, columns) for item in value)
    return 0


def _table(rows: Sequence[AugmentRow]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in (row.model_extra or {}))
    try:
        columns = {
            "example_id": pa.array([row.example_id for row in rows], pa.string()),
            "event_time": pa.array([row.event_time for row in rows], TIMESTAMP),
            **{name: pa.array([(row.model_extra or {}).get(name) for row in rows]) for name in names},
        }
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        line = str(error).split("\n", 1)[0][:300]
        raise InvalidRowsError(f"the rows do not make a table: {line}", code="invalid_body") from None
    return pa.table(columns).combine_chunks()
