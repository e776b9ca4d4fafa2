"""Rows made from a dataset's declaration alone: what a model must survive when no golden rows came with it."""

import random

import pyarrow as pa

from schemas.dataset import DatasetSpec, Feature

_STRINGS = ("", "a", "user_1", "Ünïcödé 東京 🎈", "x" * 200)
_INTEGERS = (0, 1, -1, 2**63 - 1, -(2**63))
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5)


def synthetic_rows(spec: DatasetSpec, num_rows: int, *, seed: int = 0) -> pa.Table:
    """Give num_rows rows in the log's column types, the same for the same arguments.

    Edges come among ordinary values: nulls (and an all-null first row) where the feature is nullable, empty lists, a
    list of max_length, empty and non-ASCII strings, the ends of int64, zeros of both signs.
    """
    rng = random.Random(seed)  # noqa: S311 - test data, no secret
    columns = [_column(feature, num_rows, rng) for feature in spec.features]
    fields = [pa.field(feature.name, feature.arrow_type, nullable=feature.nullable) for feature in spec.features]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def _column(feature: Feature, num_rows: int, rng: random.Random) -> pa.Array:
    values = [_value(feature, place, rng) for place in range(num_rows)]
    if feature.nullable:
        values = [None if place == 0 or rng.random() < 0.2 else value for place, value in enumerate(values)]
    return pa.array(values, feature.arrow_type)


def _value(feature: Feature, place: int, rng: random.Random) -> object:
    if feature.type == "float":
        return rng.choice(_FLOATS) if place % 4 == 0 else rng.gauss(0.0, 1.0)
    if feature.type == "category":
        return _category(feature, place, rng)
    if feature.type == "category_list":
        longest = feature.max_length or 0
        length = (0, longest, 1)[place] if place < 3 else rng.randint(0, min(longest, 16))
        return [_category(feature, rng.randrange(8), rng) for _ in range(length)]
    return pa.array([rng.gauss(0.0, 1.0) for _ in range(feature.size or 0)], pa.float32()).buffers()[1].to_pybytes()


def _category(feature: Feature, place: int, rng: random.Random) -> object:
    if feature.value_type == "int64":
        return rng.choice(_INTEGERS) if place % 4 == 0 else rng.randrange(100_000)
    return rng.choice(_STRINGS) if place % 4 == 0 else f"v{rng.randrange(100_000)}"
