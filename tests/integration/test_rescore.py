"""Examples that failed are tried again on wish, on both servers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from pyarrow import fs

from das_service.folder import Folder
from das_service.sink import rescore
from das_service.sink.rescore import Rescorer
from das_service.sink.rescore_plan import Gap, Plan, read_plan, with_gaps, write_plan
from das_service.tables.duck import Duck
from das_service.tables.offline_store import TablePlace
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


def test_a_dead_letter_whose_score_stands_online_alone_gets_it_in_its_table(
    feeding: Feeding, rescorer: Rescorer
) -> None:
    feeding.register("f", "s0")
    feeding.post_ids(0, 10)
    feeding.fail("f", ["e2", "e3"])
    sink = feeding.sink()
    feeding.run(sink)
    feeding.put_online("f", ["e3"], logit=1.5)  # scored since, and the log that had it was lost
    assert rescorer.replay_dead_letters("f") == 2
    feeding.run(sink)
    assert [(row["example_id"], row["click__logit"]) for row in feeding.rows("supervision/f")] == [("e3", 1.5)]
    assert [row["example_id"] for row in feeding.read_group("f", "rescore:f")] == ["e2"]


def test_a_plan_that_another_sink_has_changed_meanwhile_is_left_to_it(
    feeding: Feeding, rescorer: Rescorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeding.post_ids(0, 40, chunk_rows=1)
    feeding.run(feeding.sink())
    write_plan(feeding.folder, "ads", "f", Plan(gaps=(Gap(partition=0, first=0, last=3),), gap_rows=(4, 0)))
    whole = rescore.append_chunks
    left = Gap(partition=1, first=0, last=9)

    def taken_for_dead(*args: Any) -> Any:
        plan = read_plan(feeding.folder, "ads", "f")
        write_plan(feeding.folder, "ads", "f", with_gaps(plan, [left], [0, 10]))
        return whole(*args)

    monkeypatch.setattr(rescore, "append_chunks", taken_for_dead)
    assert rescorer.feed("f") is None
    assert left in read_plan(feeding.folder, "ads", "f").gaps


def test_off_this_machine_examples_are_fed_through_the_file_system_of_the_tables(
    feeding: Feeding, rescorer: Rescorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local file system that the tables are taken to be on a remote one with: DuckDB could not open its paths."""

    def remote(folder: Folder, dataset: str, table: str) -> TablePlace:
        uri = folder.uri_of(f"{dataset}/{table}")
        filesystem = fs.SubTreeFileSystem("/", fs.LocalFileSystem())
        return TablePlace(uri=uri, path=None, filesystem=filesystem, root=uri.removeprefix("/"), storage_options={})

    feeding.post([{"example_id": f"e{i}", "tags": ["x"], "image": b"12345678"} for i in range(6)])
    sink = feeding.sink()
    feeding.run(sink)
    old, more = feeding.spec, {"name": "more", "type": "float", "nullable": True}
    feeding.declare(old.model_validate({**old.model_dump(), "features": [*old.model_dump()["features"], more]}))
    feeding.post([{"example_id": f"e{i}", "more": 2.0} for i in range(6, 12)])
    feeding.fail("f", names(4, 8))
    feeding.score("f", ["e5"])
    feeding.run(sink)
    monkeypatch.setattr(rescore, "table_place", remote)
    rescorer._examples = rescore.TableReader(remote(feeding.folder, "ads", "examples"))
    rescorer._spec = feeding.spec
    assert rescorer.replay_dead_letters("f") == 3
    rows = {row["example_id"]: row for row in feeding.read_group("f", "rescore:f")}
    assert {name: (row["tags"], row["image"], row["more"]) for name, row in rows.items()} == {
        "e4": (["x"], b"12345678", None), "e6": (None, None, 2.0), "e7": (None, None, 2.0),
    }  # fmt: skip
    gaps = tuple(Gap(partition=p, first=0, last=100) for p in range(2))
    write_plan(feeding.folder, "ads", "f", Plan(gaps=gaps, gap_rows=(6, 6)))
    while rescorer.feed("f") is not None:
        pass
    assert sorted(row["example_id"] for row in feeding.read_group("f", "rescore:f")) == names(0, 12)
