"""What the service never saw works: names, alphabets, kinds and models of no other test, over all real processes.

Every expected number is computed here, with Python and xxhash, from what docs/contract.md says; tables are read with
deltalake and pyarrow.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from deltalake import DeltaTable
from torch import nn

from das_service.client import Client
from das_service.snapshot_folder import manifest_sha256
from das_service.up.supervisor import RunningService, running_service
from fm_inference import export_snapshot
from tests.roles import wait_for

DATASET = "wetter_2"
SPEC: dict[str, Any] = {
    "entity_key": ["ort", "sensor"],
    "features": [
        {"name": "bild", "type": "vector", "size": 5},
        {"name": "ort", "type": "category", "value_type": "string"},
        {"name": "druck", "type": "float", "nullable": True},
        {"name": "woerter", "type": "category_list", "value_type": "string", "max_length": 6},
        {"name": "sensor", "type": "category", "value_type": "int64", "nullable": True},
        {"name": "temperatur", "type": "float"},
        {"name": "codes", "type": "category_list", "value_type": "int64", "max_length": 3, "nullable": True},
        {"name": "leer", "type": "category", "value_type": "string", "nullable": True},
        {"name": "ton", "type": "vector", "size": 3, "nullable": True},
        {"name": "nichts", "type": "float", "nullable": True},
    ],
    "tasks": [{"name": name, "label_window_seconds": 60} for name in ("regen", "sturm", "nebel")],
    "partitions": 3,
    "table_granularity": "week",
}
TRAINED_THROUGH = datetime(2026, 1, 1, tzinfo=UTC)
START = datetime(2026, 3, 1, 23, 59, 59, 999_000, tzinfo=UTC)  # a Sunday
PLACES = (
    "", " ", "Zürich", "東京", "🌧️👨‍👩‍👧‍👦", "مدينة القدس", "עיר דוד", "Ελλάδα", "नमस्ते",
    "e\u0301\u0323", "\u00e9", "a\u200db", "\U0001f9ca" * 50,
)  # fmt: skip
IDS = (
    "é" * 128,
    "🎈" * 64,
    "x" * 253 + "漢",
    "a",
    "مرحبا",
    "e\u0301",
    "\u00e9",
    " spaced ",
    "quote\"'\\",
    "{0}:=",
    "0",
)
NUM_ROWS = 90
BUCKETS, WORD_BUCKETS, CODE_BUCKETS, PAD_WORDS, PAD_CODES = 5000, 700, 300, 4, 3
NULL_FLOAT, NULL_TON = -2.5, 0.25
Row = dict[str, Any]


class Alpha(nn.Module):
    """Three tasks and two embeddings, of floats and categories."""

    def forward(self, zahlen: torch.Tensor, orte: torch.Tensor) -> dict[str, torch.Tensor]:
        warm, press, none = zahlen[:, 0], zahlen[:, 1], zahlen[:, 2]
        place, sensor, empty = (orte[:, i] for i in range(3))
        size = warm / 4 + 1
        return {
            "r": warm / 2 + press + none,
            "s": ((place % 64).float() / 8)[:, None],
            "n": (sensor % 32).float() / 4 - empty.float(),
            "lage": torch.stack([size, -size / 2, torch.zeros_like(size), size / 8], dim=1),
            "kurz": torch.stack([(place % 15 - 7).float(), (sensor % 15 - 7).float(), 0 * size], dim=1) / 8,
        }


class Beta(nn.Module):
    """One task and two embeddings, of ragged lists and vectors."""

    def forward(
        self, w: torch.Tensor, w_mask: torch.Tensor, c: torch.Tensor, c_mask: torch.Tensor, signale: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        words, codes = (w % 31 * w_mask).sum(dim=1), (c % 17 * c_mask).sum(dim=1)
        total = signale.sum(dim=1)
        return {
            "regen": words.float() / 32 + codes.float() / 2 + total,
            "bedeutung": torch.stack([total, words.float()], dim=1),
            "form": torch.stack([w_mask.sum(dim=1), c_mask.sum(dim=1)], dim=1).float(),
        }


ALPHA: dict[str, Any] = {
    "fm": "alpha",
    "snapshot_id": "Alpha-2026.01",
    "max_batch": 16,
    "inputs": [
        {
            "tensor": "zahlen",
            "features": ["temperatur", "druck", "nichts"],
            "encode": {"kind": "float", "null": NULL_FLOAT},
        },
        {"tensor": "orte", "features": ["ort", "sensor", "leer"], "encode": {"kind": "hash", "buckets": BUCKETS}},
    ],
    "outputs": {
        "logits": {"sturm": "s", "regen": "r", "nebel": "n"},
        "embeddings": {
            "lage": {"tensor": "lage", "size": 4, "codec": "int8"},
            "kurz": {"tensor": "kurz", "size": 3, "codec": "int4"},
        },
    },
}
BETA: dict[str, Any] = {
    "fm": "beta",
    "snapshot_id": "b",
    "inputs": [
        {
            "tensor": "w",
            "features": ["woerter"],
            "encode": {"kind": "hash", "buckets": WORD_BUCKETS, "pad_to": PAD_WORDS, "mask": "w_mask"},
        },
        {
            "tensor": "c",
            "features": ["codes"],
            "encode": {"kind": "hash", "buckets": CODE_BUCKETS, "pad_to": PAD_CODES, "mask": "c_mask"},
        },
        {"tensor": "signale", "features": ["bild", "ton"], "encode": {"kind": "float", "null": NULL_TON}},
    ],
    "outputs": {
        "logits": {"regen": "regen"},
        "embeddings": {
            "bedeutung": {"tensor": "bedeutung", "size": 2, "codec": "float32"},
            "form": {"tensor": "form", "size": 2, "codec": "float16"},
        },
    },
}


def row(i: int) -> Row:
    """The i-th example, in Python values."""
    words = [PLACES[(i + k) % len(PLACES)] for k in range(i % 7)]
    return {
        "example_id": IDS[i] if i < len(IDS) else f"{i:04d}-{PLACES[i % len(PLACES)][:3]}",
        "event_time": START + timedelta(milliseconds=i * 1_000_003),
        "bild": [i / 8 + k for k in range(5)],
        "ort": PLACES[i % len(PLACES)],
        "druck": None if i % 3 == 0 else i / 16,
        "woerter": words,
        "sensor": None if i % 5 == 0 else (-1) ** i * (2**62 + i),
        "temperatur": i / 4,
        "codes": None if i % 4 == 0 else [i - 40, -(2**63)][: i % 3],
        "leer": None,
        "ton": None if i % 2 else [0.5, -0.5, i / 2],
        "nichts": None,
    }


ROWS = [row(i) for i in range(NUM_ROWS)]


def bucket(feature: str, value: str | int | None, buckets: int) -> int:
    """Contract 6: xxh64 of the UTF-8 or of 8 little-endian bytes, seeded with xxh64 of the feature's name."""
    if value is None:
        return 0
    data = value.encode() if isinstance(value, str) else value.to_bytes(8, "little", signed=True)
    return xxhash.xxh64_intdigest(data, xxhash.xxh64_intdigest(feature.encode())) % buckets


