"""Bytes and schemas that another version of the service reads: they do not change unseen."""

import json

import pyarrow as pa
import pytest

from schemas.dataset import DatasetSpec, example_schema
from schemas.entries import fingerprint, parse_entry
from tests.contract.write_golden import GOLDEN, build_entry, build_schemas
from tests.served import SPEC


def test_the_arrow_schemas_are_the_golden_ones() -> None:
    assert build_schemas() == json.loads((GOLDEN / "schemas.json").read_text())


def test_the_bytes_of_a_log_entry_are_the_golden_ones() -> None:
    assert build_entry() == json.loads((GOLDEN / "entry.json").read_text())


def test_the_golden_entry_is_read_by_this_version() -> None:
    golden = json.loads((GOLDEN / "entry.json").read_text())
    fields = {name.encode(): value.encode() for name, value in golden.items() if len(name) == 1 and name != "d"}
    fields |= {b"t": b"1", b"r": golden["n"].encode(), b"b": b"1", b"d": bytes.fromhex(golden["d"])}
    schema = example_schema(DatasetSpec.model_validate(SPEC))

    entry = parse_entry(b"1-0", fields)

    assert entry.fingerprint == fingerprint(schema)
    assert set(entry.batch(schema).column("example_id").to_pylist()) <= {"e0", "e1", "e2"}


@pytest.mark.parametrize("name", ["openapi", "schemas", "entry"])
def test_golden_files_are_json_with_sorted_keys(name: str) -> None:
    text = (GOLDEN / f"{name}.json").read_text()
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"


def test_dictionaries_of_statuses_stay_small() -> None:
    kinds = {row[0]: row[1] for row in build_schemas()["lookup encoded"]}
    assert kinds["teacher__status"] == str(pa.dictionary(pa.int8(), pa.string()))
