"""The API over real servers."""

from collections.abc import Iterator

import pytest
import redis

from das_service.settings import Settings
from tests.conftest import Server
from tests.served import Api, Stand, serve


@pytest.fixture
def api(settings: Settings) -> Iterator[Api]:
    """The API in process, with the dataset `ads` declared."""
    with serve(settings) as api:
        api.declare()
        yield api


@pytest.fixture
def store(server: Server) -> Iterator[redis.Redis]:
    """A client of the server under test."""
    with server.client() as client:
        yield client


@pytest.fixture
def stand(api: Api, store: redis.Redis) -> Stand:
    """A stand-in for the worker of FM `f`, which is declared."""
    api.declare_fm()
    return Stand(api.settings, store)