def alpha_answers(each: Row) -> dict[str, Any]:
    place, sensor = bucket("ort", each["ort"], BUCKETS), bucket("sensor", each["sensor"], BUCKETS)
    size = each["temperatur"] / 4 + 1
    return {
        "regen__logit": each["temperatur"] / 2 + (NULL_FLOAT if each["druck"] is None else each["druck"]) + NULL_FLOAT,
        "sturm__logit": place % 64 / 8,
        "nebel__logit": sensor % 32 / 4,
        "lage": [size, -size / 2, 0.0, size / 8],
        "kurz": [(place % 15 - 7) / 8, (sensor % 15 - 7) / 8, 0.0],
    }


def beta_answers(each: Row) -> dict[str, Any]:
    words = [bucket("woerter", word, WORD_BUCKETS) % 31 for word in each["woerter"][:PAD_WORDS]]
    codes = [bucket("codes", code, CODE_BUCKETS) % 17 for code in (each["codes"] or [])[:PAD_CODES]]
    total = sum(each["bild"]) + sum([NULL_TON] * 3 if each["ton"] is None else each["ton"])
    return {
        "regen__logit": sum(words) / 32 + sum(codes) / 2 + total,
        "bedeutung": [total, float(sum(words))],
        "form": [float(len(words)), float(len(codes))],
    }


