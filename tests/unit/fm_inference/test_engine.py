"""The engine says what the closed form says, whatever the batch, and names what is not a number."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from das_service.snapshot_folder import SnapshotError, read_manifest
from fm_inference.engine import Scored, TorchEngine, choose_device, load_engine
from fm_inference.features import FeatureError
from fm_inference.outputs import ModelOutputError
from fm_inference.synthetic import synthetic_rows
from schemas.codecs import CODECS, Codec, encode
from schemas.dataset import DatasetSpec
from schemas.snapshot import MODEL_FILE
from tests.fakes import Poison, expected_supervision, export_closed_form

EMBEDDINGS: dict[str, tuple[int, Codec]] = {f"e_{codec}": (5, codec) for codec in CODECS}
FLOATS = st.floats(-(2.0**30), 2.0**30, width=32)
PRICES = {"name": "price", "type": "float"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, spec: DatasetSpec) -> TorchEngine:
    folder = tmp_path_factory.mktemp("engine") / "s1"
    manifest = export_closed_form(folder, spec, embeddings=EMBEDDINGS, shift=0.25, max_batch=50)
    return load_engine(folder, manifest, device="cpu")


@pytest.fixture(scope="module")
def rows(spec: DatasetSpec) -> pa.Table:
    return synthetic_rows(spec, 170, seed=1)


def as_lists(scored: Scored) -> dict[str, object]:
    return {name: values.tolist() for name, values in (scored.logits | scored.embeddings).items()}


def poisoned(folder: Path, poison: Poison) -> TorchEngine:
    spec = DatasetSpec.model_validate({"features": [PRICES], "tasks": [{"name": "click", "label_window_seconds": 1}]})
    return load_engine(folder, export_closed_form(folder, spec, poison=poison, poison_above=100.0), device="cpu")


def test_scores_are_those_of_the_closed_form(engine: TorchEngine, rows: pa.Table, spec: DatasetSpec) -> None:
    logits, embeddings = expected_supervision(rows, spec, embeddings=EMBEDDINGS, shift=0.25)
    assert as_lists(engine.score(rows)) == {name: values.tolist() for name, values in (logits | embeddings).items()}


@given(data=st.data())
def test_any_batching_gives_the_same_scores(data: st.DataObject, engine: TorchEngine, rows: pa.Table) -> None:
    whole = as_lists(engine.score(rows))
    start = data.draw(st.integers(0, rows.num_rows))
    size = data.draw(st.integers(0, rows.num_rows - start))
    part = as_lists(engine.score(rows.slice(start, size)))
    assert part == {name: values[start : start + size] for name, values in whole.items()}


def test_dtypes_and_widths(engine: TorchEngine, rows: pa.Table) -> None:
    scored = engine.score(rows.slice(0, 1).to_batches()[0])
    assert {name: (values.shape, values.dtype) for name, values in (scored.logits | scored.embeddings).items()} == {
        "click": ((1,), np.float32),
        "buy": ((1,), np.float32),
        "e_float32": ((1, 20), np.uint8),
        "e_float16": ((1, 10), np.uint8),
        "e_int8": ((1, 9), np.uint8),
        "e_int4": ((1, 3), np.uint8),
    }


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda x: x,
    "by column": lambda x: torch.stack(list(x.t())).t(),  # one column is "contiguous" with a last stride of 3
    "a part": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "repeated": lambda x: x[:1].expand(3, -1),
    "no rows": lambda x: x[:0],
}


@given(
    values=hnp.arrays(np.float32, st.tuples(st.just(3), st.sampled_from([1, 5])), elements=FLOATS),
    codec=st.sampled_from(CODECS),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_a_device_packs_as_the_codec_does(
    values: NDArray[np.float32], codec: Codec, layout: str, engine: TorchEngine
) -> None:
    vectors_BD = LAYOUTS[layout](torch.from_numpy(values))
    packed = engine._packed(f"e_{codec}", vectors_BD).numpy()
    assert np.array_equal(engine._encoded(f"e_{codec}", packed), encode(vectors_BD.numpy(), codec))


def test_no_rows_give_no_scores_and_do_not_reach_the_model(tmp_path: Path) -> None:
    engine = poisoned(tmp_path / "s", "raise")
    scored = engine.score(pa.table({"price": pa.array([], pa.float64())}))
    assert {name: values.shape for name, values in (scored.logits | scored.embeddings).items()} == {
        "click": (0,),
        "hidden": (0, 16),
    }


def test_rows_that_are_not_finite_are_named(tmp_path: Path) -> None:
    engine = poisoned(tmp_path / "s", "nan")
    with pytest.raises(ModelOutputError, match="logit 'click' is not finite in 2 of 4 rows: 1, 3") as caught:
        engine.score(pa.table({"price": [1.0, 101.0, 2.0, 1e300]}))
    assert caught.value.rows == (1, 3)


def test_what_the_model_raises_reaches_the_caller(tmp_path: Path) -> None:
    engine = poisoned(tmp_path / "s", "raise")
    with pytest.raises(IndexError, match="index out of range"):
        engine.score(pa.table({"price": [1.0, 101.0]}))
    assert engine.score(pa.table({"price": [1.0]})).logits["click"].tolist() == [0.125]


def test_columns_that_do_not_fit_are_refused(engine: TorchEngine) -> None:
    with pytest.raises(FeatureError, match="price: there is no such column"):
        engine.prepare(pa.table({"x": [1.0]}))


def test_bf16_is_close(closed_form_folder: Path, rows: pa.Table, spec: DatasetSpec) -> None:
    engine = load_engine(closed_form_folder, read_manifest(closed_form_folder), device="cpu", bf16=True)
    logits, _ = expected_supervision(rows, spec)
    assert np.allclose(engine.score(rows).logits["click"], logits["click"], rtol=1e-2)


def test_a_model_with_other_tensors_than_its_manifest_is_not_loaded(closed_form_folder: Path) -> None:
    manifest = read_manifest(closed_form_folder)
    inputs = (manifest.inputs[0].model_copy(update={"tensor": "other"}), *manifest.inputs[1:])
    with pytest.raises(SnapshotError, match=r"the model takes .*dense.* and the manifest gives .*other"):
        load_engine(closed_form_folder, manifest.model_copy(update={"inputs": inputs}), device="cpu")


def test_a_model_with_other_outputs_than_its_manifest_is_not_loaded(closed_form_folder: Path) -> None:
    manifest = read_manifest(closed_form_folder)
    outputs = manifest.outputs.model_copy(update={"logits": {"click": "nowhere"}})
    with pytest.raises(SnapshotError, match="logit 'click': the model returns no tensor 'nowhere'"):
        load_engine(closed_form_folder, manifest.model_copy(update={"outputs": outputs}), device="cpu")


def test_a_model_that_takes_fewer_rows_than_its_manifest_says_is_not_loaded(closed_form_folder: Path) -> None:
    manifest = read_manifest(closed_form_folder).model_copy(update={"max_batch": 5000})
    with pytest.raises(SnapshotError, match="max_batch is 5000 and the model takes at most 4096 rows"):
        load_engine(closed_form_folder, manifest, device="cpu")


def test_a_broken_archive_is_not_loaded(closed_form_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(closed_form_folder, folder)
    (folder / MODEL_FILE).write_bytes(b"PK")
    with pytest.raises(SnapshotError, match=r"model.pt2: it cannot be read as a PT2 archive"):
        load_engine(folder, read_manifest(folder), device="cpu")


def test_loading_leaves_the_environment_as_it_was(closed_form_folder: Path) -> None:
    before = dict(os.environ)
    load_engine(closed_form_folder, read_manifest(closed_form_folder), device="cpu")
    assert dict(os.environ) == before


def test_a_named_device_is_taken_and_auto_finds_one() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda")
