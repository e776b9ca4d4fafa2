"""Whether a snapshot folder is what its manifest says, fits its dataset and runs: the rules that validation applies.

Everything about the folder and its signature is said at once; only if that is clean is the model loaded and tried.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from das_service.snapshot_folder import SnapshotError, check_files, read_manifest
from fm_inference.engine import MACHINE_ERRORS, TorchEngine, load_engine, read_vocabularies
from fm_inference.features import FeatureError
from fm_inference.golden import Answers, differences, read_golden
from fm_inference.outputs import ModelOutputError, first_line
from fm_inference.signature import fit_reasons, vocabulary_reasons
from fm_inference.synthetic import synthetic_rows
from schemas.dataset import DatasetSpec
from schemas.snapshot import GOLDEN_FILE, Manifest, OutputColumns

SYNTHETIC_ROWS = 64
LARGEST_BATCH = 4096
GOLDEN_ROWS = 10_000
TOLERANCE = (1e-3, 1e-4)  # relative, absolute: float32 sums in another order, on another device
BF16_TOLERANCE = (5e-2, 5e-2)  # eight bits of mantissa


def snapshot_reasons(
    folder: Path,
    spec: DatasetSpec,
    *,
    fm: str,
    snapshot_id: str,
    sha256: str,
    fixed_outputs: OutputColumns | None,
    device: str,
    bf16: bool = False,
) -> list[str]:
    """Give every reason why this snapshot cannot be used, in this process; empty if it can.

    Raises:
        SnapshotError: The manifest, the model or the golden rows cannot be read at all, with the reasons.
        OSError, MemoryError, torch.OutOfMemoryError: The machine or the store failed; another time it may not.
    """
    manifest = read_manifest(folder, sha256=sha256)
    reasons = _name_reasons(manifest, fm, snapshot_id) + fit_reasons(manifest.inputs, manifest.outputs, spec)
    if fixed_outputs is not None:
        reasons += _output_reasons(manifest.outputs.columns(), fixed_outputs)
    try:
        check_files(folder, manifest)
        reasons += vocabulary_reasons(manifest.inputs, read_vocabularies(folder, manifest), spec)
    except SnapshotError as error:
        reasons += error.reasons
    if reasons:
        return reasons
    return _trial_reasons(folder, manifest, spec, device=device, bf16=bf16)


def _name_reasons(manifest: Manifest, fm: str, snapshot_id: str) -> list[str]:
    reasons = []
    if manifest.fm != fm:
        reasons.append(f"the manifest is of FM {manifest.fm!r}, it was published for {fm!r}")
    if manifest.snapshot_id != snapshot_id:
        reasons.append(f"the manifest is of snapshot {manifest.snapshot_id!r}, it was published as {snapshot_id!r}")
    return reasons


def _output_reasons(given: OutputColumns, fixed: OutputColumns) -> list[str]:
    reasons = []
    if set(given.tasks) != set(fixed.tasks):
        reasons.append(
            f"outputs.logits are {sorted(given.tasks)}; this FM's first snapshot fixed {sorted(fixed.tasks)}"
            " (another set of outputs is another FM)"
        )
    for name in sorted(given.embeddings.keys() | fixed.embeddings.keys()):
        now, first = given.embeddings.get(name), fixed.embeddings.get(name)
        if now != first:
            reasons.append(f"embedding {name!r} is {_said(now)}; this FM's first snapshot fixed {_said(first)}")
    return reasons


def _said(embedding: tuple[int, str] | None) -> str:
    return "absent" if embedding is None else f"{embedding[0]} values in {embedding[1]}"


def _trial_reasons(folder: Path, manifest: Manifest, spec: DatasetSpec, *, device: str, bf16: bool) -> list[str]:
    """Load the model and compare what it says with the golden rows, and with itself for other batch sizes."""
    expected = None
    rows = synthetic_rows(spec, SYNTHETIC_ROWS)
    if GOLDEN_FILE in manifest.files:
        rows, expected = read_golden(folder, manifest.outputs.columns())
        if rows.num_rows > GOLDEN_ROWS:
            return [f"{GOLDEN_FILE} has {rows.num_rows} rows; {GOLDEN_ROWS} are the most"]
    engine = load_engine(folder, manifest, device=device, bf16=bf16)
    relative, absolute = BF16_TOLERANCE if bf16 else TOLERANCE
    reasons, answers = _answers(engine, rows)
    if answers is None:
        return reasons
    if expected is not None:
        wrong = differences(expected, answers, relative=relative, absolute=absolute)
        reasons += [f"{GOLDEN_FILE}: {reason}" for reason in wrong]
    for size in sorted({1, 2, min(manifest.max_batch, LARGEST_BATCH)}):
        place = np.arange(size) % rows.num_rows
        failed, part = _answers(engine, rows.take(place))
        reasons += failed
        if part is not None:
            wrong = differences(answers.take(place), part, relative=relative, absolute=absolute)
            reasons += [
                f"a row's answer depends on its batch ({size} or {rows.num_rows} rows): {each}" for each in wrong
            ]
    return reasons


def _answers(engine: TorchEngine, rows: pa.Table) -> tuple[list[str], Answers | None]:
    """Give the model's answers for the rows, or the reasons why there are none."""
    try:
        outputs = engine.forward(engine.prepare(rows))
        engine.finish(outputs)
    except ModelOutputError as error:
        return [f"on {rows.num_rows} rows: {reason}" for reason in error.reasons], None
    except FeatureError as error:
        return [f"on {rows.num_rows} rows: {error}"], None
    except MACHINE_ERRORS:
        raise
    except Exception as error:  # noqa: BLE001 - a model may raise anything, and that is its team's to know
        return [f"the model fails on {rows.num_rows} rows: {first_line(error)}"], None
    logits = {task: logit_B.cpu().numpy() for task, logit_B in outputs.logits.items()}
    return [], Answers(logits=logits, embeddings={n: z_BD.cpu().numpy() for n, z_BD in outputs.embeddings.items()})
