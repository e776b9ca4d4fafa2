"""Rows become tensors: values, masks, hashes and what stands for a null, compared as whole tensors."""

import pickle
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import default_convert

from fm_inference.features import build_tensors
from schemas.codecs import encode
from schemas.dataset import TIMESTAMP
from schemas.hashing import feature_seed, hash_values
from schemas.snapshot import HashEncode, Input
from vm_training.layout import FmLayout, Layout, read_layout
from vm_training.tensors import Batch, build_batch

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
STATUSES = pa.array(["missing", "present", "leaky"])
HIDDEN = np.array([[1.0, -2.0], [0.0, 0.0], [0.5, 0.25]], np.float32)


def encoded(values: Any, present: list[bool]) -> pa.Array:
    rows = [row.tobytes() if is_there else None for row, is_there in zip(values, present, strict=True)]
    return pa.array(rows, pa.binary(values.shape[1]))


def columns() -> dict[str, tuple[pa.Field, pa.Array]]:
    """Three rows as the service gives them; the second has nulls wherever there may be some."""
    present = [True, False, True]
    made = {
        "example_id": pa.array(["a", "b", "c"]),
        "event_time": pa.array([NOON] * 3, TIMESTAMP),
        "price": pa.array([1.5, None, -3.0], pa.float64()),
        "user_id": pa.array(["u1", None, "u2"]),
        "item": pa.array([7, None, -1], pa.int64()),
        "tags": pa.array([["x", None], None, []], pa.list_(pa.string())),
        "image": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2)),
        "click": pa.array([1.0, None, 0.0], pa.float32()),
        "is_late": pa.array([False, True, False]),
        "closed_at": pa.array([NOON] * 3, TIMESTAMP),
        "f__status": pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], pa.int8()), STATUSES),
        "f__snapshot_id": pa.array(["s1", None, "s1"]).dictionary_encode(),
        "f__trained_through": pa.array([NOON, None, NOON], TIMESTAMP),
        "f__scored_at": pa.array([NOON, None, NOON], TIMESTAMP),
        "f__click__logit": pa.array([0.25, None, -4.0], pa.float32()),
        "f__hidden": encoded(encode(HIDDEN, "int4"), present),
    }
    notes = {"f__hidden": {"codec": "int4", "size": "2"}}
    return {name: (pa.field(name, array.type, metadata=notes.get(name)), array) for name, array in made.items()}


def rows(*names: str) -> pa.RecordBatch:
    """The named columns, or all."""
    chosen = [both for name, both in columns().items() if not names or name in names]
    return pa.RecordBatch.from_arrays([a for _, a in chosen], schema=pa.schema([f for f, _ in chosen]))


def built(batch: pa.RecordBatch | None = None, **options: Any) -> Batch:
    given = rows() if batch is None else batch
    return build_batch(given, read_layout(given.schema), **options)


def test_the_schema_says_which_column_is_what() -> None:
    assert read_layout(rows().schema) == Layout(
        dense=("price",),
        categories=("user_id", "item"),
        lists=("tags",),
        vectors={"image": 2},
        tasks=("click",),
        fms={"f": FmLayout(("click",), {"hidden": (2, "int4")})},
        of_service=("is_late", "closed_at"),
    )


def test_floats_and_labels_have_zeros_and_a_mask_where_they_are_null() -> None:
    batch = built()
    assert batch.dense_BF.tolist() == [[1.5], [0.0], [-3.0]]
    assert batch.dense_present_BF.tolist() == [[True], [False], [True]]
    assert batch.labels["click"].tolist() == [1.0, 0.0, 0.0]
    assert batch.labeled["click"].tolist() == [True, False, True]
    assert (batch.dense_BF.dtype, batch.labels["click"].dtype) == (torch.float32, torch.float32)


def test_categories_without_buckets_are_integers_and_hashes() -> None:
    batch = built()
    hashes = hash_values(pa.array(["u1", "u2"]), feature_seed("user_id")).view(np.int64).tolist()
    assert batch.categories_BC.tolist() == [[hashes[0], 7], [0, 0], [hashes[1], -1]]
    assert batch.categories_present_BC.tolist() == [[True, True], [False, False], [True, True]]


