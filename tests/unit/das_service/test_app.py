"""`das api`: what it says on its start, and which addresses it refuses. No server is needed for either."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from das_service.app import describe_access
from das_service.settings import SettingsError, load_settings


def run_api(folder: Path, **variables: str) -> "subprocess.Popen[str]":
    """Start `das api`; its stderr can be read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DAS_")}
    return subprocess.Popen(
        [sys.executable, "-m", "das_service.cli", "api"], cwd=folder, env={**kept, **variables}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_an_api_without_tokens_says_on_its_start_that_it_is_for_this_machine_alone(tmp_path: Path) -> None:
    with run_api(tmp_path, DAS_BIND="127.0.0.1:0", DAS_REDIS_URL="redis://127.0.0.1:1/0") as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.kill()

    expected = "das api: http://127.0.0.1:0, for this machine alone: there are no tokens (DAS_TOKENS_FILE names them)"
    assert line == f"{expected}\n"


def test_an_api_without_tokens_refuses_an_open_address_in_one_sentence(tmp_path: Path) -> None:
    with run_api(tmp_path, DAS_BIND="0.0.0.0:8000") as process:
        _, told = process.communicate(timeout=60)

    assert process.returncode == 2
    assert told.startswith("das: DAS_BIND 0.0.0.0:8000 is reachable from other machines and there are no tokens")
    assert told.count("\n") == 1


def test_with_tokens_every_address_will_do(tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps([{"name": "me", "sha256": sha256(b"x").hexdigest(), "scopes": ["read"]}]))

    line = describe_access(load_settings({}, bind="0.0.0.0:8000", tokens_file=file))

    assert line == "http://0.0.0.0:8000, for callers with one of 1 tokens"


@pytest.mark.parametrize("bind", ["127.0.0.1", ":8000", "127.0.0.1:99999", "127.0.0.1:http", ""])
def test_an_address_is_host_and_port(bind: str) -> None:
    with pytest.raises(SettingsError, match="is not host:port"):
        describe_access(load_settings({}, bind=bind))
