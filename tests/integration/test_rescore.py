"""Examples that failed are tried again on wish, on both servers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from das_service.sink.rescore import Rescorer
from das_service.tables.duck import Duck
from tests.conftest import Server, make_settings
from tests.feeding import DAY_US, NOON_US, Feeding, names


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    with server.client() as client:
        yield client


@pytest.fixture
def feeding(server: Server, tmp_path: Path, client: redis.Redis) -> Iterator[Feeding]:
    feeding = Feeding(make_settings(server, tmp_path, commit_seconds=0.5), client)
    feeding.declare_fm("f")
    yield feeding
    feeding.close()


@pytest.fixture
def rescorer(feeding: Feeding) -> Iterator[Rescorer]:
    duck = Duck(memory_bytes=64 << 20, threads=1)
    yield Rescorer(feeding.client, feeding.folder, duck, dataset="ads", spec=feeding.spec, epoch=1)
    duck.close()


def test_dead_letters_that_were_not_scored_since_are_tried_again(feeding: Feeding, rescorer: Rescorer) -> None:
    feeding.post([{"example_id": f"e{i}", "price": float(i), "tags": ["x"], "image": b"12345678"} for i in range(10)])
    feeding.post_ids(10, 15, event_time=NOON_US + DAY_US)
    feeding.fail("f", names(0, 6))
    feeding.fail("f", ["e12"], event_time=NOON_US + DAY_US)
    feeding.score("f", ["e1", "e8"])
    feeding.run(feeding.sink())
    assert rescorer.replay_dead_letters("f") == 6
    rows = {row["example_id"]: row for row in feeding.read_group("f", "rescore:f")}
    assert sorted(rows) == ["e0", "e12", "e2", "e3", "e4", "e5"]
    assert (rows["e3"]["price"], rows["e3"]["tags"], rows["e3"]["image"]) == (3.0, ["x"], b"12345678")


def test_only_the_wished_dead_letters_are_tried_again(feeding: Feeding, rescorer: Rescorer) -> None:
    feeding.post_ids(0, 10)
    feeding.fail("f", names(0, 6))
    feeding.run(feeding.sink())
    assert rescorer.replay_dead_letters("f", example_ids=["e2", "e9"]) == 1
    assert [row["example_id"] for row in feeding.read_group("f", "rescore:f")] == ["e2"]


def test_nothing_is_tried_again_where_nothing_failed(feeding: Feeding, rescorer: Rescorer) -> None:
    assert (rescorer.replay_dead_letters("f"), rescorer.feed("f")) == (0, None)
