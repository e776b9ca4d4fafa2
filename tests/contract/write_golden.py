"""Writes the golden files of the contract; run it after a wanted change, and read the diff."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from das_service.app import create_app
from das_service.door.json_body import columns_of_rows
from das_service.door.row_errors import RowErrors
from das_service.door.validation import BodyLimits, check_rows
from das_service.ingest import encode_chunks
from das_service.registry import FmRecord
from das_service.settings import load_settings
from das_service.supervision.answer import Judged, LookupQuery, supervision_columns
from schemas.dataset import DatasetSpec, example_schema
from schemas.snapshot import OutputColumns, scored_schema
from schemas.supervision import online_layout
from schemas.tables import dead_schema
from tests.served import NOON_US, SPEC, examples

GOLDEN = Path(__file__).parent / "golden"
OUTPUTS = OutputColumns(tasks=("click", "buy"), embeddings={"hidden": (4, "float16"), "small": (3, "int8")})


def build_openapi() -> dict[str, Any]:
    """The OpenAPI document, without the version of the package."""
    document = create_app(load_settings({})).openapi()
    document["info"]["version"] = "*"
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return plain


def describe_schema(schema: pa.Schema) -> list[list[Any]]:
    """Name, type, nullability and metadata of every column."""
    return [
        [
            field.name,
            str(field.type),
            field.nullable,
            {k.decode(): v.decode() for k, v in (field.metadata or {}).items()},
        ]
        for field in schema
    ]


def lookup_schema(embedding_format: str) -> pa.Schema:
    """The columns that one FM adds to a lookup's answer."""
    layout = online_layout(OUTPUTS)
    judged = Judged(np.array([2], np.int8), np.zeros(1, layout.record), ("s1",), np.array([0], np.int64))
    record = FmRecord(fm="teacher", required=True, outputs=OUTPUTS)
    query = LookupQuery(fms=("teacher",), embedding_format=embedding_format)  # type: ignore[arg-type]
    return pa.schema([field for field, _ in supervision_columns(judged, record, query)])


def build_schemas() -> dict[str, Any]:
    """Every Arrow schema that leaves a process."""
    return {
        "examples log": describe_schema(example_schema(DatasetSpec.model_validate(SPEC))),
        "scored log": describe_schema(scored_schema(OUTPUTS)),
        "dead-letter log": describe_schema(dead_schema()),
        **{f"lookup {form}": describe_schema(lookup_schema(form)) for form in ("encoded", "float16", "float32")},
    }


def build_entry() -> dict[str, str]:
    """One entry of the examples log, field by field, bytes as hex."""
    spec = DatasetSpec.model_validate(SPEC)
    rows = examples(0, 3, tags=["a"], image=[0, 1, 2, 3], item=7)
    errors = RowErrors(len(rows))
    limits = BodyLimits(max_rows=10, max_decoded_bytes=1_000_000)
    columns = columns_of_rows(rows, spec, budget=limits.budget(), errors=errors)
    batch = check_rows(columns, spec, errors=errors, now_us=NOON_US).batch
    chunk = encode_chunks("ads", spec, batch)[0]
    names = [str(part) for part in chunk.head[0::2]]
    fields = dict(zip(names, [str(part) for part in chunk.head[1::2]], strict=True))
    return {**fields, "partition": str(chunk.partition), "d": chunk.data.hex()}


def write() -> None:
    """Write all golden files."""
    GOLDEN.mkdir(exist_ok=True)
    for name, content in (("openapi", build_openapi()), ("schemas", build_schemas()), ("entry", build_entry())):
        (GOLDEN / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
