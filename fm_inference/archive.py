"""The check of a model.pt2 before torch loads it: what is in the zip, and that nothing in it becomes code.

torch.export.load is made for files that one trusts. It unpickles weights, constants, sample inputs and custom objects;
it gives symbolic expressions to sympy, which evaluates them; it writes node and argument names into Python source,
which it executes; it resolves any dotted name below `torch` as an operator; and some operators read or write files. So
the members are on an allow-list, nothing may be pickled, and every string of the program is of a kind that cannot be
more than a name (fm_inference.program_text).

The two readers could disagree on a crafted zip: the members that are checked here with Python's zipfile are compared
with what torch's own reader finds. What stays trusted: the kernels of the allowed operators, and torch's reader of
plain tensors. They run in a child process first (fm_inference.validate).

Source: torch/export/pt2_archive/_package.py, torch/_export/serde/serialize.py, torch/export/_unlift.py of torch 2.13.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from das_service.snapshot_folder import SnapshotError
from fm_inference.program_text import text_reasons
from schemas.snapshot import MODEL_FILE

PROGRAM_MAX_BYTES = 256 << 20
MAX_MEMBERS = 100_000
_SAID_REASONS = 20
_PROGRAM = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_SMALL = ("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id")
_TENSOR = re.compile(r"data/weights/weight_[0-9]{1,6}|data/constants/tensor_[0-9]{1,6}")
_ROOT = re.compile(r"[A-Za-z0-9_.-]{1,128}")


class ArchiveError(SnapshotError):
    """A model.pt2 that is not loaded, and why."""


def check_archive(path: Path) -> None:
    """Check that torch may load the archive: it holds one plain program and plain tensors.

    Raises:
        ArchiveError: With up to 20 reasons.
    """
    reasons: list[str] = []
    try:
        with zipfile.ZipFile(path) as archive:
            root, members = _members(archive, path.stat().st_size, reasons)
            if not reasons:
                texts = {name: archive.read(f"{root}/{name}") for name in (_PROGRAM, *_CONFIGS)}
                reasons += _config_reasons(texts, members)
                reasons += text_reasons(_json(texts[_PROGRAM]))
        if not reasons:
            reasons += _reader_reasons(path, members, texts)
    except (zipfile.BadZipFile, OSError, ValueError, RecursionError, NotImplementedError, RuntimeError) as error:
        reasons.append(f"it cannot be read as a PT2 archive: {type(error).__name__}")
    if reasons:
        raise ArchiveError([f"{MODEL_FILE}: {reason}" for reason in reasons[:_SAID_REASONS]])


def _members(archive: zipfile.ZipFile, archive_bytes: int, reasons: list[str]) -> tuple[str, dict[str, int]]:
    """Give the root folder and each member's size; what must not be there goes to `reasons`."""
    entries = archive.infolist()
    if not entries or len(entries) > MAX_MEMBERS:
        reasons.append(f"it holds {len(entries)} files, not 1 to {MAX_MEMBERS}")
        return "", {}
    root = entries[0].filename.split("/")[0]
    if not _ROOT.fullmatch(root) or root in (".", ".."):
        reasons.append("its root folder has no plain name")
    members: dict[str, int] = {}
    for entry in entries:
        name = entry.filename.removeprefix(f"{root}/")
        if name == entry.filename or not _is_allowed(name) or name in members:
            reasons.append(f"it holds {_shown(entry.filename)}, which has no place in it or is there twice")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            reasons.append(f"{_shown(name)} is compressed or encrypted; torch.export.save does neither")
        members[name] = entry.file_size
    reasons += _size_reasons(members, archive_bytes)
    return root, members


def _size_reasons(members: dict[str, int], archive_bytes: int) -> list[str]:
    reasons = [f"it has no {name}" for name in (_PROGRAM, *_CONFIGS, _SAMPLES, *_SMALL[:2]) if name not in members]
    if sum(members.values()) > archive_bytes:
        reasons.append("its members add up to more than the file itself")
    if members.get(_SAMPLES):
        reasons.append("it holds sample inputs, which are a pickle; fm_inference.export_snapshot leaves them out")
    if any(members.get(name, 0) > PROGRAM_MAX_BYTES for name in (_PROGRAM, *_CONFIGS)):
        reasons.append(f"its program or a list of its tensors is larger than {PROGRAM_MAX_BYTES} bytes")
    return reasons


def _is_allowed(name: str) -> bool:
    return name in (_PROGRAM, _SAMPLES, *_CONFIGS, *_SMALL) or _TENSOR.fullmatch(name) is not None


def _config_reasons(texts: dict[str, bytes], members: dict[str, int]) -> list[str]:
    """Check the two lists that say which member holds which tensor."""
    reasons = []
    for name in _CONFIGS:
        folder = name.rsplit("/", 1)[0]
        content = _json(texts[name])
        entries = content.get("config") if isinstance(content, dict) else None
        if not isinstance(entries, dict):
            reasons.append(f"{name} is not a list of tensors")
            continue
        for tensor, entry in entries.items():
            if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
                reasons.append(f"{name}: {_shown(tensor)} is pickled; only plain tensors are taken")
            elif f"{folder}/{entry.get('path_name')}" not in members or not isinstance(entry.get("tensor_meta"), dict):
                reasons.append(f"{name}: {_shown(tensor)} is in no member of the archive")
        reasons += text_reasons(content)
    return reasons


def _reader_reasons(path: Path, members: dict[str, int], texts: dict[str, bytes]) -> list[str]:
    """Check that torch's reader sees the archive that was checked."""
    reader: Any = torch._C.PyTorchFileReader(str(path))  # noqa: SLF001 - what torch.export.load reads with
    same = set(reader.get_all_records()) == set(members)
    same = same and all(reader.get_record(name) == text for name, text in texts.items())
    same = same and len(reader.get_record(_SAMPLES)) == 0
    return [] if same else ["two readers of the zip format disagree on its content"]


def _json(text: bytes) -> object:
    """Give the parsed text.

    Raises:
        ValueError: It is not JSON, or an object has a key twice.
    """
    content: object = json.loads(text, object_pairs_hook=_without_repeats)
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is there twice")
    return content


def _shown(name: str) -> str:
    return ascii(name[:80])
