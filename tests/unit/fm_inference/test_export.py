"""A module becomes a folder that says and does what the module does, or the team is told why not."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from das_service.snapshot_folder import SnapshotError, check_files, manifest_sha256, read_manifest
from fm_inference import Signature, export_snapshot
from fm_inference.golden import read_golden
from fm_inference.synthetic import synthetic_rows
from schemas.dataset import DatasetSpec
from schemas.snapshot import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE
from tests.fakes import ClosedFormFM, closed_form_signature, expected_supervision, export_closed_form

NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
ROWS = pa.table({"x": [1.0, 2.0, 3.0], "word": ["a", "b", None]})


class Small(nn.Module):
    """Answers that a test can bend: forward is handed in."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.answer = forward
        self.layer = nn.Linear(1, 4)

    def forward(self, dense: torch.Tensor, cat: torch.Tensor) -> Any:
        return self.answer(self, dense, cat)


def good(module: Small, dense: torch.Tensor, cat: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logit": dense[:, 0] + cat[:, 0], "z": module.layer(dense)}


def build_signature(**changes: Any) -> Signature:
    parts: dict[str, Any] = {
        "fm": "small",
        "snapshot_id": "s1",
        "golden": ROWS,
        "max_batch": 64,
        "inputs": [
            {"tensor": "dense", "features": ["x"], "encode": {"kind": "float"}},
            {"tensor": "cat", "features": ["word"], "encode": {"kind": "vocabulary", "file": "words.txt"}},
        ],
        "vocabularies": {"words.txt": ["a", "b"]},
        "outputs": {
            "logits": {"click": "logit"},
            "embeddings": {"hidden": {"tensor": "z", "size": 4, "codec": "float16"}},
        },
    }
    return Signature.model_validate(parts | changes)


def refusal(tmp_path: Path, forward: Callable[..., Any], **changes: Any) -> str:
    with pytest.raises(SnapshotError) as caught:
        export_snapshot(Small(forward), build_signature(**changes), tmp_path / "s", trained_through=NOON)
    assert list(tmp_path.iterdir()) == []
    return "; ".join(caught.value.reasons)


def test_the_folder_holds_what_its_manifest_says(tmp_path: Path) -> None:
    given = export_snapshot(Small(good), build_signature(), tmp_path / "a" / "s1", trained_through=NOON)
    folder = tmp_path / "a" / "s1"
    manifest = read_manifest(folder, sha256=manifest_sha256(folder))
    check_files(folder, manifest)
    assert manifest == given
    assert (manifest.fm, manifest.snapshot_id, manifest.trained_through) == ("small", "s1", NOON)
    assert set(manifest.files) == {MODEL_FILE, GOLDEN_FILE, "words.txt"}
    assert (folder / "words.txt").read_text() == "a\nb\n"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["s1"]


def test_the_manifest_has_the_shape_of_the_contract(tmp_path: Path) -> None:
    export_snapshot(Small(good), build_signature(), tmp_path / "s1", trained_through=NOON)
    written = json.loads((tmp_path / "s1" / MANIFEST_FILE).read_text())
    assert list(written) == [
        "format", "snapshot_id", "fm", "created_at", "trained_through", "max_batch", "inputs", "outputs", "files",
    ]  # fmt: skip
    assert written["inputs"][1] == {
        "tensor": "cat",
        "features": ["word"],
        "encode": {"kind": "vocabulary", "file": "words.txt"},
    }


def test_golden_rows_are_kept_with_the_eager_answers(tmp_path: Path) -> None:
    module = Small(good)
    manifest = export_snapshot(module, build_signature(), tmp_path / "s1", trained_through=NOON)
    rows, answers = read_golden(tmp_path / "s1", manifest.outputs.columns())
    assert rows.equals(ROWS)
    assert answers.logits["click"].tolist() == [2.0, 4.0, 3.0]
    with torch.no_grad():
        expected = module.layer(torch.tensor([[1.0], [2.0], [3.0]])).numpy()
    assert np.array_equal(answers.embeddings["hidden"], expected)


def test_without_golden_rows_the_dataset_is_enough(tmp_path: Path, spec: DatasetSpec) -> None:
    manifest = export_closed_form(tmp_path / "s1", spec)
    assert set(manifest.files) == {MODEL_FILE}


def test_golden_rows_are_only_the_columns_that_inputs_use(tmp_path: Path) -> None:
    golden = ROWS.append_column("example_id", pa.array(["1", "2", "3"]))
    manifest = export_snapshot(Small(good), build_signature(golden=golden), tmp_path / "s1", trained_through=NOON)
    rows, _ = read_golden(tmp_path / "s1", manifest.outputs.columns())
    assert rows.column_names == ["x", "word"]


def test_golden_answers_are_those_of_the_closed_form(tmp_path: Path, spec: DatasetSpec) -> None:
    golden = synthetic_rows(spec, 40)
    manifest = export_closed_form(tmp_path / "s1", spec, golden=golden, max_batch=16)
    rows, answers = read_golden(tmp_path / "s1", manifest.outputs.columns())
    logits, _ = expected_supervision(rows, spec)
    assert {task: values.tolist() for task, values in answers.logits.items()} == {
        task: values.tolist() for task, values in logits.items()
    }


def test_the_module_keeps_the_mode_it_had(tmp_path: Path) -> None:
    module = Small(good).train()
    export_snapshot(module, build_signature(), tmp_path / "s1", trained_through=NOON)
    assert module.training


def test_what_exists_is_never_changed(tmp_path: Path) -> None:
    (tmp_path / "s1").mkdir()
    with pytest.raises(FileExistsError, match="a snapshot never changes"):
        export_snapshot(Small(good), build_signature(), tmp_path / "s1", trained_through=NOON)
    assert list((tmp_path / "s1").iterdir()) == []


def test_a_loader_that_has_delivered_nothing_is_no_bound(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trained_through is None"):
        export_snapshot(Small(good), build_signature(), tmp_path / "s", trained_through=None)


def test_a_time_without_a_zone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trained_through needs a time zone"):
        export_snapshot(Small(good), build_signature(), tmp_path / "s", trained_through=NOON.replace(tzinfo=None))


def test_a_module_that_takes_other_tensors_is_told_which_it_is_given(tmp_path: Path) -> None:
    class Other(nn.Module):
        def forward(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logit": numbers[:, 0]}

    with pytest.raises(
        SnapshotError, match=r"does not take \(dense torch.float32 \(7, 1\), cat torch.int64 \(7, 1\)\)"
    ):
        export_snapshot(Other(), build_signature(), tmp_path / "s", trained_through=NOON)


def test_a_module_may_gather_its_tensors(tmp_path: Path, spec: DatasetSpec) -> None:
    export_snapshot(
        ClosedFormFM(["click", "buy"], {}),
        closed_form_signature(spec, embeddings={}),
        tmp_path / "s",
        trained_through=NOON,
    )
    assert (tmp_path / "s" / MODEL_FILE).exists()


Answer = Callable[[Small, torch.Tensor, torch.Tensor], Any]
BAD_ANSWERS: dict[str, tuple[Answer, str]] = {
    "no_dict": (lambda _m, d, _c: d[:, 0], "the model returns a Tensor, not a dict of tensors"),
    "absent": (lambda _m, d, _c: {"logit": d[:, 0]}, "embedding 'hidden': the model returns no tensor 'z'"),
    "width": (lambda _m, d, _c: {"logit": d[:, 0], "z": d}, "tensor 'z' has shape (7, 1), not (7, 4)"),
    "integer": (lambda m, d, c: {"logit": c[:, 0], "z": m.layer(d)}, "holds torch.int64, not floating-point"),
    "infinite": (lambda m, d, _c: {"logit": d[:, 0] / 0, "z": m.layer(d)}, "is not finite in 7 of 7 rows: 0, 1, 2"),
    "reshape": (lambda m, d, _c: {"logit": d.reshape(7), "z": m.layer(d)}, "fixes the number of rows in a batch"),
    "branch": (
        lambda m, d, _c: {"logit": d[:, 0] * (1.0 if d.shape[0] > 5 else 2.0), "z": m.layer(d)},
        "fixes the number of rows in a batch",
    ),
    "mean": (
        lambda m, d, _c: {"logit": d[:, 0] - d.mean(), "z": m.layer(d)},
        "a row's answer depends on its batch (1 or 64 rows): logit 'click' differs",
    ),
    "random": (
        lambda m, d, _c: {"logit": d[:, 0] + torch.rand(d.shape[0]), "z": m.layer(d)},
        "exported and eager model disagree on a batch of 1: logit 'click' differs in 1 of 1 values",
    ),
    "nested": (lambda m, d, c: {"logit": d[:, 0], "z": m.layer(d), "more": (d, c)}, "must return a flat dict"),
}


@pytest.mark.parametrize(("forward", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_module_that_cannot_serve_is_refused_with_the_reason(
    forward: Callable[..., Any], message: str, tmp_path: Path
) -> None:
    assert message in refusal(tmp_path, forward)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabularies": {}}, "vocabularies: words.txt is used by an input and not given"),
        ({"vocabularies": {"words.txt": ["a"], "b.txt": ["b"]}}, "vocabularies: b.txt is given and not used"),
        ({"vocabularies": {"words.txt": ["a", "a"]}}, "a vocabulary names a value twice"),
        ({"vocabularies": {"words.txt": ["a\nb"]}}, "hold a line break"),
        ({"golden": ROWS.select(["x"])}, "the golden rows have no column 'word'"),
        ({"golden": pa.table({"x": ["1"], "word": ["a"]})}, "x: a float takes numbers or vectors"),
    ],
)
def test_a_signature_that_does_not_fit_its_rows_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in refusal(tmp_path, good, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"golden": ROWS.slice(0, 0)}, "golden has no rows"),
        ({"vocabularies": {"model.pt2": ["a"]}}, "model.pt2 is the name of another file"),
        ({"fm": "Not a name"}, "String should match pattern"),
        ({"outputs": {"logits": {}}}, "there is neither a logit nor an embedding"),
    ],
)
def test_a_signature_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build_signature(**changes)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"features": ["nowhere"], "encode": {"kind": "float"}}, "the dataset has no feature 'nowhere'"),
        ({"features": ["user_id"], "encode": {"kind": "float"}}, "a category cannot be encoded as float"),
        ({"features": ["price"], "encode": {"kind": "hash", "buckets": 9}}, "a float cannot be encoded as hash"),
        ({"features": ["tags"], "encode": {"kind": "hash", "buckets": 9}}, "a category_list needs pad_to"),
        (
            {"features": ["tags", "user_id"], "encode": {"kind": "hash", "buckets": 9, "pad_to": 3}},
            "a category_list needs a tensor of its own",
        ),
        (
            {"features": ["item"], "encode": {"kind": "hash", "buckets": 9, "pad_to": 3}},
            "pad_to is for a category_list",
        ),
        ({"features": ["item"], "encode": {"kind": "hash", "buckets": 9, "mask": "m"}}, "a mask needs pad_to"),
    ],
)
def test_a_signature_that_does_not_fit_the_dataset_is_refused(
    inputs: dict[str, Any], message: str, spec: DatasetSpec
) -> None:
    with pytest.raises(ValidationError, match=message):
        build_signature(dataset=spec, inputs=[{"tensor": "t"} | inputs], vocabularies={})


def test_a_plain_mapping_without_dataset_or_golden_rows_is_enough(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, *, cat: torch.Tensor, dense: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logit": cat.sum(1).float() / 100 + dense.sum(1)}

    signature = {
        "format": 1,
        "fm": "f",
        "snapshot_id": "s1",
        "max_batch": 64,
        "inputs": [
            {"tensor": "cat", "features": ["user"], "encode": {"kind": "hash", "buckets": 10}},
            {"tensor": "dense", "features": ["price"], "encode": {"kind": "float", "null": 0.5}},
        ],
        "outputs": {"logits": {"click": "logit"}, "embeddings": {}},
    }
    manifest = export_snapshot(Sum(), signature, tmp_path / "s1", trained_through=datetime(2026, 1, 1, tzinfo=UTC))
    assert (manifest.fm, tuple(manifest.files)) == ("f", ("model.pt2",))
