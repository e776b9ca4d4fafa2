"""The verdict on a published snapshot, reached in a child process: a model is somebody else's program.

The child has its own session and no core dumps, may write no large files, and sees no setting or secret of the service.
Run as `python -m fm_inference.validate` it reads one request as JSON from standard input and writes one verdict.
"""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

import das_service.up.leash
from das_service.snapshot_folder import SnapshotError, read_manifest
from fm_inference.engine import MACHINE_ERRORS, TorchEngine, load_engine
from fm_inference.gate import judge_gate, measure
from fm_inference.outputs import first_line
from fm_inference.verdict import snapshot_reasons
from schemas.dataset import DatasetSpec
from schemas.gates import SnapshotGates, TaskGate
from schemas.snapshot import OutputColumns

log = logging.getLogger(__name__)

DEADLINE_SECONDS = 300.0
_LOOK_SECONDS = 0.5
FILE_MAX_BYTES = 1 << 20  # torch tries whether it can write a temporary file
_PASSED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME",
    "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
)  # fmt: skip


class NoVerdictError(Exception):
    """The machine or the store failed, or the worker stops: nothing is said about the snapshot."""


class Comparison(BaseModel):
    """What a snapshot that is good in itself is compared with: the active one, on a slice of labelled rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    sha256: str
    active_id: str
    active_folder: Path
    active_sha256: str
    slice: Path
    gates: SnapshotGates
    device: str
    bf16: bool


class Compared(BaseModel):
    """Why the bands do not hold, with the numbers; and what was measured by task. note: why nothing was."""

    model_config = ConfigDict(frozen=True)

    reasons: tuple[str, ...] = ()
    tasks: dict[str, TaskGate] = {}
    note: str = ""


class Request(BaseModel):
    """What the child is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    spec: DatasetSpec
    fm: str
    snapshot_id: str
    sha256: str
    fixed_outputs: OutputColumns | None
    device: str
    bf16: bool


