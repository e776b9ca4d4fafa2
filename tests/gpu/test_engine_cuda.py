"""The engine on a CUDA device says what it says on a CPU."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from fm_inference.engine import TorchEngine, load_engine
from fm_inference.outputs import ModelOutputError
from fm_inference.synthetic import synthetic_rows
from schemas.codecs import CODECS, Codec
from schemas.dataset import DatasetSpec
from tests.fakes import expected_supervision, export_closed_form

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EMBEDDINGS: dict[str, tuple[int, Codec]] = {f"e_{codec}": (5, codec) for codec in CODECS}
SPEC = DatasetSpec.model_validate(
    {
        "features": [
            {"name": "price", "type": "float", "nullable": True},
            {"name": "user_id", "type": "category", "value_type": "string"},
            {"name": "tags", "type": "category_list", "value_type": "int64", "max_length": 12},
            {"name": "image", "type": "vector", "size": 3},
        ],
        "tasks": [{"name": "click", "label_window_seconds": 1}],
    }
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    folder = tmp_path_factory.mktemp("cuda") / "s1"
    manifest = export_closed_form(folder, SPEC, embeddings=EMBEDDINGS, max_batch=64, poison="nan")
    return load_engine(folder, manifest, device="cuda")


@pytest.mark.parametrize("num_rows", [0, 1, 2, 64, 65, 1000])
def test_a_program_exported_on_a_cpu_says_the_same_on_cuda(engine: TorchEngine, num_rows: int) -> None:
    rows = synthetic_rows(SPEC, num_rows)
    scored = engine.score(rows)
    logits, embeddings = expected_supervision(rows, SPEC, embeddings=EMBEDDINGS)
    assert {name: values.tolist() for name, values in (scored.logits | scored.embeddings).items()} == {
        name: values.tolist() for name, values in (logits | embeddings).items()
    }


def test_tensors_are_prepared_in_pinned_memory(engine: TorchEngine) -> None:
    prepared = engine.prepare(synthetic_rows(SPEC, 8))
    assert all(tensor.is_pinned() for tensor in prepared.tensors.values())


def test_the_next_chunk_may_be_prepared_and_sent_before_the_first_is_finished(engine: TorchEngine) -> None:
    first, second = synthetic_rows(SPEC, 100, seed=1), synthetic_rows(SPEC, 100, seed=2)
    outputs = [engine.forward(engine.prepare(rows)) for rows in (first, second)]
    for rows, given in zip((first, second), outputs, strict=True):
        logits, _ = expected_supervision(rows, SPEC, embeddings=EMBEDDINGS)
        assert np.array_equal(engine.finish(given).logits["click"], logits["click"])


def test_rows_that_are_not_finite_are_named(engine: TorchEngine) -> None:
    rows = synthetic_rows(SPEC, 3).set_column(0, "price", pa.array([1.0, 2e6, 3.0]))
    with pytest.raises(ModelOutputError) as caught:
        engine.score(rows)
    assert caught.value.rows == (1,)


def test_a_folder_is_valid_on_cuda_as_it_is_on_a_cpu(tmp_path: Path) -> None:
    from das_service.snapshot_folder import manifest_sha256
    from fm_inference.validate import validate_snapshot

    export_closed_form(tmp_path / "s1", SPEC, golden=synthetic_rows(SPEC, 20))
    sha256 = manifest_sha256(tmp_path / "s1")
    assert validate_snapshot(tmp_path / "s1", SPEC, fm="closed", snapshot_id="s1", sha256=sha256, device="cuda") == []
