"""The model at work: a chunk's columns in, encoded supervision out, in three steps.

`prepare` (CPU) may run for the next chunk while `forward` (device) works on this one; `finish` waits for the device.
Shapes: B rows, D values of an embedding, W bytes of it encoded.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from das_service.snapshot_folder import SnapshotError
from fm_inference.archive import check_archive
from fm_inference.features import build_tensors, tensor_names
from fm_inference.outputs import ModelOutputError, all_finite, first_line, named_outputs, not_finite_error
from fm_inference.program import program_inputs, zero_inputs
from fm_inference.vocabulary import Vocabulary, VocabularyError, read_vocabulary
from schemas.codecs import FLOAT16_MAX, encode
from schemas.snapshot import MODEL_FILE, Manifest, VocabularyEncode

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
MACHINE_ERRORS = (OSError, MemoryError, torch.OutOfMemoryError)  # these say nothing about a model
_Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A chunk as the model takes it; tensors on the CPU (pinned for a CUDA device), num_rows first."""

    tensors: dict[str, torch.Tensor]
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceOutputs:
    """A chunk's outputs, perhaps still being computed: float32 on the device, and copies on their way to the host."""

    num_rows: int
    logits: dict[str, torch.Tensor]
    embeddings: dict[str, torch.Tensor]
    host_logits: dict[str, torch.Tensor]
    host_embeddings: dict[str, torch.Tensor]
    finite: torch.Tensor
    done: torch.cuda.Event | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A chunk's supervision: logits float32 (B,) by task, encoded embeddings uint8 (B, W) by name."""

    logits: dict[str, NDArray[np.float32]]
    embeddings: dict[str, NDArray[np.uint8]]

    def at(self, rows: slice | NDArray[np.int64]) -> "Scored":
        """Give what was said of these rows."""
        return Scored(
            logits={name: values[rows] for name, values in self.logits.items()},
            embeddings={name: values[rows] for name, values in self.embeddings.items()},
        )


def joined_in_order(parts: Sequence[tuple[NDArray[np.int64], Scored]]) -> tuple[NDArray[np.int64], Scored]:
    """Give the rows of all parts in ascending order with their outputs."""
    rows = np.concatenate([rows for rows, _ in parts])
    order = np.argsort(rows, kind="stable")
    logits = {name: np.concatenate([s.logits[name] for _, s in parts]) for name in parts[0][1].logits}
    vectors = {name: np.concatenate([s.embeddings[name] for _, s in parts]) for name in parts[0][1].embeddings}
    return rows[order], Scored(logits=logits, embeddings=vectors).at(order)


