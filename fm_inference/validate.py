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
from das_service.snapshot_folder import SnapshotError
from fm_inference.engine import MACHINE_ERRORS
from fm_inference.verdict import snapshot_reasons
from schemas.dataset import DatasetSpec
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
    root = Path(__file__).parents[1]
    leash = [sys.executable, "-I", "-S", das_service.up.leash.__file__, str(os.getpid()), str(int(signal.SIGKILL))]
    command = [*leash, sys.executable, "-m", "fm_inference.validate"]
    pipe = subprocess.PIPE
    with subprocess.Popen(  # noqa: S603 - our own interpreter and module
        command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=root, env=_child_environment(root), start_new_session=True
    ) as child:
        try:
            question = request.model_dump_json().encode()
            verdict, said = _ask(child, question, deadline_seconds=deadline_seconds, is_stopping=is_stopping)
        except subprocess.TimeoutExpired:
            return [f"the model was not loaded and tried within {deadline_seconds:g} seconds"]
        finally:
            with suppress(ProcessLookupError):  # the session is empty, as it should be
                os.killpg(child.pid, signal.SIGKILL)
    return _read_verdict(child.returncode, verdict, said)


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
    return [str(reason) for reason in answer["reasons"]]


def main() -> None:
    """Judge the request on standard input; the verdict is all that reaches standard output."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_MAX_BYTES, FILE_MAX_BYTES))
    request = Request.model_validate_json(sys.stdin.buffer.read())
    answer: dict[str, object]
    try:
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
        answer = {"reasons": reasons}
    except SnapshotError as error:
        answer = {"reasons": error.reasons}
    except MACHINE_ERRORS as error:
        answer = {"trouble": f"{type(error).__name__}: {error}"}
    output.write(json.dumps(answer))
    output.flush()


if __name__ == "__main__":
    main()