def decoded(packed: bytes, codec: str, size: int) -> list[float]:
    """An embedding as schemas/codecs.py documents it."""
    if codec == "float32":
        return np.frombuffer(packed, "<f4").tolist()
    if codec == "float16":
        return np.frombuffer(packed, "<f2").tolist()
    if codec == "int8":
        (scale,) = np.frombuffer(packed[:4], "<f4")
        return (np.frombuffer(packed[4:], np.int8) * scale).tolist()
    nibbles = [nibble for byte in packed for nibble in (byte & 15, byte >> 4)]
    return [(nibble - 8) / 8 for nibble in nibbles[:size]]


def arrow(examples: list[Row]) -> pa.Table:
    """Rows in Arrow types that differ from the stored ones wherever the contract lets them."""
    columns = {name: [each[name] for each in examples] for name in examples[0]}
    types = {
        "event_time": pa.timestamp("ms", "Asia/Kathmandu"), "bild": pa.list_(pa.float32(), 5), "druck": pa.float32(),
        "woerter": pa.list_(pa.string()), "codes": pa.list_(pa.int64()), "ton": pa.list_(pa.float32(), 3),
        "sensor": pa.int64(), "leer": pa.string(), "nichts": pa.float64(),
    }  # fmt: skip
    table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
    place = table.schema.get_field_index("ort")
    table = table.set_column(place, "ort", table["ort"].dictionary_encode())
    return table.select(table.column_names[::-1])


def plain(each: Row) -> Row:
    """A row as JSON has it; optional columns that are null are left out."""
    kept = {name: value for name, value in each.items() if value is not None or name == "codes"}
    return {**kept, "event_time": each["event_time"].astimezone().isoformat()}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """All roles with the dataset, both FMs at work, and every row scored and committed."""
    folder = tmp_path_factory.mktemp("unseen")
    with (
        running_service(folder=folder, env_overrides={"DAS_COMMIT_SECONDS": "0.3"}) as running,
        Client(running.url) as client,
    ):
        client.put_dataset(DATASET, SPEC)
        for module, signature in ((Alpha(), ALPHA), (Beta(), BETA)):
            publish(client, running, module, signature)
        half = NUM_ROWS // 2
        assert client.ingest(DATASET, arrow(ROWS[:half])).accepted == half
        body = {"examples": [plain(each) for each in ROWS[half:]]}
        answer = httpx.post(f"{running.url}/v1/datasets/{DATASET}/examples", json=body, timeout=30)
        assert (answer.status_code, answer.json()["accepted"]) == (202, NUM_ROWS - half), answer.text
        wait_for(lambda: is_worked_off(client))
        yield running


def publish(client: Client, running: RunningService, module: nn.Module, signature: dict[str, Any]) -> None:
    fm, snapshot_id = signature["fm"], signature["snapshot_id"]
    client.put_fm(DATASET, fm)
    folder = Path(running.folder.snapshots) / DATASET / fm / snapshot_id
    given = {**signature, "dataset": client_spec(client)}
    export_snapshot(module, given, folder, trained_through=TRAINED_THROUGH)
    client.register_snapshot(
        DATASET, fm, snapshot_id=snapshot_id, uri=folder.as_uri(), sha256=manifest_sha256(folder)
    )  # fmt: skip
    client.wait_for_snapshot(DATASET, fm, snapshot_id)
    client.activate_snapshot(DATASET, fm, snapshot_id)


def client_spec(client: Client) -> dict[str, Any]:
    known = client.get_dataset(DATASET)
    return {name: known[name] for name in SPEC}


def is_worked_off(client: Client) -> bool:
    found = client.status()["datasets"][DATASET]
    done = found["in_log"] == 0 and found["distinct"] == NUM_ROWS
    return bool(done and all(found["fms"][fm]["scored"] == NUM_ROWS for fm in ("alpha", "beta")))


def compare(given: list[Row], expected: list[dict[str, Any]], signature: dict[str, Any], prefix: str = "") -> None:
    """Compare encoded outputs by row: logits exactly, embeddings within their codec."""
    embeddings = signature["outputs"]["embeddings"]
    for each, answers in zip(given, expected, strict=True):
        for task in signature["outputs"]["logits"]:
            assert each[f"{prefix}{task}__logit"] == answers[f"{task}__logit"]
        for name, embedding in embeddings.items():
            values = decoded(each[f"{prefix}{name}"], embedding["codec"], embedding["size"])
            half_step = max(map(abs, answers[name])) / 254 if embedding["codec"] == "int8" else 0.0
            np.testing.assert_allclose(values, answers[name], rtol=0, atol=1.0001 * half_step)


