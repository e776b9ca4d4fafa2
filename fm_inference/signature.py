"""What a model takes and gives, as its team states it, and whether that fits the dataset it is for."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fm_inference.vocabulary import Vocabulary
from schemas.dataset import DatasetSpec, Feature, Name
from schemas.names import SNAPSHOT_ID_PATTERN
from schemas.snapshot import (
    GOLDEN_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    Encode,
    FloatEncode,
    Input,
    Outputs,
    VocabularyEncode,
)

_WRITTEN_BY_EXPORT = frozenset({"format", "created_at", "trained_through", "files"})


class Signature(BaseModel):
    """The manifest's part that a team writes; `inputs` and `outputs` may be given in their JSON form.

    `golden`: rows in the dataset's columns, kept with the answers expected for them. `dataset`: the declaration, to
    check against and to make example rows of. With neither, example rows are made of what the inputs imply, which
    cannot tell a vector from a float. `vocabularies`: file name -> known values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    fm: Name
    snapshot_id: Annotated[str, Field(pattern=SNAPSHOT_ID_PATTERN)]
    inputs: tuple[Input, ...] = Field(min_length=1)
    outputs: Outputs
    max_batch: int = Field(default=8192, ge=1, le=1_000_000)
    golden: pa.Table | None = None
    dataset: DatasetSpec | None = None
    vocabularies: Mapping[str, tuple[str | int, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.golden is not None and self.golden.num_rows == 0:
            raise ValueError("golden has no rows; leave it out")
        taken = sorted({MANIFEST_FILE, MODEL_FILE, GOLDEN_FILE} & self.vocabularies.keys())
        if taken:
            raise ValueError(f"vocabularies: {', '.join(taken)} is the name of another file of the folder")
        if self.dataset is not None:
            reasons = fit_reasons(self.inputs, self.outputs, self.dataset)
            if reasons:
                raise ValueError("; ".join(reasons))
        return self

    def built_vocabularies(self) -> dict[str, Vocabulary]:
        """Give each vocabulary ready for look-ups, by file name."""
        return {name: Vocabulary(values) for name, values in self.vocabularies.items()}


def read_signature(signature: "Signature | Mapping[str, Any]") -> "Signature":
    """Give the signature; a mapping may have the other keys of snapshot.json too, which export writes itself.

    Raises:
        pydantic.ValidationError: It is not one.
    """
    if isinstance(signature, Signature):
        return signature
    return Signature.model_validate({key: value for key, value in signature.items() if key not in _WRITTEN_BY_EXPORT})


def implied_dataset(inputs: tuple[Input, ...]) -> DatasetSpec:
    """Give a dataset that these inputs could be of: float features, string categories, lists where there is pad_to."""
    features: dict[str, dict[str, Any]] = {}
    for wanted in inputs:
        pad_to = None if isinstance(wanted.encode, FloatEncode) else wanted.encode.pad_to
        for name in wanted.features:
            if isinstance(wanted.encode, FloatEncode):
                features[name] = {"type": "float"}
            elif pad_to is None:
                features[name] = {"type": "category", "value_type": "string"}
            else:
                features[name] = {"type": "category_list", "value_type": "string", "max_length": pad_to}
    named = [{"name": name, "nullable": True, **fields} for name, fields in features.items()]
    return DatasetSpec.model_validate({"features": named})


def fit_reasons(inputs: tuple[Input, ...], outputs: Outputs, spec: DatasetSpec) -> list[str]:
    """Give every reason why this signature cannot be used on this dataset; empty if it can."""
    reasons = [reason for wanted in inputs for reason in _input_reasons(wanted, spec)]
    tasks = {task.name for task in spec.tasks}
    reasons += [f"outputs.logits: the dataset has no task {name!r}" for name in outputs.logits if name not in tasks]
    return reasons


def _input_reasons(wanted: Input, spec: DatasetSpec) -> Iterator[str]:
    for name in wanted.features:
        feature = spec.feature(name)
        if feature is None:
            yield f"input {wanted.tensor!r}: the dataset has no feature {name!r}"
        elif problem := _encode_problem(feature, wanted.encode, alone=len(wanted.features) == 1):
            yield f"input {wanted.tensor!r}, feature {name!r}: {problem}"
    if not isinstance(wanted.encode, FloatEncode) and wanted.encode.mask and wanted.encode.pad_to is None:
        yield f"input {wanted.tensor!r}: a mask needs pad_to"


def _encode_problem(feature: Feature, encode: Encode, *, alone: bool) -> str | None:
    if isinstance(encode, FloatEncode):
        numeric = feature.type in ("float", "vector")
        return None if numeric else f"a {feature.type} cannot be encoded as float"
    if feature.type not in ("category", "category_list"):
        return f"a {feature.type} cannot be encoded as {encode.kind}"
    if feature.type == "category":
        return "pad_to is for a category_list" if encode.pad_to is not None else None
    if encode.pad_to is None:
        return "a category_list needs pad_to"
    return None if alone else "a category_list needs a tensor of its own"


def vocabulary_reasons(
    inputs: tuple[Input, ...], vocabularies: Mapping[str, Vocabulary], spec: DatasetSpec
) -> list[str]:
    """Give every reason why a vocabulary cannot hold the values of the features that use it."""
    reasons = []
    for wanted in inputs:
        if not isinstance(wanted.encode, VocabularyEncode) or wanted.encode.file not in vocabularies:
            continue
        kinds = {feature.value_type for feature in spec.features if feature.name in wanted.features}
        if "int64" in kinds and not all(_is_int64(value) for value in vocabularies[wanted.encode.file].values):
            reasons.append(f"{wanted.encode.file}: a line is not an int64 in plain decimal (input {wanted.tensor!r})")
    return reasons


def _is_int64(text: str) -> bool:
    try:
        number = int(text)
    except ValueError:
        return False
    return str(number) == text and -(2**63) <= number < 2**63
