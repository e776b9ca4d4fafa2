"""Bodies of a lookup: which rows, by which FMs, in which form."""

from datetime import datetime
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from das_service.door.arrow_body import Body, read_batches
from das_service.door.columns import id_column, lookup_differences, refuse_differences, time_column
from das_service.door.json_body import JSON_SHARE, parse_model, parse_time
from das_service.door.row_errors import RowErrors
from das_service.door.validation import BodyLimits
from das_service.errors import InvalidRowsError, TooLargeError
from das_service.supervision.answer import EmbeddingFormat, LookupQuery
from das_service.supervision.lookup import Rows
from schemas.dataset import TIMESTAMP

EventTime = Annotated[AwareDatetime, BeforeValidator(parse_time)]
Names = Annotated[tuple[str, ...], Field(fail_fast=True)]  # else millions of wrong elements make millions of errors
Gap = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


class LookupBody(BaseModel):
    """The JSON body of a lookup. event_times: as many as example_ids, or absent."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        json_schema_extra={
            "example": {
                "fms": ["teacher"],
                "example_ids": ["a", "b"],
                "outputs": ["click"],
                "embedding_format": "float16",
            }
        },
    )

    fms: Annotated[Names, Field(min_length=1, description="FMs of the dataset.")]
    example_ids: Names = Field(description="Ids, in any order; repeats are answered each.")
    event_times: Annotated[tuple[EventTime | None, ...], Field(fail_fast=True)] | None = Field(
        None, description="Event times of the same rows: an id with an example of another event day is then absent."
    )
    outputs: Names | None = Field(None, description="Tasks and embeddings wanted; default: all.")
    embedding_format: EmbeddingFormat = Field("float16", description="How embeddings are handed out.")
    max_freshness_gap_seconds: Gap | None = Field(None, description="A larger event_time - trained_through is stale.")


def parse_lookup_json(body: Body, limits: BodyLimits) -> tuple[Rows, LookupQuery]:
    """Give what a JSON body asks.

    Raises:
        BadRequestError: It is not JSON.
        InvalidRowsError: It has another shape.
        TooLargeError: It has too many bytes or ids.
    """
    asked = parse_model(body, LookupBody, max_bytes=limits.max_decoded_bytes // JSON_SHARE)
    _bound(len(asked.example_ids), limits)
    times = None
    if asked.event_times is not None:
        if len(asked.event_times) != len(asked.example_ids):
            raise InvalidRowsError("event_times has another length than example_ids", code="invalid_body")
        times = _time_array(asked.event_times)
    try:
        ids = pa.array(asked.example_ids, pa.string())
    except UnicodeEncodeError:
        raise InvalidRowsError("an id holds half of a surrogate pair", code="invalid_body") from None
    query = LookupQuery(
        fms=tuple(dict.fromkeys(asked.fms)),
        outputs=asked.outputs,
        embedding_format=asked.embedding_format,
        max_freshness_gap_seconds=asked.max_freshness_gap_seconds,
    )
    return Rows(example_id=ids, event_time=times), query


def _time_array(times: tuple[datetime | None, ...]) -> pa.Array:
    try:
        return pa.array(times, TIMESTAMP)
    except (pa.ArrowInvalid, OverflowError) as error:
        raise InvalidRowsError(f"event_times: {error}", code="invalid_body") from None


def parse_lookup_arrow(body: Body, limits: BodyLimits) -> Rows:
    """Give the rows of an Arrow body: a column example_id, and event_time if the caller likes.

    Raises:
        BadRequestError: The stream is damaged or was cut.
        InvalidRowsError: schema_mismatch, an id is null, or an event_time is finer than a microsecond.
        TooLargeError: It is over a limit.
    """
    budget = limits.budget()
    schema, batches = read_batches(
        body, budget=budget, max_rows=limits.max_rows, expect=lambda s: refuse_differences(lookup_differences(s))
    )
    ids = id_column(schema, batches, budget)
    errors = RowErrors(len(ids))
    times = time_column(schema, batches, errors) if "event_time" in schema.names else None
    if ids.null_count:
        errors.refuse(np.asarray(ids.is_null()), column="example_id", code="null", message="it is null")
    if errors.num_refused:
        raise InvalidRowsError(
            f"{errors.num_refused} rows can't be looked up", code="invalid_rows", extra={"errors": errors.listed(ids)}
        )
    return Rows(example_id=ids, event_time=times)


def _bound(num_ids: int, limits: BodyLimits) -> None:
    if num_ids > limits.max_rows:
        raise TooLargeError(f"the body has {num_ids} ids; a request may have {limits.max_rows}")


def names_of(values: list[str]) -> tuple[str, ...]:
    """Give names that came repeated or separated by commas, each once."""
    return tuple(dict.fromkeys(name for value in values for name in value.split(",") if name))