class TorchEngine:
    """One snapshot's exported program on one device.

    Raises:
        SnapshotError: The program takes other tensors or fewer rows than its manifest says.
    """

    def __init__(
        self,
        program: ExportedProgram,
        manifest: Manifest,
        vocabularies: Mapping[str, Vocabulary],
        *,
        device: torch.device,
        bf16: bool = False,
    ) -> None:
        self.manifest = manifest
        self.device = device
        self._vocabularies = vocabularies
        self._bf16 = bf16
        self._inputs = program_inputs(program)
        given = set(tensor_names(manifest.inputs))
        if set(self._inputs) != given:
            raise SnapshotError([f"the model takes {sorted(self._inputs)} and the manifest gives {sorted(given)}"])
        most = min(shape.max_rows for shape in self._inputs.values())
        if manifest.max_batch > most:
            raise SnapshotError([f"max_batch is {manifest.max_batch} and the model takes at most {most} rows"])
        self._module = move_to_device_pass(program, device).module()

    def prepare(self, columns: pa.RecordBatch | pa.Table) -> Prepared:
        """Give the chunk's tensors.

        Raises:
            FeatureError: The columns are not those of the manifest's inputs.
        """
        pinned = self.device.type == "cuda"
        tensors = build_tensors(columns, self.manifest.inputs, self._vocabularies, pin_memory=pinned)
        return Prepared(tensors=tensors, num_rows=columns.num_rows)

    def forward(self, prepared: Prepared) -> DeviceOutputs:
        """Run the model, at most the manifest's max_batch rows at a time; does not wait for a CUDA device.

        Raises:
            ModelOutputError: A tensor is absent or has another shape than the manifest says.
            Exception: Whatever the model raises.
        """
        with torch.inference_mode():
            parts = list(self._forward_parts(prepared)) or [self._no_rows()]
            logits = _joined([logits for logits, _ in parts])
            return self._send(logits, _joined([vectors for _, vectors in parts]), prepared.num_rows)

    def finish(self, outputs: DeviceOutputs) -> Scored:
        """Wait for the outputs and give them as they are stored.

        Raises:
            ModelOutputError: A value is not finite; `rows` says where.
        """
        if outputs.done is not None:
            outputs.done.synchronize()
        if not bool(outputs.finite):
            raise not_finite_error(outputs.logits, outputs.embeddings)
        logits = {task: logit_B.numpy() for task, logit_B in outputs.host_logits.items()}
        vectors = {name: self._encoded(name, values.numpy()) for name, values in outputs.host_embeddings.items()}
        return Scored(logits=logits, embeddings=vectors)

    def score(self, columns: pa.RecordBatch | pa.Table) -> Scored:
        """Give the supervision of a chunk: the three steps in a row; raises what they raise."""
        return self.finish(self.forward(self.prepare(columns)))

    def warm_up(self) -> None:
        """Run the model once on two rows of zeros, so that the first chunk does not pay for loading kernels.

        Raises:
            ModelOutputError: A tensor is absent or has another shape than the manifest says.
            Exception: Whatever the model raises.
        """
        outputs = self.forward(Prepared(tensors=zero_inputs(self._inputs, 2), num_rows=2))
        if outputs.done is not None:
            outputs.done.synchronize()

    def _forward_parts(self, prepared: Prepared) -> Iterator[tuple[_Tensors, _Tensors]]:
        tensors = {name: value.to(self.device, non_blocking=True) for name, value in prepared.tensors.items()}
        for start in range(0, prepared.num_rows, self.manifest.max_batch):
            part = {name: value[start : start + self.manifest.max_batch] for name, value in tensors.items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
                raw = self._module(**part)
            yield named_outputs(raw, self.manifest.outputs, min(self.manifest.max_batch, prepared.num_rows - start))

    def _no_rows(self) -> tuple[_Tensors, _Tensors]:
        outputs = self.manifest.outputs
        logits = {task: torch.zeros(0, device=self.device) for task in outputs.logits}
        return logits, {name: torch.zeros(0, e.size, device=self.device) for name, e in outputs.embeddings.items()}

    def _send(self, logits: _Tensors, embeddings: _Tensors, num_rows: int) -> DeviceOutputs:
        """Start the copies to the host; on a CPU the tensors are there already."""
        finite = all_finite(logits, embeddings)
        packed = {name: self._packed(name, vectors_BD) for name, vectors_BD in embeddings.items()}
        if self.device.type != "cuda":
            return DeviceOutputs(
                num_rows=num_rows, logits=logits, embeddings=embeddings,
                host_logits=logits, host_embeddings=packed, finite=finite, done=None,
            )  # fmt: skip
        copies = DeviceOutputs(
            num_rows=num_rows,
            logits=logits,
            embeddings=embeddings,
            host_logits={task: _pinned_copy(logit_B) for task, logit_B in logits.items()},
            host_embeddings={name: _pinned_copy(packed_BW) for name, packed_BW in packed.items()},
            finite=_pinned_copy(finite),
            done=torch.cuda.Event(blocking=True),  # type: ignore[no-untyped-call] # waits without spinning
        )
        if copies.done is not None:
            copies.done.record(torch.cuda.current_stream(self.device))
        return copies

    def _packed(self, name: str, vectors_BD: torch.Tensor) -> torch.Tensor:
        """Give bytes (B, W) for the codecs that a device packs as numpy does, else the floats."""
        codec = self.manifest.outputs.embeddings[name].codec
        if codec == "float32":
            return _as_bytes(vectors_BD)
        if codec == "float16":
            return _as_bytes(vectors_BD.clamp(-FLOAT16_MAX, FLOAT16_MAX).half())
        return vectors_BD

    def _encoded(self, name: str, values: NDArray[Any]) -> NDArray[np.uint8]:
        return values if values.dtype == np.uint8 else encode(values, self.manifest.outputs.embeddings[name].codec)


def _as_bytes(vectors_BD: torch.Tensor) -> torch.Tensor:
    """Give (B, W) uint8. By way of a flat tensor: of a (B, 1) that counts as contiguous the last stride may be B."""
    flat = vectors_BD.contiguous().reshape(-1)
    return flat.view(torch.uint8).view(len(vectors_BD), vectors_BD.shape[1] * vectors_BD.element_size())


def choose_device(name: str) -> torch.device:
    """Give the device of that name; "auto" is CUDA where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_engine(folder: Path, manifest: Manifest, *, device: str = "auto", bf16: bool = False) -> TorchEngine:
    """Give a warm engine for a snapshot folder whose files were checked against the manifest.

    The archive is checked before torch opens it, and torch then refuses to unpickle anything but tensors.

    Raises:
        SnapshotError: The model or a vocabulary cannot be used, with every reason.
        OSError, MemoryError, torch.OutOfMemoryError: The machine could not; another time it may.
    """
    check_archive(folder / MODEL_FILE)
    vocabularies = read_vocabularies(folder, manifest)
    try:
        with _weights_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.11 says that the archive's bytes are not writable; nobody writes
            program = torch.export.load(str(folder / MODEL_FILE))
        engine = TorchEngine(program, manifest, vocabularies, device=choose_device(device), bf16=bf16)
        engine.warm_up()
    except (SnapshotError, *MACHINE_ERRORS):
        raise
    except ModelOutputError as error:
        raise SnapshotError(error.reasons) from error
    except Exception as error:  # torch names no family of errors for what a program may do
        raise SnapshotError([f"{MODEL_FILE} cannot be loaded and run: {first_line(error)}"]) from error
    return engine


def read_vocabularies(folder: Path, manifest: Manifest) -> dict[str, Vocabulary]:
    """Give the vocabularies that the inputs name, by file name.

    Raises:
        SnapshotError: A file is no vocabulary.
    """
    names = {wanted.encode.file for wanted in manifest.inputs if isinstance(wanted.encode, VocabularyEncode)}
    try:
        return {name: read_vocabulary(folder / name) for name in sorted(names)}
    except VocabularyError as error:
        raise SnapshotError([str(error)]) from None


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every torch.load of this process refuse to unpickle code, for as long as the model is read."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def _joined(parts: list[_Tensors]) -> _Tensors:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _pinned_copy(value: torch.Tensor) -> torch.Tensor:
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)
