"""The API over real servers, and logs that are fed by hand."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from das_service.settings import Settings
from tests.conftest import Server, make_settings
from tests.feeding import Feeding
from tests.served import Api, Stand, serve
from tests.training import Trained


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


@pytest.fixture
def feeding_with(server: Server, tmp_path: Path, store: redis.Redis) -> Iterator[Callable[..., Feeding]]:
    """Gives the dataset with other settings."""
    made = []

    def make(**overrides: Any) -> Feeding:
        made.append(Feeding(make_settings(server, tmp_path, **{"commit_seconds": 0.5, **overrides}), store))
        return made[-1]

    yield make
    for feeding in made:
        feeding.close()


@pytest.fixture
def feeding(feeding_with: Callable[..., Feeding]) -> Feeding:
    """A dataset whose logs are fed by hand, and the sink that empties them."""
    return feeding_with()


@pytest.fixture
def trained(api: Api, store: redis.Redis) -> Iterator[Trained]:
    """A dataset that is fed, scored and closed as the test says."""
    found = Trained(api, store)
    yield found
    found.stop()
