"""The files under docker/, and the server that its compose file describes."""

from collections.abc import Iterator

import pytest

from das_service.up.embedded import find_server, free_port
from tests.conftest import Server
from tests.docker.compose import read_compose
from tests.docker.dockerfile import Dockerfile, read_dockerfile


@pytest.fixture(scope="session")
def dockerfile() -> Dockerfile:
    return read_dockerfile()


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the arguments of the compose file: the program is another, the address and the folder are."""
    words = read_compose()["services"]["valkey"]["command"]
    arguments = {name.removeprefix("--"): value for name, value in zip(words[1::2], words[2::2], strict=True)}
    server = Server(
        program=find_server(), folder=tmp_path_factory.mktemp("valkey"), port=free_port(), arguments=arguments
    )
    server.start()
    yield server
    server.stop()
