"""The environments that the Dockerfile's install lines make, made by these very lines without a container engine."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.docker.dockerfile import ROOT, Dockerfile

INSTALL_SECONDS = 900.0


def installed(dockerfile: Dockerfile, builder: str, scratch: Path) -> Path:
    """Give the environment that a stage builds, as a folder.

    It is kept in .venv under the name of what it depends on, so that a second run installs nothing and needs no
    network; what changes more often, our own sources, is then copied into it as the wheel would put it there.
    """
    folder = ROOT / ".venv" / f"docker-{builder}-{_stamp(dockerfile, builder)}"
    if not (folder / "complete").exists():
        for former in folder.parent.glob(f"docker-{builder}-*"):
            shutil.rmtree(former)
        _build(dockerfile, builder, folder, scratch)
        (folder / "complete").touch()
    (packages,) = folder.glob("lib/python3*/site-packages")
    for source in filter(Path.is_dir, copied(dockerfile, builder)):
        shutil.rmtree(packages / source.name)
        shutil.copytree(source, packages / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def copied(dockerfile: Dockerfile, builder: str) -> list[Path]:
    """Give the files and folders of the build context that a stage sees."""
    steps = [shlex.split(rest)[:-1] for word, rest in dockerfile.build_steps(builder) if word == "COPY"]
    return [ROOT / source for sources in steps for source in sources]


def _stamp(dockerfile: Dockerfile, builder: str) -> str:
    files = [path.read_text() for path in copied(dockerfile, builder) if path.suffix in (".toml", ".txt")]
    told = [sys.version, os.environ.get("TORCH_INDEX", ""), *map(str, dockerfile.build_steps(builder)), *files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:12]


def _build(dockerfile: Dockerfile, builder: str, folder: Path, scratch: Path) -> None:
    """Do what the stage's COPY and RUN say, with the folder for /opt/das and scratch for /src."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DAS_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PIP_NO_INPUT": "1"}
    for word, rest in dockerfile.build_steps(builder):
        if word == "COPY":
            *sources, target = shlex.split(rest)
            for source in sources:
                _copy(ROOT / source, scratch / target / ("" if (ROOT / source).is_dir() else source))
        else:
            command = json.loads(rest) if rest.startswith("[") else ["sh", "-ec", rest.split("/root/.cache/pip ")[-1]]
            command = [part.replace("/opt/das", str(folder)) for part in command]
            done = subprocess.run(
                command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=INSTALL_SECONDS,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{rest}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)
