"""A worker's verdict on a snapshot names everything that is wrong, and survives what the model does."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from torch import nn

from das_service.snapshot_folder import SnapshotError, manifest_sha256
from fm_inference import Signature, export_snapshot
from fm_inference.golden import Answers, golden_table, write_golden
from fm_inference.synthetic import synthetic_rows
from fm_inference.validate import NoVerdictError, Question, Request, _read_verdict, validate_snapshot
from fm_inference.verdict import snapshot_reasons
from schemas.dataset import DatasetSpec
from schemas.snapshot import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE, OutputColumns
from tests.fakes import export_closed_form

OUTPUTS = OutputColumns(tasks=("buy", "click"), embeddings={"hidden": (8, "float16")})


@pytest.fixture
def folder(closed_form_folder: Path, tmp_path: Path) -> Path:
    """A good folder that a test may spoil."""
    shutil.copytree(closed_form_folder, tmp_path / "s1")
    return tmp_path / "s1"


def reasons(folder: Path, spec: DatasetSpec, **changes: Any) -> list[str]:
    """The verdict, reached in this process."""
    asked: dict[str, Any] = {"fm": "closed", "snapshot_id": "s1", "fixed_outputs": None, "device": "cpu"}
    asked["sha256"] = manifest_sha256(folder)
    try:
        return snapshot_reasons(folder, spec, **(asked | changes))
    except SnapshotError as error:
        return error.reasons


def rewritten(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and let it name the files as they now are."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    for path in folder.iterdir():
        if path.name != MANIFEST_FILE:
            manifest["files"][path.name] = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    edit(manifest)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def with_golden(folder: Path, rows: pa.Table, answers: Answers) -> None:
    write_golden(golden_table(rows, answers), folder / GOLDEN_FILE)
    rewritten(folder, lambda _manifest: None)


def zeros(rows: int) -> Answers:
    logits = {task: np.zeros(rows, np.float32) for task in ("click", "buy")}
    return Answers(logits=logits, embeddings={"hidden": np.zeros((rows, 8), np.float32)})


def test_a_good_snapshot_has_nothing_wrong_in_the_child(closed_form_folder: Path, spec: DatasetSpec) -> None:
    sha256 = manifest_sha256(closed_form_folder)
    verdict = validate_snapshot(
        closed_form_folder, spec, fm="closed", snapshot_id="s1", sha256=sha256, fixed_outputs=OUTPUTS, device="cpu"
    )
    assert verdict == []


def test_golden_rows_that_agree_are_fine(tmp_path: Path, spec: DatasetSpec) -> None:
    export_closed_form(tmp_path / "s1", spec, golden=synthetic_rows(spec, 20), max_batch=16)
    assert reasons(tmp_path / "s1", spec) == []


def test_every_name_and_output_that_differs_is_said_at_once(folder: Path, spec: DatasetSpec) -> None:
    fixed = OutputColumns(tasks=("click",), embeddings={"hidden": (8, "int8"), "more": (2, "int4")})
    assert reasons(folder, spec, fm="other", snapshot_id="s2", fixed_outputs=fixed) == [
        "the manifest is of FM 'closed', it was published for 'other'",
        "the manifest is of snapshot 's1', it was published as 's2'",
        "outputs.logits are ['buy', 'click']; this FM's first snapshot fixed ['click']"
        " (another set of outputs is another FM)",
        "embedding 'hidden' is 8 values in float16; this FM's first snapshot fixed 8 values in int8",
        "embedding 'more' is absent; this FM's first snapshot fixed 2 values in int4",
    ]


def test_another_manifest_than_announced_is_refused(folder: Path, spec: DatasetSpec) -> None:
    assert reasons(folder, spec, sha256="0" * 64) == [
        "snapshot.json is not the file that was announced (its SHA-256 differs)"
    ]


def test_a_manifest_that_cannot_be_read_says_where(folder: Path, spec: DatasetSpec) -> None:
    rewritten(folder, lambda manifest: manifest.update(max_batch=0, surprise=1))
    assert reasons(folder, spec) == [
        "snapshot.json: max_batch: Input should be greater than or equal to 1",
        "snapshot.json: surprise: Extra inputs are not permitted",
    ]


def test_files_that_changed_or_do_not_belong_are_named(folder: Path, spec: DatasetSpec) -> None:
    (folder / "notes.txt").write_text("x")
    assert reasons(folder, spec) == ["notes.txt is in the folder and not in snapshot.json"]
    (folder / "notes.txt").unlink()
    (folder / MODEL_FILE).write_bytes(b"x")
    assert reasons(folder, spec) == ["model.pt2 is not the file that snapshot.json names (its SHA-256 differs)"]
    (folder / MODEL_FILE).unlink()
    assert "model.pt2 is missing" in reasons(folder, spec)
    (folder / MODEL_FILE).symlink_to("/etc/passwd")
    assert reasons(folder, spec) == ["model.pt2 is a link or a folder, not a file"]


def test_no_manifest_is_said(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match=r"there is no snapshot.json"):
        manifest_sha256(tmp_path)


def test_a_signature_that_does_not_fit_the_dataset_is_said(folder: Path, spec: DatasetSpec) -> None:
    smaller = spec.model_copy(update={"features": spec.features[:2], "tasks": spec.tasks[:1]})
    assert reasons(folder, smaller) == [
        "input 'dense': the dataset has no feature 'image'",
        "input 'cat': the dataset has no feature 'item'",
        "input 'list0': the dataset has no feature 'tags'",
        "input 'list1': the dataset has no feature 'shops'",
        "outputs.logits: the dataset has no task 'buy'",
    ]


def test_golden_answers_that_differ_say_which_and_how_much(folder: Path, spec: DatasetSpec) -> None:
    with_golden(folder, synthetic_rows(spec, 5), zeros(5))
    said = reasons(folder, spec)
    assert [reason.split(" in ")[0] for reason in said] == [
        "golden.arrow: logit 'click' differs",
        "golden.arrow: logit 'buy' differs",
        "golden.arrow: embedding 'hidden' differs",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no arrow", "golden.arrow cannot be read"), (b"", "golden.arrow cannot be read")],
    ids=["text", "empty"],
)
def test_golden_rows_that_cannot_be_read_are_refused(
    content: bytes, message: str, folder: Path, spec: DatasetSpec
) -> None:
    (folder / GOLDEN_FILE).write_bytes(content)
    rewritten(folder, lambda _manifest: None)
    assert [reason[: len(message)] for reason in reasons(folder, spec)] == [message]


def test_golden_rows_without_answers_or_rows_are_refused(folder: Path, spec: DatasetSpec) -> None:
    write_golden(synthetic_rows(spec, 2), folder / GOLDEN_FILE)
    rewritten(folder, lambda _manifest: None)
    assert "expected__click__logit" in reasons(folder, spec)[0]
    with_golden(folder, synthetic_rows(spec, 0), zeros(0))
    assert reasons(folder, spec) == ["golden.arrow has no rows; leave it out"]


def test_vocabularies_are_read_and_held_against_the_features(tmp_path: Path, spec: DatasetSpec) -> None:
    class Word(nn.Module):
        def forward(self, item: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": item[:, 0].float()}

    signature = Signature.model_validate(
        {
            "fm": "closed",
            "snapshot_id": "s1",
            "inputs": [{"tensor": "item", "features": ["item"], "encode": {"kind": "vocabulary", "file": "items.txt"}}],
            "vocabularies": {"items.txt": [1, 2, 3]},
            "outputs": {"logits": {"click": "y"}},
            "dataset": spec,
        }
    )
    folder = tmp_path / "s1"
    export_snapshot(Word(), signature, folder, trained_through=datetime(2024, 1, 1, tzinfo=UTC))
    assert reasons(folder, spec) == []
    for content, said in (
        (b"1\nx\n", "items.txt: a line is not an int64 in plain decimal (input 'item')"),
        (b"1\n1\n", "items.txt: a vocabulary names a value twice"),
        (b"\xff\n", "items.txt is not UTF-8 text (byte 0)"),
    ):
        (folder / "items.txt").write_bytes(content)
        rewritten(folder, lambda _manifest: None)
        assert reasons(folder, spec) == [said]


def test_a_model_that_answers_with_no_number_says_on_which_rows(tmp_path: Path, spec: DatasetSpec) -> None:
    export_closed_form(tmp_path / "s1", spec, poison="nan")
    rows = synthetic_rows(spec, 4).set_column(0, "price", pa.array([1.0, 2e6, 3.0, None]))
    with_golden(tmp_path / "s1", rows, zeros(4))
    assert reasons(tmp_path / "s1", spec)[0] == "on 4 rows: logit 'click' is not finite in 1 of 4 rows: 1"


def test_a_model_that_raises_says_what(tmp_path: Path, spec: DatasetSpec) -> None:
    export_closed_form(tmp_path / "s1", spec, poison="raise")
    rows = synthetic_rows(spec, 2).set_column(0, "price", pa.array([1.0, 2e6]))
    with_golden(tmp_path / "s1", rows, zeros(2))
    assert reasons(tmp_path / "s1", spec) == ["the model fails on 2 rows: IndexError: index out of range in self"]


def test_a_model_that_kills_its_process_leaves_the_worker_alive(tmp_path: Path, spec: DatasetSpec) -> None:
    folder = tmp_path / "s1"
    export_closed_form(folder, spec, poison="kill")
    with_golden(folder, synthetic_rows(spec, 2).set_column(0, "price", pa.array([1.0, 2e6])), zeros(2))
    sha256 = manifest_sha256(folder)
    verdict = validate_snapshot(folder, spec, fm="closed", snapshot_id="s1", sha256=sha256, device="cpu")
    assert verdict == ["the model ended the process (signal 8, SIGFPE)"]


def test_a_model_that_takes_too_long_is_stopped(closed_form_folder: Path, spec: DatasetSpec) -> None:
    sha256 = manifest_sha256(closed_form_folder)
    verdict = validate_snapshot(
        closed_form_folder, spec, fm="closed", snapshot_id="s1", sha256=sha256, device="cpu", deadline_seconds=0.1
    )
    assert verdict == ["the model was not loaded and tried within 0.1 seconds"]


def test_a_worker_that_stops_does_not_wait_for_the_child(closed_form_folder: Path, spec: DatasetSpec) -> None:
    sha256 = manifest_sha256(closed_form_folder)
    with pytest.raises(NoVerdictError, match="stopped"):
        validate_snapshot(
            closed_form_folder, spec, fm="closed", snapshot_id="s1", sha256=sha256, device="cpu",
            is_stopping=lambda: True,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ("OSError(28, 'No space left on device')", "OSError: [Errno 28] No space left on device"),
        ("MemoryError()", "MemoryError: "),
    ],
)
def test_a_machine_that_fails_says_nothing_about_the_snapshot(
    failure: str, said: str, closed_form_folder: Path, spec: DatasetSpec
) -> None:
    program = (
        "from fm_inference import validate\n"
        "def fail(*_, **__): raise " + failure + "\n"
        "validate.snapshot_reasons = fail\n"
        "validate.main()\n"
    )
    request = Request(
        folder=closed_form_folder, spec=spec, fm="closed", snapshot_id="s1", sha256="0" * 64, fixed_outputs=None,
        device="cpu", bf16=False,
    )  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-c", program], input=Question(request=request).model_dump_json().encode(),
        capture_output=True, check=True,
    )  # fmt: skip
    with pytest.raises(NoVerdictError) as error:
        _read_verdict(child.returncode, child.stdout, child.stderr)
    assert str(error.value) == said


def test_a_child_that_ends_without_a_verdict_says_nothing_about_the_snapshot() -> None:
    with pytest.raises(NoVerdictError, match="exit code 1 and no verdict"):
        _read_verdict(1, b"", b"ImportError")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children with their parent on Linux alone")
def test_the_child_ends_with_a_worker_that_is_killed(closed_form_folder: Path, spec: DatasetSpec) -> None:
    program = (
        "import sys; from pathlib import Path; from schemas.dataset import DatasetSpec\n"
        "from fm_inference.validate import validate_snapshot\n"
        "validate_snapshot(Path(sys.argv[1]), DatasetSpec.model_validate_json(sys.argv[2]), fm='closed',"
        " snapshot_id='s1', sha256='0' * 64)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", program, str(closed_form_folder), spec.model_dump_json()])
    deadline = time.monotonic() + 60
    children: list[psutil.Process] = []
    own = psutil.Process(worker.pid).cmdline()  # which a child has too until it is a program of its own
    while not children or children[0].cmdline() == own or "leash.py" in " ".join(children[0].cmdline()):
        assert time.monotonic() < deadline
        children = psutil.Process(worker.pid).children()
    children[0].suspend()  # so that it can't end by itself
    worker.kill()
    worker.wait()
    assert psutil.wait_procs(children, timeout=30)[1] == []


def test_the_child_sees_no_settings_of_the_service(
    closed_form_folder: Path, spec: DatasetSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fm_inference import validate

    monkeypatch.setenv("DAS_TOKEN", "secret")
    seen = validate._child_environment(Path("/here"))
    assert "DAS_TOKEN" not in seen
    assert seen["PYTHONPATH"] == os.fspath(Path("/here"))
