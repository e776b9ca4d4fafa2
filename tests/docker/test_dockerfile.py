"""What the images promise can be read off the Dockerfile: its lint, its user, its context, its signals, its secrets."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.dockerfile import DOCKERFILE, ROOT, TARGETS, Dockerfile
from tests.docker.images import copied

HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent)


@pytest.mark.skipif(HADOLINT is None, reason="there is no hadolint wheel for this system")
def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([str(HADOLINT), str(DOCKERFILE)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_the_role_is_not_root_and_no_shell_stands_before_it(dockerfile: Dockerfile, target: str) -> None:
    assert dockerfile.all(target, "USER") == ["10001"]
    assert dockerfile.exec_form(target, "ENTRYPOINT") == ["das"]
    assert dockerfile.exec_form(target, "CMD") == [target.partition("-")[0]]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_what_its_builder_installed_and_nothing_else(dockerfile: Dockerfile, target: str) -> None:
    assert dockerfile.all(target, "COPY") == [f"--from={dockerfile.builder(target)} /opt/das /opt/das"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_package_comes_from_the_pinned_versions(dockerfile: Dockerfile, target: str) -> None:
    lines = [rest for word, rest in dockerfile.build_steps(dockerfile.builder(target)) if word == "RUN"]
    installs = [line for line in lines if " install " in line]
    assert installs
    assert [line for line in installs if " -c constraints.txt " not in line] == []


def test_the_build_sees_what_it_copies_and_nothing_else(dockerfile: Dockerfile) -> None:
    seen = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    needed = {path.relative_to(ROOT).as_posix() for path in copied(dockerfile, "worker-cpu-build")}
    assert seen[0] == "*"
    assert {line.removeprefix("!") for line in seen if line.startswith("!")} == needed
    assert [line for line in seen if not line.startswith("!")] == ["*", "**/__pycache__"]


def test_no_layer_is_given_a_secret(dockerfile: Dockerfile) -> None:
    given = [rest for stage in dockerfile.stages.values() for word, rest in stage.lines if word in ("ARG", "ENV")]
    assert [words for words in given if re.search("token|password|secret|redis_url", words, re.IGNORECASE)] == []
    assert [words for words in given if words.startswith("TORCH_INDEX") and words != 'TORCH_INDEX=""'] == []
