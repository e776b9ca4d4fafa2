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
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from das_service.snapshot_folder import SnapshotError
from fm_inference.verdict import snapshot_reasons
from schemas.dataset import DatasetSpec
from schemas.snapshot import OutputColumns

log = logging.getLogger(__name__)

DEADLINE_SECONDS = 300.0
FILE_MAX_BYTES = 1 << 20  # torch tries whether it can write a temporary file
_PASSED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME",
    "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
)  # fmt: skip


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
) -> list[str]:
    """Give every reason why a worker cannot use this snapshot folder; empty if it can.

    `sha256` is the announced hex digest of snapshot.json; `fixed_outputs` are those of the FM's first snapshot. Waits
    for the child at most deadline_seconds, then kills it with all that it started.
    """
    request = Request(
        folder=folder.absolute(), spec=spec, fm=fm, snapshot_id=snapshot_id, sha256=sha256.removeprefix("sha256:"),
        fixed_outputs=fixed_outputs, device=device, bf16=bf16,
    )  # fmt: skip
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "fm_inference.validate"]
    pipe = subprocess.PIPE
    with subprocess.Popen(  # noqa: S603 - our own interpreter and module
        command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=root, env=_child_environment(root), start_new_session=True
    ) as child:
        try:
            verdict, said = child.communicate(request.model_dump_json().encode(), timeout=deadline_seconds)
        except subprocess.TimeoutExpired:
            return [f"the model was not loaded and tried within {deadline_seconds:g} seconds"]
        finally:
            with suppress(ProcessLookupError):  # the session is empty, as it should be
                os.killpg(child.pid, signal.SIGKILL)
    return _read_verdict(child.returncode, verdict, said)


def _child_environment(root: Path) -> dict[str, str]:
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return passed | {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _read_verdict(returncode: int, verdict: bytes, said: bytes) -> list[str]:
    if returncode < 0:
        return [f"the model ended the process (signal {-returncode}, {signal.Signals(-returncode).name})"]
    try:
        reasons = json.loads(verdict)["reasons"]
    except (ValueError, KeyError, TypeError):
        log.exception("validation ended with exit code %d: %s", returncode, said[-2000:].decode(errors="replace"))
        return [f"validation ended with exit code {returncode} and no verdict; the worker's log says more"]
    return [str(reason) for reason in reasons]


def main() -> None:
    """Judge the request on standard input; the verdict is all that reaches standard output."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_MAX_BYTES, FILE_MAX_BYTES))
    request = Request.model_validate_json(sys.stdin.buffer.read())
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
    except SnapshotError as error:
        reasons = error.reasons
    answer.write(json.dumps({"reasons": reasons}))
    answer.flush()


if __name__ == "__main__":
    main()
