"""A snapshot folder's manifest, snapshot.json (contract 6): what a model takes, gives and knows."""

from datetime import datetime
from typing import Annotated, Literal, Self

import pyarrow as pa
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator, model_validator

from schemas.codecs import Codec, encoded_width
from schemas.dataset import DIGEST, TIMESTAMP, Name
from schemas.names import RESERVED_EMBEDDINGS, SNAPSHOT_ID_PATTERN

FORMAT: Literal[1] = 1
MANIFEST_FILE = "snapshot.json"
MODEL_FILE = "model.pt2"
GOLDEN_FILE = "golden.arrow"
TensorName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$", max_length=128)]
Sha256 = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class HashEncode(_Strict):
    """xxh64 of the value, seeded by the feature's name, modulo buckets; int64 tensor."""

    kind: Literal["hash"]
    buckets: Annotated[int, Field(ge=1, le=2**40)]
    pad_to: Annotated[int, Field(ge=1, le=100_000)] | None = None
    mask: TensorName | None = None


class VocabularyEncode(_Strict):
    """Line number of the value in a UTF-8 text file of the folder, from 1; 0 is unknown or null; int64 tensor."""

    kind: Literal["vocabulary"]
    file: FileName
    pad_to: Annotated[int, Field(ge=1, le=100_000)] | None = None
    mask: TensorName | None = None


class FloatEncode(_Strict):
    """The value as float32, `null` where it is null. A vector gives its size columns."""

    kind: Literal["float"]
    null: float = 0.0


Encode = Annotated[HashEncode | VocabularyEncode | FloatEncode, Field(discriminator="kind")]


class Input(_Strict):
    """One keyword tensor of the model: (B, features), or (B, pad_to) with a bool mask for one ragged list."""

    tensor: TensorName
    features: Annotated[tuple[Name, ...], Field(min_length=1)]
    encode: Encode


class Embedding(_Strict):
    """One vector output: its tensor (B, size), and how its bytes are packed."""

    tensor: TensorName
    size: Annotated[int, Field(ge=1, le=65_536)]
    codec: Codec


class Outputs(_Strict):
    """What an FM says of an example. Fixed for an FM by its first snapshot."""

    logits: dict[Name, TensorName] = Field(default_factory=dict)
    embeddings: dict[Name, Embedding] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        if not self.logits and not self.embeddings:
            raise ValueError("outputs: there is neither a logit nor an embedding")
        taken = RESERVED_EMBEDDINGS | {f"{task}__logit" for task in self.logits}
        for name in self.embeddings:
            if name in taken:
                raise ValueError(f"outputs: the embedding name {name!r} is taken by another column")
        return self

    def columns(self) -> "OutputColumns":
        """Give the part that readers see: names, sizes and codecs, without the model's tensor names."""
        return OutputColumns(
            tasks=tuple(self.logits),
            embeddings={name: (e.size, e.codec) for name, e in self.embeddings.items()},
        )


class OutputColumns(_Strict):
    """Tasks and embeddings (name -> size, codec) of an FM, in column order."""

    tasks: tuple[Name, ...]
    embeddings: dict[Name, tuple[int, Codec]]

    def widths(self) -> dict[str, int]:
        """Bytes of each embedding as encoded."""
        return {name: encoded_width(size, codec) for name, (size, codec) in self.embeddings.items()}


class Manifest(_Strict):
    """snapshot.json."""

    format: Literal[1] = FORMAT
    snapshot_id: Annotated[str, Field(pattern=SNAPSHOT_ID_PATTERN)]
    fm: Name
    created_at: AwareDatetime
    trained_through: AwareDatetime
    max_batch: Annotated[int, Field(ge=1, le=1_000_000)]
    inputs: Annotated[tuple[Input, ...], Field(min_length=1)]
    outputs: Outputs
    files: dict[FileName, Sha256]

    @field_validator("created_at", "trained_through")
    @classmethod
    def _year_fits_microseconds(cls, value: datetime) -> datetime:
        if not 1 <= value.year <= 9999:
            raise ValueError("the year is outside 1..9999")
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        tensors = [i.tensor for i in self.inputs]
        tensors += [i.encode.mask for i in self.inputs if not isinstance(i.encode, FloatEncode) and i.encode.mask]
        if len(set(tensors)) != len(tensors):
            raise ValueError("inputs: two inputs or masks have the same tensor name")
        wanted = {i.encode.file for i in self.inputs if isinstance(i.encode, VocabularyEncode)} | {MODEL_FILE}
        missing = sorted(wanted - set(self.files))
        if missing:
            raise ValueError(f"files: {', '.join(missing)} is used and not listed with its sha256")
        return self


def scored_schema(outputs: OutputColumns) -> pa.Schema:
    """Give the Arrow schema of a scored chunk in the log.

    Columns: example_id, example_digest, event_time, `{task}__logit` float32 each, embeddings (encoded, fixed width).
    Snapshot and times are one per chunk and travel beside it.
    """
    head = [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("example_digest", DIGEST, nullable=False),
        pa.field("event_time", TIMESTAMP, nullable=False),
    ]
    logits = [pa.field(f"{task}__logit", pa.float32(), nullable=False) for task in outputs.tasks]
    vectors = [pa.field(name, pa.binary(width), nullable=False) for name, width in outputs.widths().items()]
    return pa.schema(head + logits + vectors)
