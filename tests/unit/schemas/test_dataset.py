"""A dataset's declaration: what it refuses, and how it may grow."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.dataset import DatasetSpec, Feature, example_schema, grow

NAMES = st.text("abcdefgh", min_size=1, max_size=3)
LIMITS = st.integers(1, 10_000)


def build_feature(name: str, kind: str, *, nullable: bool = False) -> Feature:
    parts: dict[str, object] = {
        "float": {},
        "category": {"value_type": "string"},
        "category_list": {"value_type": "int64", "max_length": 8},
        "vector": {"size": 4},
    }[kind]
    return Feature.model_validate({"name": name, "type": kind, "nullable": nullable, **parts})


FEATURE = st.builds(
    build_feature, NAMES, st.sampled_from(["float", "category", "category_list", "vector"]), nullable=st.booleans()
)
SPEC = st.builds(
    DatasetSpec,
    features=st.lists(FEATURE, min_size=1, max_size=5, unique_by=lambda f: f.name).map(tuple),
    partitions=st.integers(1, 8),
    max_future_seconds=LIMITS,
    online_ttl_seconds=LIMITS,
    dedup_window_seconds=LIMITS,
)


@given(SPEC)
def test_declaring_the_same_again_changes_nothing(spec: DatasetSpec) -> None:
    assert grow(spec, spec) == (spec, [])


@given(SPEC)
def test_a_declaration_survives_json(spec: DatasetSpec) -> None:
    assert DatasetSpec.model_validate_json(spec.model_dump_json()) == spec


@given(SPEC, SPEC)
def test_growing_keeps_the_old_features_in_front_or_says_why_it_does_not(
    stored: DatasetSpec, wanted: DatasetSpec
) -> None:
    grown, differences = grow(stored, wanted)
    assert grown.features[: len(stored.features)] == stored.features
    assert (grown == stored) or not differences


@given(SPEC, SPEC)
def test_what_was_grown_is_stable(stored: DatasetSpec, wanted: DatasetSpec) -> None:
    grown, _ = grow(stored, wanted)
    assert grow(grown, grown) == (grown, [])


@given(SPEC, st.lists(NAMES, max_size=3, unique=True))
def test_nullable_features_may_be_added_anywhere_and_go_to_the_end(spec: DatasetSpec, names: list[str]) -> None:
    known = {feature.name for feature in spec.features}
    added = tuple(build_feature(name, "float", nullable=True) for name in names if name not in known)
    wanted = spec.model_copy(update={"features": added + spec.features})
    grown, differences = grow(spec, wanted)
    assert differences == []
    assert grown.features == spec.features + added


@given(SPEC, SPEC)
def test_old_chunks_have_the_first_columns_of_the_grown_schema(stored: DatasetSpec, wanted: DatasetSpec) -> None:
    grown, _ = grow(stored, wanted)
    assert example_schema(grown, num_features=len(stored.features)) == example_schema(stored)


def test_limits_and_windows_may_change() -> None:
    spec = DatasetSpec(features=(build_feature("a", "float"),))
    wanted = spec.model_copy(update={"max_age_days": 30, "online_ttl_seconds": 60})
    assert grow(spec, wanted) == (wanted, [])


def test_every_difference_is_said() -> None:
    stored = DatasetSpec(features=(build_feature("a", "float"), build_feature("b", "float")), partitions=4)
    wanted = DatasetSpec(features=(build_feature("a", "vector"), build_feature("c", "float")), partitions=8)
    grown, differences = grow(stored, wanted)
    assert grown == stored
    assert [(d["field"], d["declared"] is None) for d in differences] == [
        ("partitions", False),
        ("features.a", False),
        ("features.b", True),
        ("features.c", False),
    ]


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"name": "a", "type": "category"}, "a category needs value_type"),
        ({"name": "a", "type": "float", "size": 3}, "a float takes no size"),
        ({"name": "a", "type": "vector"}, "a vector needs size"),
        ({"name": "a", "type": "category_list", "value_type": "string"}, "a category_list needs max_length"),
        ({"name": "example_id", "type": "float"}, "the name is reserved"),
        ({"name": "Upper", "type": "float"}, "String should match pattern"),
    ],
)
def test_a_feature_that_makes_no_sense_is_refused(feature: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Feature.model_validate(feature)


def test_features_that_repeat_and_keys_that_are_no_category_are_refused() -> None:
    with pytest.raises(ValidationError, match="feature names repeat: a"):
        DatasetSpec(features=(build_feature("a", "float"), build_feature("a", "float")))
    with pytest.raises(ValidationError, match="entity_key 'a' is not a category"):
        DatasetSpec(features=(build_feature("a", "float"),), entity_key=("a",))


def test_columns_of_a_chunk() -> None:
    kinds = ("float", "category", "category_list", "vector")
    spec = DatasetSpec(features=tuple(build_feature(f"x{i}", kind) for i, kind in enumerate(kinds)))
    assert example_schema(spec).types[3:] == [pa.float64(), pa.string(), pa.list_(pa.int64()), pa.binary(16)]
