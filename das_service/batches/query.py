"""What a reader of training batches asks for, checked against the dataset. It travels in the cursor."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from das_service.batches.filters import Condition, FilterError, checked_filter
from das_service.errors import BadRequestError
from das_service.registry import Catalog
from das_service.supervision.answer import EmbeddingFormat, LookupQuery, refuse_unknown_outputs
from schemas.dataset import DatasetSpec

BATCH_ROWS, MOST_BATCH_ROWS = 8_192, 65_536
MOST_NAMES = 8_192
FROM_CLOSED = ("ready_seq", "closed_at")
FROM_EXAMPLES = ("received_at", "is_late")
_Names = Annotated[tuple[str, ...], Field(max_length=MOST_NAMES)]
_Us = Annotated[int, Field(ge=-(1 << 62), le=1 << 62)]


class BatchQuery(BaseModel):
    """What is asked for. Times in microseconds: event_time in [from_us, to_us); as_of_us: what was known then.

    columns: features, tasks and a few of the service's own, beside example_id and event_time. pinned: by FM the only
    snapshot whose supervision counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fms: _Names = ()
    outputs: _Names | None = None
    embedding_format: EmbeddingFormat = "float16"
    max_freshness_gap_seconds: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)] | None = None
    pinned: Annotated[dict[str, str], Field(max_length=MOST_NAMES)] = {}
    columns: _Names = ()
    conditions: tuple[tuple[str, str, Any], ...] = ()
    from_us: _Us | None = None
    to_us: _Us | None = None
    as_of_us: _Us | None = None
    batch_rows: Annotated[int, Field(ge=1, le=MOST_BATCH_ROWS)] = BATCH_ROWS

    @property
    def supervision(self) -> LookupQuery:
        """What is asked of the FMs."""
        return LookupQuery(
            fms=self.fms,
            outputs=self.outputs,
            embedding_format=self.embedding_format,
            max_freshness_gap_seconds=self.max_freshness_gap_seconds,
        )


def all_columns(spec: DatasetSpec) -> tuple[str, ...]:
    """Give the columns that a reader gets who names none: the features and the labels."""
    return (*(feature.name for feature in spec.features), *(task.name for task in spec.tasks))


def refuse_unknown(catalog: Catalog, dataset: str, query: BatchQuery) -> tuple[Condition, ...]:
    """Refuse a query that names what is not there; give its conditions, checked. A cursor's query is checked too.

    Raises:
        UnknownNameError: The dataset, an FM or a snapshot is not declared.
        BadRequestError: unknown_column, filter_invalid or snapshot_invalid.
        InvalidRowsError: unknown_output.
    """
    spec = catalog.spec(dataset)
    refuse_unknown_outputs([catalog.fm(dataset, fm) for fm in query.fms], query.supervision)
    known = {*all_columns(spec), *FROM_CLOSED, *FROM_EXAMPLES}
    unknown = [name for name in query.columns if name not in known]
    if unknown:
        raise BadRequestError(
            f"dataset {dataset!r} has no column {', '.join(unknown[:10])}; it has {', '.join(sorted(known)[:100])}",
            code="unknown_column",
        )
    _refuse_pins(catalog, dataset, query.fms, query.pinned)
    try:
        return checked_filter(spec, query.conditions)
    except FilterError as error:
        raise BadRequestError(f"filter: {error}", code="filter_invalid") from error


def _refuse_pins(catalog: Catalog, dataset: str, fms: tuple[str, ...], pinned: Mapping[str, str]) -> None:
    for fm, snapshot_id in pinned.items():
        if fm not in fms:
            raise BadRequestError(f"snapshot {snapshot_id!r} is of FM {fm!r}, which fms= does not name",
                                  code="snapshot_invalid")  # fmt: skip
        catalog.snapshot(dataset, fm, snapshot_id)
