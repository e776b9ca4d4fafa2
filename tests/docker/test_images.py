"""Each target's environment and role, without a container engine: installed, started, asked, ended."""

import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from das_service.up.embedded import free_port
from tests.conftest import Server
from tests.docker.compose import read_compose, target_of
from tests.docker.dockerfile import ROOT, Dockerfile
from tests.docker.images import installed

torch = pytest.importorskip("torch")

WAIT_SECONDS = 90.0
HAS_CPU_TORCH = "TORCH_INDEX" in os.environ or not torch.version.cuda
SERVICES = [
    pytest.param("api"),
    pytest.param("sink"),
    pytest.param(
        "worker",
        marks=pytest.mark.skipif(not HAS_CPU_TORCH, reason="pip finds no CPU build of torch; TORCH_INDEX names one"),
    ),
]


@pytest.fixture(scope="module")
def environments(dockerfile: Dockerfile, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder that stands for /opt/das of each service that is asked for."""
    made: dict[str, Path] = {}

    class Environments(dict[str, Path]):
        def __missing__(self, service: str) -> Path:
            builder = dockerfile.builder(target_of(read_compose()["services"][service]))
            if builder not in made:
                made[builder] = installed(dockerfile, builder, tmp_path_factory.mktemp("src"))
            return made[builder]

    return Environments()


class Container:
    """A role as its container runs it: the image's and the compose file's environment and command, nothing else."""

    def __init__(self, service: str, dockerfile: Dockerfile, environment: Path, server: Server, folder: Path) -> None:
        composed = read_compose()["services"][service]
        target = target_of(composed)
        self.port = free_port()
        (folder / "tokens.json").write_text(json.dumps([token_record("a-token")]))
        places = {
            "/opt/das": str(environment),
            "$PATH": "/usr/bin:/bin",
            "/run/secrets/tokens": str(folder / "tokens.json"),
            "/data": str(folder),
            "/log": str(server.folder),
            "//valkey:6379": f"//127.0.0.1:{server.port}",
            "0.0.0.0:8000": f"0.0.0.0:{self.port}",
            "0.0.0.0:9100": f"0.0.0.0:{self.port}",
        }
        self.environment = {
            name: replaced(value, places)
            for name, value in {**dockerfile.environment(target), **composed["environment"]}.items()
        }
        self._probe = dockerfile.exec_form(target, "HEALTHCHECK")
        command = [*dockerfile.exec_form(target, "ENTRYPOINT"), *composed["command"]]
        self._output = (folder / "output").open("w+")
        self.process = subprocess.Popen(
            [str(environment / "bin" / command[0]), *command[1:]], cwd=folder,
            env=self.environment, stdout=self._output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._python = environment / "bin" / self._probe[0]

    def is_healthy(self) -> bool:
        """Ask as HEALTHCHECK does."""
        probe = [str(self._python), *self._probe[1:]]
        done = subprocess.run(probe, env=self.environment, capture_output=True, timeout=30, check=False)
        return done.returncode == 0

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.is_healthy():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()

    def stop(self) -> int:
        """End it as `docker stop` does, and give its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_SECONDS)

    def output(self) -> str:
        self._output.seek(0)
        return self._output.read()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._output.close()


def token_record(token: str) -> dict[str, Any]:
    return {"name": "t", "sha256": hashlib.sha256(token.encode()).hexdigest(), "scopes": ["ingest", "read", "admin"]}


def replaced(text: str, places: dict[str, str]) -> str:
    """Put the places of this machine for those in a container."""
    return re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], text)


@pytest.fixture(params=SERVICES)
def container(
    request: pytest.FixtureRequest,
    dockerfile: Dockerfile,
    environments: dict[str, Path],
    valkey: Server,
    tmp_path: Path,
) -> Iterator[Container]:
    running = Container(request.param, dockerfile, environments[request.param], valkey, tmp_path)
    yield running
    running.close()


def run_python(environment: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(environment / "bin" / "python"), "-I", "-c", program],
        capture_output=True, text=True, timeout=WAIT_SECONDS, check=False,
    )  # fmt: skip


def test_the_role_turns_healthy_and_ends_on_sigterm(container: Container) -> None:
    container.wait_until_healthy()

    assert "das_build_info" in httpx.get(f"http://127.0.0.1:{container.port}/metrics").text
    assert container.stop() == 0, container.output()
    assert not container.is_healthy()


def test_the_api_asks_for_a_token_and_finds_the_server_durable(
    dockerfile: Dockerfile, environments: dict[str, Path], valkey: Server, tmp_path: Path
) -> None:
    api = Container("api", dockerfile, environments["api"], valkey, tmp_path)
    try:
        api.wait_until_healthy()
        with httpx.Client(base_url=f"http://127.0.0.1:{api.port}") as http:
            refused = http.get("/v1/datasets")
            taken = http.get("/v1/datasets", headers={"Authorization": "Bearer a-token"})
            metrics = http.get("/metrics").text
    finally:
        api.close()
    assert (refused.status_code, taken.status_code) == (401, 200)
    assert 'das_log_durability_info{mode="fsync"} 1.0' in metrics


@pytest.mark.parametrize("service", ["api", "sink"])
def test_there_is_no_torch_where_nothing_is_scored(environments: dict[str, Path], service: str) -> None:
    done = run_python(environments[service], "import torch")
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'torch'"


@pytest.mark.parametrize("service", SERVICES)
def test_every_installed_version_is_the_pinned_one(environments: dict[str, Path], service: str) -> None:
    program = "import importlib.metadata as m; print('\\n'.join(f'{d.name}=={d.version}' for d in m.distributions()))"
    found = set(map(canonical, run_python(environments[service], program).stdout.split()))
    pinned = set(map(canonical, (ROOT / "constraints.txt").read_text().splitlines()))

    assert found - pinned == {"das-service==0.1.0"}


def canonical(pin: str) -> str:
    """Give a pin with the name as the package index writes it, without the version's build suffix."""
    name, _, version = pin.partition("==")
    return f"{re.sub('[-_.]+', '-', name).lower()}=={version.partition('+')[0]}"


def test_the_cuda_image_is_built_as_the_cpu_image_is_but_for_where_torch_comes_from(dockerfile: Dockerfile) -> None:
    cpu, cuda = (
        [rest for word, rest in dockerfile.build_steps(f"worker-{kind}-build") if "torch.version" not in rest]
        for kind in ("cpu", "cuda")
    )
    assert [rest.replace('${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ', "") for rest in cpu] == cuda
