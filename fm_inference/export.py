"""Publishing's first half: an eager module becomes a snapshot folder that a worker can check, load and run.

The folder is made beside its final place and renamed, so that it is there entirely or not at all.
"""

import inspect
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from das_service.snapshot_folder import SnapshotError, file_sha256
from fm_inference.archive import check_archive
from fm_inference.features import FeatureError, build_tensors
from fm_inference.golden import Answers, differences, golden_table, used_features, write_golden
from fm_inference.outputs import ModelOutputError, all_finite, first_line, named_outputs, not_finite_error
from fm_inference.signature import Signature, implied_dataset, read_signature
from fm_inference.synthetic import synthetic_rows
from fm_inference.vocabulary import Vocabulary, VocabularyError
from schemas.snapshot import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE, Manifest, VocabularyEncode

EXAMPLE_ROWS = 7
CHECKED_ROWS = 4096
RELATIVE_TOLERANCE = 1e-4
ABSOLUTE_TOLERANCE = 1e-5
_Tensors = dict[str, torch.Tensor]
_Vocabularies = Mapping[str, Vocabulary]


def export_snapshot(
    module: nn.Module, signature: Signature | Mapping[str, Any], path: Path | str, *, trained_through: datetime | None
) -> Manifest:
    """Write the module as a snapshot folder at `path` and give its manifest.

    signature: a Signature, or its fields as they stand in snapshot.json (fm, snapshot_id, inputs, outputs, max_batch).

    The module is exported in eval mode (and left in the mode it had), with its batch dimension free from 1 to
    max_batch, on tensors that the worker's own feature functions built from the golden rows, or from rows made up from
    the dataset. What it answers must not depend on the batch: it is compared with the eager module for 1, 2, 7 and
    min(max_batch, 4096) rows. `trained_through` is exclusive: labels of rows before it may have been seen; the loader
    that it was trained with knows it (`AugmentedDataset.trained_through`).

    Raises:
        SnapshotError: The module and the signature do not fit, with every reason found.
        FileExistsError: Something is at `path` already: a snapshot never changes.
        ValueError: trained_through is None, as of a loader that has delivered nothing, or has no time zone.
    """
    folder, signature = Path(path), read_signature(signature)
    if trained_through is None:
        raise ValueError("trained_through is None: say up to which event_time labels may have been seen")
    if trained_through.tzinfo is None:
        raise ValueError("trained_through needs a time zone: datetime(..., tzinfo=UTC)")
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists; a snapshot never changes, give the new one another name")
    vocabularies = _built_vocabularies(signature)
    rows = _example_rows(signature)
    was_training = module.training
    module.eval()
    try:
        program = _exported(module, signature, rows, vocabularies)
        _check_batches(module, program, signature, rows, vocabularies)
        golden = _golden(module, signature, rows, vocabularies)
    finally:
        module.train(was_training)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        manifest = _write_files(scratch, signature, program, golden, vocabularies, trained_through)
        check_archive(scratch / MODEL_FILE)
        _move_into_place(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def _built_vocabularies(signature: Signature) -> dict[str, Vocabulary]:
    used = {wanted.encode.file for wanted in signature.inputs if isinstance(wanted.encode, VocabularyEncode)}
    reasons = [
        f"vocabularies: {name} is used by an input and not given" for name in used - signature.vocabularies.keys()
    ]
    reasons += [f"vocabularies: {name} is given and not used" for name in signature.vocabularies.keys() - used]
    if reasons:
        raise SnapshotError(sorted(reasons))
    try:
        return signature.built_vocabularies()
    except VocabularyError as error:
        raise SnapshotError([str(error)]) from None


def _example_rows(signature: Signature) -> pa.Table:
    """Give the rows to export and check on: the golden ones, else made-up ones; only the columns that inputs use."""
    rows = signature.golden
    if rows is None:
        rows = synthetic_rows(signature.dataset or implied_dataset(signature.inputs), EXAMPLE_ROWS)
    names = used_features(signature.inputs)
    missing = [name for name in names if name not in rows.column_names]
    if missing:
        raise SnapshotError([f"the golden rows have no column {name!r}" for name in missing])
    return rows.select(names)


def _tensors(module: nn.Module, rows: pa.Table, signature: Signature, vocabularies: _Vocabularies) -> _Tensors:
    weight = next(chain(module.parameters(), module.buffers()), None)
    device = torch.device("cpu") if weight is None else weight.device
    try:
        tensors = build_tensors(rows, signature.inputs, vocabularies)
    except FeatureError as error:
        raise SnapshotError([str(error)]) from None
    return {name: value.to(device) for name, value in tensors.items()}


def _exported(module: nn.Module, signature: Signature, rows: pa.Table, vocabularies: _Vocabularies) -> ExportedProgram:
    example = _tensors(module, _repeated(rows, EXAMPLE_ROWS), signature, vocabularies)
    _answers(module, signature, _repeated(rows, EXAMPLE_ROWS), vocabularies)
    batch = Dim("batch", min=1, max=max(signature.max_batch, EXAMPLE_ROWS))
    shapes = {name: {0: batch} for name in example}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations; what it made is checked by running it
            program = torch.export.export(
                _with_named_arguments(module, example), (), kwargs=example, dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # torch names no family of errors for what a module may do
        raise SnapshotError([_export_reason(error)]) from error
    program._example_inputs = None  # noqa: SLF001 - torch would save them as a pickle, which workers refuse
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths and lines of the team's own code
    return program


class _NamedArguments(nn.Module):
    """A module that gathers its tensors with **, seen by torch.export as one with named arguments: all it can take."""

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.module = module

        def forward(**tensors: torch.Tensor) -> object:
            return module(**tensors)

        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


def _with_named_arguments(module: nn.Module, names: Iterable[str]) -> nn.Module:
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    return _NamedArguments(module, names) if inspect.Parameter.VAR_KEYWORD in kinds else module


def _export_reason(error: Exception) -> str:
    text = str(error)
    if "onstraint" in text or "specialized" in text:
        return (
            "the model fixes the number of rows in a batch: the first dimension of every tensor must stay free "
            f"(no int(x.shape[0]), no reshape to a number, no branch on it). {first_line(error)}"
        )
    return f"torch cannot export the model: {first_line(error)}"


def _answers(run: nn.Module, signature: Signature, rows: pa.Table, vocabularies: _Vocabularies) -> Answers:
    """Give what the module or program says of the rows in one batch."""
    tensors = _tensors(run, rows, signature, vocabularies)
    try:
        with torch.no_grad():
            raw = run(**tensors)
    except Exception as error:  # a module may raise anything
        given = ", ".join(f"{name} {value.dtype} {tuple(value.shape)}" for name, value in tensors.items())
        raise SnapshotError([f"the model does not take ({given}): {first_line(error)}"]) from error
    try:
        logits, embeddings = named_outputs(raw, signature.outputs, rows.num_rows)
        if not all_finite(logits, embeddings):
            raise not_finite_error(logits, embeddings)
    except ModelOutputError as error:
        raise SnapshotError(error.reasons) from None
    return Answers(
        logits={task: logit_B.cpu().numpy() for task, logit_B in logits.items()},
        embeddings={name: vectors_BD.cpu().numpy() for name, vectors_BD in embeddings.items()},
    )


def _check_batches(
    module: nn.Module, program: ExportedProgram, signature: Signature, rows: pa.Table, vocabularies: _Vocabularies
) -> None:
    """Check that the program says what the eager module says, and the same of a row in any batch."""
    run = program.module()
    largest = min(signature.max_batch, CHECKED_ROWS)
    whole = _answers(run, signature, _repeated(rows, largest), vocabularies)
    for size in sorted({size for size in (1, 2, EXAMPLE_ROWS, largest) if size <= largest}):
        batch = _repeated(rows, size)
        exported = _answers(run, signature, batch, vocabularies)
        eager = _answers(module, signature, batch, vocabularies)
        if reasons := differences(eager, exported, relative=RELATIVE_TOLERANCE, absolute=ABSOLUTE_TOLERANCE):
            raise SnapshotError([f"exported and eager model disagree on a batch of {size}: {each}" for each in reasons])
        head = whole.take(np.arange(size))
        if reasons := differences(head, exported, relative=RELATIVE_TOLERANCE, absolute=ABSOLUTE_TOLERANCE):
            raise SnapshotError(
                [f"a row's answer depends on its batch ({size} or {largest} rows): {each}" for each in reasons]
            )


def _golden(module: nn.Module, signature: Signature, rows: pa.Table, vocabularies: _Vocabularies) -> pa.Table | None:
    if signature.golden is None:
        return None
    step = min(signature.max_batch, CHECKED_ROWS)
    parts = [rows.slice(start, step) for start in range(0, rows.num_rows, step)]
    tables = [golden_table(part, _answers(module, signature, part, vocabularies)) for part in parts]
    return pa.concat_tables(tables)


def _repeated(rows: pa.Table, size: int) -> pa.Table:
    return rows.take(np.arange(size) % rows.num_rows)


def _write_files(
    folder: Path,
    signature: Signature,
    program: ExportedProgram,
    golden: pa.Table | None,
    vocabularies: _Vocabularies,
    trained_through: datetime,
) -> Manifest:
    torch.export.save(program, str(folder / MODEL_FILE))
    if golden is not None:
        write_golden(golden, folder / GOLDEN_FILE)
    for name, vocabulary in vocabularies.items():
        (folder / name).write_bytes(vocabulary.to_bytes())
    manifest = Manifest(
        snapshot_id=signature.snapshot_id,
        fm=signature.fm,
        created_at=datetime.now(UTC),
        trained_through=trained_through,
        max_batch=signature.max_batch,
        inputs=signature.inputs,
        outputs=signature.outputs,
        files={path.name: f"sha256:{file_sha256(path)}" for path in sorted(folder.iterdir())},
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
    return manifest


def _move_into_place(scratch: Path, folder: Path) -> None:
    """Fsync the files and rename their folder; both stay after a power cut, or neither."""
    scratch.chmod(0o755)
    for path in (*scratch.iterdir(), scratch):
        _fsync(path)
    scratch.rename(folder)
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
