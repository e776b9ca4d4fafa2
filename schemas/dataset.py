"""A dataset: the union of the VM streams that share one table, declared once, grown only by nullable features."""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Literal, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from schemas.gates import SnapshotGates
from schemas.identity import Identity
from schemas.names import NAME_PATTERN, RESERVED_FEATURES

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
TIMESTAMP = pa.timestamp("us", "UTC")
DIGEST = pa.binary(16)

_GROWABLE = (
    "max_future_seconds",
    "allowed_lateness_seconds",
    "max_age_days",
    "online_ttl_seconds",
    "dedup_window_seconds",
    "snapshot_gates",
)


class Feature(BaseModel):
    """One input column of an example."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    type: Literal["float", "category", "category_list", "vector"]
    value_type: Literal["string", "int64"] | None = None
    nullable: bool = False
    max_length: Annotated[int, Field(ge=1, le=100_000)] | None = None
    size: Annotated[int, Field(ge=1, le=65_536)] | None = None

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        wanted = {
            "float": set(),
            "category": {"value_type"},
            "category_list": {"value_type", "max_length"},
            "vector": {"size"},
        }[self.type]
        for field in ("value_type", "max_length", "size"):
            if (getattr(self, field) is not None) != (field in wanted):
                verb = "needs" if field in wanted else "takes no"
                raise ValueError(f"feature {self.name!r}: a {self.type} {verb} {field}")
        if self.name in RESERVED_FEATURES:
            raise ValueError(f"feature {self.name!r}: the name is reserved for a column of the service")
        return self

    @property
    def arrow_type(self) -> pa.DataType:
        """Type of the column in a log entry; a vector is its float32 values packed little-endian."""
        value = pa.int64() if self.value_type == "int64" else pa.string()
        if self.type == "float":
            return pa.float64()
        if self.type == "category":
            return value
        if self.type == "category_list":
            return pa.list_(value)
        return pa.binary(4 * (self.size or 0))


class Task(BaseModel):
    """One outcome that is awaited and predicted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    label_window_seconds: Annotated[int, Field(ge=0, le=10 * 365 * 86_400)]
    negative_if_silent: bool = True


class DatasetSpec(BaseModel):
    """The declaration of a dataset (contract 2)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    entity_key: Annotated[tuple[Name, ...], Field(fail_fast=True, max_length=64)] = ()
    features: Annotated[tuple[Feature, ...], Field(fail_fast=True, min_length=1, max_length=4096)]
    tasks: Annotated[tuple[Task, ...], Field(fail_fast=True, max_length=1024)] = ()
    partitions: Annotated[int, Field(ge=1, le=1024)] = 4
    table_granularity: Literal["day", "week", "month"] = "day"
    max_future_seconds: Annotated[int, Field(ge=0)] = 300
    max_age_days: Annotated[int, Field(ge=1)] | None = None
    allowed_lateness_seconds: Annotated[int, Field(ge=0, le=10 * 365 * 86_400)] = 300
    online_ttl_seconds: Annotated[int, Field(ge=1, le=10 * 365 * 86_400)] = 604_800
    dedup_window_seconds: Annotated[int, Field(ge=1, le=10 * 365 * 86_400)] = 604_800
    snapshot_gates: SnapshotGates | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for kind, names in (("feature", [f.name for f in self.features]), ("task", [t.name for t in self.tasks])):
            repeated = sorted(name for name, count in Counter(names).items() if count > 1)
            if repeated:
                raise ValueError(f"{kind} names repeat: {', '.join(repeated)}")
        for task in self.tasks:
            if task.name in RESERVED_FEATURES or self.feature(task.name) is not None:
                raise ValueError(
                    f"task {task.name!r}: its label is a column of this name beside the features; rename it"
                )
        categories = {f.name for f in self.features if f.type == "category"}
        for key in self.entity_key:
            if key not in categories:
                raise ValueError(f"entity_key {key!r} is not a category feature of this dataset")
        return self

    @property
    def label_window_seconds(self) -> int:
        """The longest label window of its tasks: when it is over, an example's labels are what they are."""
        return max((task.label_window_seconds for task in self.tasks), default=0)

    def feature(self, name: str) -> Feature | None:
        """Give the feature of that name, None if there is none."""
        return next((feature for feature in self.features if feature.name == name), None)


def grow(stored: DatasetSpec, wanted: DatasetSpec) -> tuple[DatasetSpec, list[dict[str, object]]]:
    """Give what `stored` becomes when `wanted` is declared over it, and the differences that forbid it.

    Nullable features may be added (they go to the end, so that entries of the old schema stay readable) and limits
    and windows may change; anything else is a difference `{"field", "stored", "declared"}` and nothing changes.
    """
    differences = list(_differences(stored, wanted))
    if differences:
        return stored, differences
    known = {feature.name for feature in stored.features}
    added = tuple(feature for feature in wanted.features if feature.name not in known)
    changes: dict[str, object] = {field: getattr(wanted, field) for field in _GROWABLE}
    return stored.model_copy(update={"features": stored.features + added, **changes}), []


def _differences(stored: DatasetSpec, wanted: DatasetSpec) -> Iterator[dict[str, object]]:
    for field in ("entity_key", "tasks", "partitions", "table_granularity"):
        old, new = getattr(stored, field), getattr(wanted, field)
        if old != new:
            yield {"field": field, "stored": _plain(old), "declared": _plain(new)}
    declared = {feature.name: feature for feature in wanted.features}
    for feature in stored.features:
        other = declared.pop(feature.name, None)
        if other != feature:
            yield {"field": f"features.{feature.name}", "stored": _plain(feature), "declared": _plain(other)}
    for feature in declared.values():
        if not feature.nullable:
            yield {"field": f"features.{feature.name}", "stored": None, "declared": _plain(feature)}


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_none=True)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def example_schema(spec: DatasetSpec, *, num_features: int | None = None) -> pa.Schema:
    """Give the Arrow schema of an examples chunk in the log, with the first num_features features (default: all).

    Columns: example_id, example_digest (16 bytes, keys.digest of the id), event_time, then the features.
    """
    return _example_schema(Identity(spec), num_features)


@lru_cache(maxsize=64)  # it takes longer than the columns of a small request
def _example_schema(spec: Identity[DatasetSpec], num_features: int | None) -> pa.Schema:
    features = spec.of.features if num_features is None else spec.of.features[:num_features]
    head = [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("example_digest", DIGEST, nullable=False),
        pa.field("event_time", TIMESTAMP, nullable=False),
    ]
    return pa.schema(head + [pa.field(f.name, f.arrow_type, nullable=f.nullable) for f in features])


def label_schema(spec: DatasetSpec) -> pa.Schema:
    """Give the Arrow schema of a labels chunk in the log: the id, its digest, label_time, then a column per task.

    A label is in [0, 1], and null where the row says nothing of the task.
    """
    head = [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("example_digest", DIGEST, nullable=False),
        pa.field("label_time", TIMESTAMP, nullable=False),
    ]
    return pa.schema(head + [pa.field(task.name, pa.float32()) for task in spec.tasks])
