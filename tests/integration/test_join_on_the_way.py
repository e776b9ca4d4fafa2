"""Rows whose supervision is not in the tables yet: the join looks them up online, and says the same once they are."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from das_service.errors import UnavailableError
from das_service.logs.records import dead_log, scored_log
from das_service.registry import read_catalog
from das_service.settings import Settings
from das_service.supervision.answer import LookupQuery
from das_service.supervision.augment_files import augment_files, list_sources
from das_service.supervision.join import OfflineJoin
from das_service.supervision.windows import iter_windows
from das_service.tables.duck import Duck
from schemas import keys
from tests.conftest import Server, make_settings
from tests.feeding import DAY_US, NOON, NOON_US, OUTPUTS, Feeding, names
from tests.joining import batches_of, caller_table, files_of
from tests.served import Stand

VALUES = ("f__snapshot_id", "f__trained_through", "f__scored_at", "f__click__logit", "f__hidden")


@pytest.fixture
def client(server: Server) -> Iterator[redis.Redis]:
    with server.client() as client:
        yield client


@pytest.fixture
def feeding(settings: Settings, client: redis.Redis) -> Iterator[Feeding]:
    """The dataset `ads` with an FM `f` that has a snapshot, and a sink that runs when it is told to."""
    feeding = Feeding(settings, client)
    feeding.declare_fm("f")
    yield feeding
    feeding.close()


@pytest.fixture
def stand(feeding: Feeding) -> Stand:
    stand = Stand(feeding.settings, feeding.client)
    stand.validate("s1", trained_through=NOON)
    return stand


@pytest.fixture(scope="module")
def duck() -> Iterator[Duck]:
    duck = Duck(memory_bytes=256 * 1024 * 1024, joins_as_written=True)
    yield duck
    duck.close()


def joined(
    feeding: Feeding, duck: Duck, ids: Sequence[str], *, time: int = NOON_US, client: redis.Redis | None = None
) -> list[dict[str, Any]]:
    """Give what a join that begins now says of rows of one time, with the online store unless there is another."""
    join = begun(feeding, duck, client=client or feeding.client)
    return rows_of(join, ids, time=time)


def begun(feeding: Feeding, duck: Duck, *, client: redis.Redis | None) -> OfflineJoin:
    return OfflineJoin(
        duck, feeding.folder, read_catalog(feeding.client), "ads", LookupQuery(fms=("f",)), client=client
    )


def rows_of(join: OfflineJoin, ids: Sequence[str], *, time: int = NOON_US) -> list[dict[str, Any]]:
    rows = batches_of(caller_table([(name, time) for name in ids]), batch_rows=7)
    windows = iter_windows(rows, most_rows=10, granularity="day")
    return pa.concat_tables([join.join(window).columns for window in windows]).to_pylist()


def statuses(rows: list[dict[str, Any]]) -> list[str]:
    return [row["f__status"] for row in rows]


def committed(feeding: Feeding) -> None:
    feeding.run(feeding.sink())
    assert feeding.kept_rows(scored_log("f")) == feeding.kept_rows(dead_log("f")) == 0


def test_rows_that_are_scored_and_not_committed_are_present_with_the_same_values_as_after(
    feeding: Feeding, stand: Stand, duck: Duck
) -> None:
    feeding.post({"example_id": f"e{i}", "price": float(i)} for i in range(30))
    stand.work()
    ids = [*names(5, 30), "nobody", "e7", "e7"]

    before = joined(feeding, duck, ids)
    committed(feeding)
    feeding.client.delete(*feeding.client.keys("*=f:*"))

    assert [row["f__click__logit"] for row in before[-4:]] == [9.0, None, 7.0, 7.0]
    assert joined(feeding, duck, ids) == before
    assert statuses(before) == ["present"] * 25 + ["missing", "present", "present"]


def test_unscored_rows_are_pending_until_they_are_scored(feeding: Feeding, stand: Stand, duck: Duck) -> None:
    feeding.post_ids(0, 40)
    assert set(statuses(joined(feeding, duck, names(0, 40)))) == {"pending"}

    feeding.read_group("f", acknowledge=False)
    assert set(statuses(joined(feeding, duck, names(0, 40)))) == {"pending"}


def test_rows_of_an_fm_without_a_snapshot_are_pending(feeding: Feeding, duck: Duck) -> None:
    feeding.declare_fm("f", outputs=None)
    feeding.post_ids(0, 40)

    assert joined(feeding, duck, names(0, 40)) == [{"f__status": "pending"}] * 40


def test_some_rows_in_the_tables_some_online_some_waiting(feeding: Feeding, stand: Stand, duck: Duck) -> None:
    feeding.post_ids(0, 20, price=1.0)
    stand.work()
    committed(feeding)
    feeding.post_ids(20, 40, price=2.0)
    stand.work()
    feeding.post_ids(40, 60)

    rows = joined(feeding, duck, [*names(0, 20), *names(20, 40), *names(40, 60)])

    assert [(row["f__status"], row["f__click__logit"]) for row in rows] == [
        *[("present", 1.0)] * 20, *[("present", 2.0)] * 20, *[("pending", None)] * 20,
    ]  # fmt: skip


def test_the_one_entry_after_the_last_commit_is_looked_up(feeding: Feeding, stand: Stand, duck: Duck) -> None:
    for first in (0, 20):
        feeding.post_ids(first, first + 20)
        stand.work()
        if first == 0:
            committed(feeding)

    assert set(statuses(joined(feeding, duck, names(0, 40)))) == {"present"}


def test_what_is_committed_throughout_is_not_asked_for_online(feeding: Feeding, stand: Stand, duck: Duck) -> None:
    feeding.post_ids(0, 20)
    stand.work()
    committed(feeding)
    feeding.client.config_resetstat()

    found = statuses(joined(feeding, duck, [*names(0, 20), "nobody", "no one", "none", "neither"]))

    assert found == ["present"] * 20 + ["missing"] * 4
    assert "cmdstat_mget" not in feeding.client.info("commandstats")


@pytest.mark.parametrize("is_committed", [False, True], ids=["on the way", "committed"])
def test_failed_rows_are_failed_before_and_after_the_commit(
    feeding: Feeding, stand: Stand, duck: Duck, *, is_committed: bool
) -> None:
    feeding.post_ids(0, 20)
    stand.work(fail=True)
    if is_committed:
        committed(feeding)
        feeding.client.delete(*feeding.client.keys("*=f:*"))

    rows = joined(feeding, duck, names(0, 20))

    assert rows == [{"f__status": "failed", **dict.fromkeys(VALUES)}] * 20


def test_rows_whose_online_value_has_expired_are_present_from_the_table(
    feeding: Feeding, stand: Stand, duck: Duck
) -> None:
    feeding.post_ids(0, 20, price=3.0)
    stand.work()
    committed(feeding)
    feeding.client.delete(*feeding.client.keys("*=f:*"))
    feeding.post_ids(20, 40)  # so that both partitions are asked

    rows = joined(feeding, duck, names(0, 20))

    assert [(row["f__status"], row["f__click__logit"]) for row in rows] == [("present", 3.0)] * 20


def test_a_snapshot_trained_after_the_rows_is_leaky_before_and_after_the_commit(
    feeding: Feeding, stand: Stand, duck: Duck
) -> None:
    feeding.post_ids(0, 10, event_time=NOON_US - 1)
    stand.work()
    before = joined(feeding, duck, names(0, 10))
    committed(feeding)

    assert before == joined(feeding, duck, names(0, 10)) == [{"f__status": "leaky", **dict.fromkeys(VALUES)}] * 10


def test_a_value_of_another_event_day_is_another_examples(feeding: Feeding, stand: Stand, duck: Duck) -> None:
    feeding.post_ids(0, 10)
    stand.work()

    assert set(statuses(joined(feeding, duck, names(0, 10), time=NOON_US + DAY_US))) == {"missing"}
    assert set(statuses(joined(feeding, duck, names(0, 10), time=NOON_US + DAY_US // 3))) == {"present"}


def test_without_the_online_store_the_tables_alone_speak(feeding: Feeding, stand: Stand, duck: Duck) -> None:
    feeding.post_ids(0, 20)
    stand.work()
    committed(feeding)
    feeding.post_ids(20, 40)
    stand.work()

    rows = rows_of(begun(feeding, duck, client=None), names(0, 40))

    assert sorted(statuses(rows)) == ["missing"] * 20 + ["present"] * 20


def test_rows_that_are_committed_after_the_join_began_are_found_all_the_same(
    feeding: Feeding, stand: Stand, duck: Duck
) -> None:
    feeding.post_ids(0, 20)
    join = begun(feeding, duck, client=feeding.client)
    stand.work()
    committed(feeding)

    assert set(statuses(rows_of(join, names(0, 20)))) == {"present"}


def test_rows_of_files_are_looked_up_online_too(feeding: Feeding, stand: Stand, duck: Duck, tmp_path: Path) -> None:
    feeding.post({"example_id": f"e{i}", "price": float(i)} for i in range(40))
    stand.work()
    table = caller_table([(f"e{i}", NOON_US) for i in (39, 3, 17, 3)])
    parts = files_of(table, [tmp_path / "a.parquet", tmp_path / "b.parquet"], group_rows=1)
    join = begun(feeding, duck, client=feeding.client)

    windows = iter_windows(parts, most_rows=3, granularity="day")

    logits = [logit for window in windows for logit in join.join(window).columns["f__click__logit"].to_pylist()]
    assert logits == [39.0, 3.0, 17.0, 3.0]


def test_a_server_that_dies_during_the_join_is_told_and_leaves_no_file(
    own_server: Server, duck: Duck, tmp_path: Path
) -> None:
    with own_server.client() as client:
        feeding = Feeding(make_settings(own_server, tmp_path), client)
        feeding.declare_fm("f")
        feeding.post_ids(0, 10)
        join = begun(feeding, duck, client=client)
        own_server.kill()
        pq.write_table(caller_table([("e1", NOON_US), ("e2", NOON_US)]), tmp_path / "mine.parquet")

        with pytest.raises(UnavailableError, match=r"mine\.parquet can't be joined"):
            augment_files(
                list_sources(tmp_path / "mine.parquet"), tmp_path / "out.parquet", join,
                window_rows=100, as_folder=False, on_progress=lambda _: None,
            )  # fmt: skip

    assert list(tmp_path.glob("*out*")) == []


def test_an_online_value_of_a_snapshot_that_is_not_known_yet_is_told(
    feeding: Feeding, stand: Stand, duck: Duck
) -> None:
    feeding.post_ids(0, 10)
    feeding.put_online("f", names(0, 10), logit=1.0, snapshot=1)

    with pytest.raises(UnavailableError, match="try again") as caught:
        joined(feeding, duck, names(0, 10))

    assert caught.value.code == "registry_behind"


def test_a_failed_example_that_was_scored_after_all_is_present_before_and_after_the_commit(
    feeding: Feeding, stand: Stand, duck: Duck
) -> None:
    feeding.post_ids(0, 10)
    stand.work(fail=True)
    committed(feeding)
    feeding.score("f", names(0, 10), logit=0.5)
    feeding.put_online("f", names(0, 10), logit=0.5)
    before = joined(feeding, duck, names(0, 10))
    committed(feeding)

    assert set(statuses(before)) == set(statuses(joined(feeding, duck, names(0, 10)))) == {"present"}


def test_keys_of_the_online_store_are_as_this_test_deletes_them(feeding: Feeding, stand: Stand) -> None:
    feeding.post_ids(0, 20)
    stand.work()

    found = feeding.client.keys("*=f:*")

    prefixes = tuple(keys.online_prefix("ads", partition, "f") for partition in range(2))
    assert len(found) == 20
    assert all(key.startswith(prefixes) for key in found)
    assert OUTPUTS.tasks == ("click",)