def validate_snapshot(  # noqa: PLR0913 - a snapshot is judged against all of these
    folder: Path,
    spec: DatasetSpec,
    *,
    fm: str,
    snapshot_id: str,
    sha256: str,
    fixed_outputs: OutputColumns | None = None,
    device: str = "auto",
    bf16: bool = False,
    deadline_seconds: float = DEADLINE_SECONDS,
    is_stopping: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Give every reason why a worker cannot use this snapshot folder; empty if it can.

    `sha256` is the announced hex digest of snapshot.json; `fixed_outputs` are those of the FM's first snapshot. Waits
    for the child at most deadline_seconds, or until is_stopping, then kills it with all that it started. The child ends
    with this process, however that ends (Linux).

    Raises:
        NoVerdictError: The snapshot could not be judged; another time it may be.
        OSError: The child can't be started.
    """
    request = Request(
        folder=folder.absolute(), spec=spec, fm=fm, snapshot_id=snapshot_id, sha256=sha256.removeprefix("sha256:"),
        fixed_outputs=fixed_outputs, device=device, bf16=bf16,
    )  # fmt: skip
    question = Question(request=request)
    try:
        returncode, verdict, said = _run_child(question, deadline_seconds=deadline_seconds, is_stopping=is_stopping)
    except subprocess.TimeoutExpired:
        return [f"the model was not loaded and tried within {deadline_seconds:g} seconds"]
    return _read_verdict(returncode, verdict, said)


def compare_snapshot(
    comparison: Comparison,
    *,
    deadline_seconds: float = DEADLINE_SECONDS,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Compared:
    """Give how a snapshot does beside the active one, and why the dataset's bands do not hold; in a child process too.

    Raises:
        NoVerdictError: It could not be said; another time it may be.
        OSError: The child can't be started.
    """
    question = Question(comparison=comparison)
    try:
        returncode, verdict, said = _run_child(question, deadline_seconds=deadline_seconds, is_stopping=is_stopping)
    except subprocess.TimeoutExpired:
        return Compared(
            reasons=(
                f"the recent labelled rows were not scored within {deadline_seconds:g} seconds by it and the active "
                "snapshot: let snapshot_gates.slice_rows be smaller",
            )
        )
    reasons = _read_verdict(returncode, verdict, said)
    return Compared(reasons=tuple(reasons)) if returncode < 0 else Compared.model_validate_json(verdict)


class Question(BaseModel):
    """What the child is asked: one of the two."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    request: Request | None = None
    comparison: Comparison | None = None


def _run_child(
    asked: Question, *, deadline_seconds: float, is_stopping: Callable[[], bool]
) -> tuple[int, bytes, bytes]:
    """Give the child's exit code and what it wrote to its standard output and error.

    Raises:
        subprocess.TimeoutExpired: It was not done in time, and is killed with all that it started.
    """
    root = Path(__file__).parents[1]
    leash = [sys.executable, "-I", "-S", das_service.up.leash.__file__, str(os.getpid()), str(int(signal.SIGKILL))]
    command = [*leash, sys.executable, "-m", "fm_inference.validate"]
    pipe = subprocess.PIPE
    with subprocess.Popen(  # noqa: S603 - our own interpreter and module
        command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=root, env=_child_environment(root), start_new_session=True
    ) as child:
        try:
            question = asked.model_dump_json().encode()
            verdict, said = _ask(child, question, deadline_seconds=deadline_seconds, is_stopping=is_stopping)
        finally:
            with suppress(ProcessLookupError):  # the session is empty, as it should be
                os.killpg(child.pid, signal.SIGKILL)
    return child.returncode, verdict, said


def _ask(
    child: "subprocess.Popen[bytes]", question: bytes, *, deadline_seconds: float, is_stopping: Callable[[], bool]
) -> tuple[bytes, bytes]:
    """Give what the child wrote to its standard output and error."""
    deadline = time.monotonic() + deadline_seconds
    asked: bytes | None = question
    while True:
        try:
            return child.communicate(asked, timeout=min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            if is_stopping():
                raise NoVerdictError("the worker that tried it was stopped") from None
            if time.monotonic() >= deadline:
                raise
        asked = None  # the rest of it is on its way


def _child_environment(root: Path) -> dict[str, str]:
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return passed | {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _read_verdict(returncode: int, verdict: bytes, said: bytes) -> list[str]:
    if returncode < 0:
        return [f"the model ended the process (signal {-returncode}, {signal.Signals(-returncode).name})"]
    try:
        answer = json.loads(verdict)
    except ValueError:
        log.error("validation ended with exit code %d: %s", returncode, said[-2000:].decode(errors="replace"))  # noqa: TRY400
        raise NoVerdictError(
            f"validation ended with exit code {returncode} and no verdict; the worker's log says more"
        ) from None
    if "trouble" in answer:
        raise NoVerdictError(str(answer["trouble"]))
    return [str(reason) for reason in answer.get("reasons", ())]


def main() -> None:
    """Judge the request on standard input; the verdict is all that reaches standard output."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_MAX_BYTES, FILE_MAX_BYTES))
    asked = Question.model_validate_json(sys.stdin.buffer.read())
    answer: dict[str, object]
    try:
        answer = _compare(asked.comparison) if asked.comparison else _judge(asked.request)
    except SnapshotError as error:
        answer = {"reasons": error.reasons}
    except MACHINE_ERRORS as error:
        answer = {"trouble": f"{type(error).__name__}: {error}"}
    output.write(json.dumps(answer))
    output.flush()


def _judge(request: Request | None) -> dict[str, object]:
    if request is None:
        raise SnapshotError(["nothing was asked"])
    reasons = snapshot_reasons(
        request.folder,
        request.spec,
        fm=request.fm,
        snapshot_id=request.snapshot_id,
        sha256=request.sha256,
        fixed_outputs=request.fixed_outputs,
        device=request.device,
        bf16=request.bf16,
    )
    return {"reasons": reasons}


def _compare(asked: Comparison) -> dict[str, object]:
    """Score the slice with both snapshots. A model that fails on real rows is a reason."""

    def load(folder: Path, sha256: str) -> TorchEngine:
        return load_engine(folder, read_manifest(folder, sha256=sha256), device=asked.device, bf16=asked.bf16)

    candidate = load(asked.folder, asked.sha256)
    try:
        active = load(asked.active_folder, asked.active_sha256)
    except SnapshotError as error:
        return {"note": f"the active snapshot can't be compared with: {error}"}
    outputs = candidate.manifest.outputs
    try:
        fits = measure({"it": candidate, "active": active}, asked.slice, tuple(outputs.logits))
    except MACHINE_ERRORS:
        raise
    except Exception as error:  # noqa: BLE001 - a model may raise anything, and that is its team's to know
        return {"reasons": [f"the recent labelled rows can't be scored: {first_line(error)}"]}
    reasons, measured = judge_gate(fits["it"], fits["active"], asked.gates, active_id=asked.active_id)
    return {"reasons": reasons, "tasks": {task: gate.model_dump(mode="json") for task, gate in measured.items()}}


if __name__ == "__main__":
    main()