FMS = [(ALPHA, alpha_answers), (BETA, beta_answers)]


@pytest.mark.parametrize(("signature", "answers"), FMS, ids=["alpha", "beta"])
def test_a_lookup_gives_the_answers_computed_by_hand(service: RunningService, signature: Any, answers: Any) -> None:
    order = np.random.default_rng(3).permutation(NUM_ROWS).tolist()
    asked = [ROWS[i] for i in [*order, order[0]]]
    fm = signature["fm"]
    with Client(service.url) as client:
        found = client.lookup(DATASET, [each["example_id"] for each in asked], fms=[fm], embedding_format="encoded")
    rows = found.to_pylist()
    assert [each["example_id"] for each in rows] == [each["example_id"] for each in asked]
    facts = {(r[f"{fm}__status"], r[f"{fm}__snapshot_id"], r[f"{fm}__trained_through"]) for r in rows}
    assert facts == {("present", signature["snapshot_id"], TRAINED_THROUGH)}
    compare(rows, [answers(each) for each in asked], signature, prefix=f"{fm}__")


def test_a_lookup_of_both_fms_in_json_gives_the_answers_computed_by_hand(service: RunningService) -> None:
    body = {
        "fms": ["beta", "alpha"],
        "example_ids": [each["example_id"] for each in ROWS],
        "embedding_format": "float32",
    }
    answer = httpx.post(f"{service.url}/v1/datasets/{DATASET}/supervision/lookup", json=body, timeout=30)
    for given, each in zip(answer.json()["rows"], ROWS, strict=True):
        assert given["example_id"] == each["example_id"]
        assert given["beta__regen__logit"] == beta_answers(each)["regen__logit"]
        assert given["beta__form"] == beta_answers(each)["form"]
        assert given["alpha__kurz"] == alpha_answers(each)["kurz"]
        assert given["alpha__nebel__logit"] == alpha_answers(each)["nebel__logit"]


def table(service: RunningService, name: str) -> list[Row]:
    """A table's rows in the order of ROWS."""
    place = {each["example_id"]: i for i, each in enumerate(ROWS)}
    rows = DeltaTable(service.folder.tables / DATASET / name).to_pyarrow_table().to_pylist()
    return sorted(rows, key=lambda each: place[each["example_id"]])


@pytest.mark.parametrize(("signature", "answers"), FMS, ids=["alpha", "beta"])
def test_the_supervision_table_holds_the_answers_computed_by_hand(
    service: RunningService, signature: Any, answers: Any
) -> None:
    rows = table(service, f"supervision/{signature['fm']}")
    facts = [(each["example_id"], each["event_time"], each["snapshot_id"], each["trained_through"]) for each in rows]
    assert facts == [(e["example_id"], e["event_time"], signature["snapshot_id"], TRAINED_THROUGH) for e in ROWS]
    compare(rows, [answers(each) for each in ROWS], signature)


def test_the_examples_table_holds_what_was_posted(service: RunningService) -> None:
    rows = table(service, "examples")
    names = ["example_id", "event_time", *[feature["name"] for feature in SPEC["features"]]]
    packed = {
        name: lambda values: None if values is None else np.array(values, "<f4").tobytes() for name in ("bild", "ton")
    }
    assert [{name: each[name] for name in names} for each in rows] == [
        {name: packed.get(name, lambda value: value)(each[name]) for name in names} for each in ROWS
    ]
    monday = [each["event_time"].date() - timedelta(days=each["event_time"].weekday()) for each in ROWS]
    assert [each["event_day"] for each in rows] == monday
    assert len(set(monday)) > 1


def test_no_row_became_a_dead_letter(service: RunningService) -> None:
    with Client(service.url) as client:
        found = client.status()["datasets"][DATASET]["fms"]
        assert {fm: (found[fm]["failed"], client.dead_letters(DATASET, fm)) for fm in found} == {
            "alpha": (0, []), "beta": (0, []),
        }  # fmt: skip


def test_an_id_of_more_than_256_bytes_is_refused_by_row(service: RunningService) -> None:
    examples = [plain({**ROWS[0], "example_id": text}) for text in ("é" * 128 + "x", "🎈" * 65)]
    answer = httpx.post(f"{service.url}/v1/datasets/{DATASET}/examples", json={"examples": examples}, timeout=30)
    assert (answer.status_code, [error["row"] for error in answer.json()["errors"]]) == (422, [0, 1])