def test_buckets_are_those_that_an_fm_sees() -> None:
    inputs = [Input(tensor="cat", features=("user_id", "item"), encode=HashEncode(kind="hash", buckets=97))]
    expected = build_tensors(rows(), inputs)["cat"]
    assert built(buckets=97).categories_BC.tolist() == expected.tolist()
    mixed = built(buckets={"user_id": 97}).categories_BC
    assert mixed.tolist() == [[int(expected[0, 0]), 7], [0, 0], [int(expected[2, 0]), -1]]


def test_lists_are_values_and_offsets() -> None:
    batch = built(buckets=10).lists["tags"]
    (place,) = (hash_values(pa.array(["x"]), feature_seed("tags")) % 10).tolist()
    assert batch.values_N.tolist() == [place, 0]
    assert batch.offsets.tolist() == [0, 2, 2, 2]
    assert batch.present_B.tolist() == [True, False, True]


def test_a_null_list_that_has_elements_is_empty() -> None:
    values, offsets = pa.array([1, 2, 3], pa.int64()), pa.array([0, 1, 2, 3], pa.int32())
    tags = pa.ListArray.from_arrays(offsets, values, mask=pa.array([False, True, False]))
    batch = built(
        pa.RecordBatch.from_arrays([rows().column("event_time"), rows().column("example_id"), tags],
                                   ["event_time", "example_id", "tags"])
    )  # fmt: skip
    assert batch.lists["tags"].values_N.tolist() == [1, 3]
    assert batch.lists["tags"].offsets.tolist() == [0, 1, 1, 2]


def test_vectors_are_rows_of_numbers() -> None:
    image = built().vectors["image"]
    assert image.values_BD.tolist() == [[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]
    assert image.present_B.tolist() == [True, False, True]


def test_supervision_counts_where_its_status_is_present() -> None:
    said = built().fms["f"]
    assert said.present_B.tolist() == [True, False, True]
    assert said.logits["click"].tolist() == [0.25, 0.0, -4.0]
    assert said.packed["hidden"].bytes_BW.shape == (3, 1)
    assert said.embedding("hidden").tolist() == [[0.875, -1.0], [0.0, 0.0], [0.5, 0.25]]


def test_times_are_microseconds_and_ids_are_there_on_demand() -> None:
    noon = int(NOON.timestamp()) * 1_000_000
    batch = built(with_ids=True)
    assert batch.event_time_B.tolist() == [noon] * 3
    assert batch.of_service["is_late"].tolist() == [False, True, False]
    assert batch.of_service["closed_at"].tolist() == [noon] * 3
    assert batch.example_ids.to_pylist() == ["a", "b", "c"]
    assert built().example_ids is None


def test_slices_of_rows_are_tensors_of_the_slice() -> None:
    assert built(rows().slice(2)).dense_BF.tolist() == [[-3.0]]
    assert built(rows().slice(2)).fms["f"].embedding("hidden").tolist() == [[0.5, 0.25]]
    assert built(rows().slice(2)).vectors["image"].values_BD.tolist() == [[3.0, 4.0]]
    assert len(built(rows().slice(0, 0))) == 0


def test_a_batch_moves_pickles_and_passes_a_data_loader_whole() -> None:
    batch = built()
    for other in (batch.to("cpu"), pickle.loads(pickle.dumps(batch)), default_convert(batch)):
        assert torch.equal(other.fms["f"].embedding("hidden"), batch.fms["f"].embedding("hidden"))
        assert torch.equal(other.lists["tags"].values_N, batch.lists["tags"].values_N)
        assert torch.equal(other.categories_BC, batch.categories_BC)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"f__hidden": {}}, "embedding hidden of FM f is not encoded"),
        ({"f__hidden": None, "f__snapshot_id": None, "f__trained_through": None, "f__scored_at": None,
          "f__click__logit": None}, "FM f has no snapshot yet"),
    ],
)  # fmt: skip
def test_a_stream_that_gives_no_tensors_is_refused(changed: dict[str, Any], message: str) -> None:
    fields = [
        field.remove_metadata() if field.name in changed else field
        for field, _ in columns().values() if changed.get(field.name, {}) is not None
    ]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        read_layout(pa.schema(fields))


def test_an_fm_may_be_called_like_the_beginning_of_another() -> None:
    of_f = [field for name, (field, _) in columns().items() if name.startswith("f__")]
    of_g = [field.with_name(f"f__g{field.name[1:]}") for field in of_f]
    layout = read_layout(pa.schema([*of_f, *of_g]))
    assert layout.fms == dict.fromkeys(("f", "f__g"), FmLayout(("click",), {"hidden": (2, "int4")}))
