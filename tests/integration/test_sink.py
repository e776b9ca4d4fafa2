"""The sink on both servers: rows enter their table once, whatever dies when, and leave the log only after that."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from das_service.beats import beat
from das_service.dead_letters import list_dead_letters
from das_service.logs import records, streams
from das_service.sink import dataset_sink, feed, trimming
from das_service.sink.sink import Sink
from das_service.tables import durable_table
from schemas import keys
from schemas.dataset import DatasetSpec, grow
from schemas.entries import Position
from tests.busy import busy
from tests.feeding import DAY_US, NOON, NOON_US, SPEC, Feeding, metric, names

SOURCE = Path(durable_table.__file__).parent


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


def totals(sink: Sink) -> dict[str, Any]:
    info = sink.info()["datasets"]["ads"]
    return {name: info[name] for name in ("rows", "duplicates", "conflicting")}


def test_examples_reach_the_table_and_leave_the_log(feeding: Feeding) -> None:
    feeding.post([{"example_id": "a", "price": 2.5, "user_id": "u1", "tags": ["x", None], "image": b"12345678"}])
    feeding.run(feeding.sink())
    (row,) = feeding.rows("examples")
    assert {name: row[name] for name in ("example_id", "event_time", "is_late", "log_position", "event_day")} == {
        "example_id": "a", "event_time": NOON, "is_late": False, "log_position": 0, "event_day": NOON.date(),
    }  # fmt: skip
    assert (row["price"], row["user_id"], row["tags"], row["image"]) == (2.5, "u1", ["x", None], b"12345678")
    assert feeding.kept_rows() == 0


def test_columns_stand_in_the_order_of_the_contract(feeding: Feeding) -> None:
    feeding.post_ids(0, 1)
    feeding.run(feeding.sink())
    assert list(feeding.rows("examples")[0]) == [
        "example_id", "event_time", "received_at", "is_late", "content_hash", "log_position", "event_day",
        "price", "user_id", "tags", "image", "_example_hash",
    ]  # fmt: skip


def test_a_dead_letter_that_is_scored_later_is_failed_no_more(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    feeding.post_ids(0, 4)
    sink = feeding.sink()
    feeding.fail("f", names(0, 3))
    feeding.run(sink)
    assert metric(sink, "das_dead_letters", fm="f") == 3
    feeding.score("f", names(1, 4))
    feeding.run(sink)
    mark = records.read_mark(feeding.folder, "ads", "supervision/f")
    assert mark is not None
    assert (mark.rows, mark.mended, metric(sink, "das_dead_letters", fm="f")) == (3, 2, 1)
    listed = list_dead_letters(feeding.client, feeding.folder, "ads", "f", partitions=2, limit=10)
    assert [letter["example_id"] for letter in listed] == names(0, 1)


def test_a_repeat_that_failed_after_its_example_was_scored_is_no_failure(feeding: Feeding) -> None:
    """Two workers, each with an entry that has the example."""
    feeding.declare_fm("f")
    feeding.post_ids(0, 2)
    sink = feeding.sink()
    feeding.read_group("f")
    feeding.score("f", ["e0"])
    feeding.run(sink)
    feeding.fail("f", ["e0", "e1"])
    feeding.run(sink)
    counted = feeding.status()["fms"]["f"]
    assert (counted["scored"], counted["failed"], counted["pending"]) == (1, 1, 0)
    assert metric(sink, "das_dead_letters", fm="f") == 1


def test_the_gap_and_the_age_of_the_newest_supervision_are_told(feeding: Feeding) -> None:
    """Snapshot s1 ends a day before noon, and scores at noon."""
    feeding.declare_fm("f")
    feeding.score("f", ["a"], event_time=NOON_US - 3_600_000_000)
    sink = feeding.sink()
    feeding.run(sink)
    assert metric(sink, "das_freshness_gap_seconds", fm="f") == 23 * 3_600
    assert metric(sink, "das_supervision_age_seconds", fm="f") == 3_600


def test_supervision_and_dead_letters_reach_their_tables(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    feeding.score("f", ["a", "b"])
    feeding.fail("f", ["c"])
    sink = feeding.sink()
    feeding.run(sink)
    rows = sorted(feeding.rows("supervision/f"), key=lambda row: row["example_id"])
    assert [(row["example_id"], row["click__logit"], row["hidden"], row["snapshot_id"]) for row in rows] == [
        ("a", 0.5, b"abcd", "s1"), ("b", 0.5, b"abcd", "s1"),
    ]  # fmt: skip
    assert [(row["example_id"], row["reason"]) for row in feeding.rows("dead_letters/f")] == [("c", "boom")]
    assert feeding.kept_rows("scored:f") == feeding.kept_rows("dead:f") == 0
    assert sink.info()["datasets"]["ads"]["fms"] == {"f": {"supervision": 2, "dead_letters": 1}}
    assert metric(sink, "das_scored_rows_total", fm="f") == 2
    assert metric(sink, "das_dead_letters", fm="f") == 1


def test_tables_are_made_when_they_are_declared(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    feeding.run(feeding.sink(), steps=1)
    assert [feeding.rows(table) for table in ("examples", "supervision/f", "dead_letters/f")] == [[], [], []]


def test_an_fm_without_outputs_gets_its_table_once_they_are_known(feeding: Feeding) -> None:
    feeding.declare_fm("f", outputs=None)
    sink = feeding.sink()
    feeding.run(sink, steps=2)
    feeding.declare_fm("f")
    feeding.score("f", ["a"])
    feeding.run(sink)
    assert feeding.ids("supervision/f") == ["a"]


def test_an_example_that_two_workers_scored_has_one_supervision_row(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    sink = feeding.sink()
    feeding.score("f", ["a"], logit=0.1)
    feeding.run(sink)
    feeding.score("f", ["a", "b"], logit=0.2)
    feeding.score("f", ["b"], logit=0.3)
    feeding.run(sink)
    rows = {row["example_id"]: round(row["click__logit"], 1) for row in feeding.rows("supervision/f")}
    assert rows == {"a": 0.1, "b": 0.2}
    assert len(feeding.rows("supervision/f")) == 2


def test_repeats_in_other_chunks_are_counted_and_change_nothing(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.post_ids(0, 20, chunk_rows=3)
    feeding.run(sink)
    feeding.post_ids(5, 30, chunk_rows=7)
    feeding.post_ids(0, 30, chunk_rows=13)
    feeding.run(sink)
    at_the_door = sum(
        found.repeated_rows for found in streams.read_counters(feeding.client, "ads", range(2), ["examples"]).values()
    )
    assert feeding.ids("examples") == names(0, 30)
    assert totals(sink) == {"rows": 30, "duplicates": 15 + 30 - at_the_door, "conflicting": 0}
    assert metric(sink, "das_duplicate_examples_total") == 45 - at_the_door


def test_another_content_or_time_of_the_same_day_is_conflicting(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.post([{"example_id": "a", "price": 1.0}, {"example_id": "b", "price": 1.0}])
    feeding.run(sink)
    feeding.post([{"example_id": "a", "price": 2.0}, {"example_id": "b", "event_time": NOON_US + 1}])
    feeding.run(sink)
    assert totals(sink) == {"rows": 2, "duplicates": 0, "conflicting": 2}
    assert {row["example_id"]: row["price"] for row in feeding.rows("examples")} == {"a": 1.0, "b": 1.0}


def test_commits_of_repeats_alone_move_the_position(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.post_ids(0, 10)
    feeding.run(sink)
    files = sum(1 for _ in Path(feeding.settings.tables_uri).glob("ads/examples/event_day=*/*"))
    feeding.post_ids(0, 10, chunk_rows=4)
    feeding.run(sink)
    assert feeding.kept_rows() == 0
    assert sum(1 for _ in Path(feeding.settings.tables_uri).glob("ads/examples/event_day=*/*")) == files
    assert totals(sink) == {"rows": 10, "duplicates": 10, "conflicting": 0}


def kill_after(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    """Let a function do its work and then kill the process, once."""
    whole = getattr(module, name)

    def cut(*args: Any, **kwargs: Any) -> Any:
        whole(*args, **kwargs)
        monkeypatch.setattr(module, name, whole)
        raise Killed

    monkeypatch.setattr(module, name, cut)


def kill_before(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    """Kill the process instead of calling a function, once."""
    whole = getattr(module, name)

    def cut(*_: Any, **__: Any) -> Any:
        monkeypatch.setattr(module, name, whole)
        raise Killed

    monkeypatch.setattr(module, name, cut)


@pytest.mark.parametrize(
    ("when", "module", "name"),
    [
        (kill_after, feed, "read_after"),
        (kill_after, feed, "settle_identity"),
        (kill_after, durable_table, "write_files"),
        (kill_before, durable_table, "fsync_commits"),
        (kill_before, durable_table, "write_mark"),
        (kill_after, durable_table, "write_mark"),
        (kill_before, trimming, "trim_log"),
        (kill_after, trimming, "trim_log"),
    ],
)
def test_a_sink_killed_at_any_step_loses_and_doubles_nothing(
    feeding: Feeding, monkeypatch: pytest.MonkeyPatch, when: Any, module: Any, name: str
) -> None:
    feeding.post_ids(0, 10)
    feeding.run(feeding.sink())
    feeding.post_ids(5, 30, chunk_rows=4)
    doomed = feeding.sink()
    doomed.step(now=feeding.now + 1)  # opens the table, sees what waits
    when(monkeypatch, module, name)
    with pytest.raises(Killed):
        feeding.run(doomed)
    feeding.post_ids(25, 40)
    heir = feeding.sink()
    feeding.run(heir)
    assert feeding.ids("examples") == names(0, 40)
    assert totals(heir) == {"rows": 40, "duplicates": 5 + 5, "conflicting": 0}
    assert feeding.kept_rows() == 0


def test_a_failing_commit_is_made_again_by_the_same_process(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = durable_table.write_mark
    failures = iter([OSError(errno.EIO, "no"), None])

    def sometimes(*args: Any) -> None:
        error = next(failures, None)
        if error is not None:
            raise error
        whole(*args)

    sink = feeding.sink()
    feeding.run(sink)
    feeding.post_ids(0, 10)
    monkeypatch.setattr(durable_table, "write_mark", sometimes)
    feeding.run(sink)
    assert feeding.ids("examples") == names(0, 10)
    assert (sink.health(), feeding.kept_rows()) == ([], 0)


def test_a_full_disk_keeps_the_log_and_shows(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sink = feeding.sink()
    feeding.post_ids(0, 10)
    with monkeypatch.context() as patch:
        patch.setattr(durable_table, "write_files", full)
        feeding.run(sink, steps=20)
        assert sink.health() == ["table examples of dataset ads: the disk is full; the log keeps the rows"]
        assert feeding.kept_rows() == 10
    feeding.run(sink, steps=40)
    assert (sink.health(), feeding.ids("examples")) == ([], names(0, 10))


def test_a_folder_that_cannot_be_read_for_a_while_costs_a_pause_and_shows(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.run(sink)
    logs = Path(feeding.settings.tables_uri) / "ads/_das/logs.json"
    feeding.post_ids(0, 10)
    kept = logs.rename(logs.with_name("kept"))
    logs.mkdir()  # reading it is an OSError
    feeding.declare(feeding.spec.model_copy(update={"online_ttl_seconds": 60}))
    feeding.run(sink)
    assert sink.health()[0].startswith("the tables' folder can't be used")
    logs.rmdir()
    kept.rename(logs)
    feeding.run(sink)
    assert (sink.health(), feeding.ids("examples")) == ([], names(0, 10))


def test_what_was_declared_while_the_server_went_away_is_taken_over_when_it_is_back(
    feeding: Feeding, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = feeding.sink()
    feeding.run(sink)
    feeding.declare_fm("f")
    whole, calls = dataset_sink.keep_starts, iter(range(100))

    def sometimes(*args: Any) -> Any:
        if next(calls) == 0:
            raise redis.exceptions.ConnectionError("gone")
        return whole(*args)

    monkeypatch.setattr(dataset_sink, "keep_starts", sometimes)
    feeding.run(sink)
    assert feeding.folder.read("ads/_das/start.f.json") is not None


def test_two_sinks_at_once_write_each_row_once(feeding: Feeding) -> None:
    first, second = feeding.sink("sink-1"), feeding.sink("sink-2")
    for turn in range(6):
        feeding.post_ids(10 * turn, 10 * turn + 15)
        for sink, instance in ((first, "sink-1"), (second, "sink-2"), (first, "sink-1")):
            feeding.client.set(keys.owner("sink"), instance)  # each believes that it owns the role
            feeding.run(sink, steps=2)
    feeding.client.set(keys.owner("sink"), "sink-2")
    feeding.run(second)
    assert feeding.ids("examples") == names(0, 65)
    assert totals(second) == {"rows": 65, "duplicates": 25, "conflicting": 0}


def test_a_second_sink_stands_by_until_the_beat_of_the_first_stands_still(feeding: Feeding) -> None:
    first, second = feeding.sink("sink-1"), feeding.sink("sink-2")
    for count in range(8):
        beat(feeding.client, "sink-1", role="sink", count=count, info={})
        feeding.run(first, steps=1)
        feeding.run(second, steps=1)
    assert second.info() == {"standby": True, "owner": "sink-1"}
    feeding.post_ids(0, 5)
    feeding.run(second, steps=10)
    assert feeding.ids("examples") == names(0, 5)
    feeding.run(first, steps=2)
    assert first.info() == {"standby": True, "owner": "sink-2"}


def test_a_sink_that_stops_commits_what_waits_and_lets_go(feeding: Feeding) -> None:
    sink = feeding.sink()
    sink.step(now=feeding.now)
    feeding.post_ids(0, 10)
    sink.drain(deadline=float("inf"))
    assert feeding.ids("examples") == names(0, 10)
    assert feeding.client.get(keys.owner("sink")) is None


def test_entries_wait_for_the_commit_until_they_are_due(feeding_with: Callable[..., Feeding]) -> None:
    feeding = feeding_with(commit_seconds=100, commit_rows=30)
    sink = feeding.sink()
    feeding.post_ids(0, 20)
    feeding.run(sink)
    assert feeding.rows("examples") == []
    feeding.post_ids(20, 40)
    feeding.run(sink, steps=2)
    assert len(feeding.rows("examples")) > 0


def test_a_commit_takes_no_more_event_days_than_allowed(feeding_with: Callable[..., Feeding]) -> None:
    feeding = feeding_with(commit_event_days=3)
    feeding.post(({"example_id": f"e{i}", "event_time": NOON_US + i * DAY_US} for i in range(12)), chunk_rows=1)
    feeding.post({"example_id": f"e{i}", "event_time": NOON_US + i * DAY_US} for i in range(12, 30))
    feeding.run(feeding.sink(), steps=30)
    assert feeding.ids("examples") == names(0, 30)
    log_folder = Path(feeding.settings.tables_uri) / "ads/examples/_delta_log"
    added = [path.read_text().count('"add":') for path in sorted(log_folder.glob("*.json"))]
    assert sorted(added[1:])[:-2] == [3] * (len(added) - 3)  # two chunks are over the bound by themselves
    assert feeding.kept_rows() == 0


def test_an_added_feature_is_null_in_rows_of_before(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.post_ids(0, 3)
    feeding.run(sink)
    feeding.post_ids(3, 6)  # still in the old schema when the feature is declared
    brand = {"name": "brand", "type": "category", "value_type": "int64", "nullable": True}
    declared = SPEC.model_dump()
    wanted = DatasetSpec.model_validate({**declared, "features": [*declared["features"], brand]})
    feeding.declare(grow(SPEC, wanted)[0])
    feeding.post_ids(6, 9, brand=7)
    feeding.post_ids(0, 3)
    feeding.run(sink)
    rows = {row["example_id"]: row["brand"] for row in feeding.rows("examples")}
    assert rows == {f"e{i}": None for i in range(6)} | {f"e{i}": 7 for i in range(6, 9)}
    assert totals(sink) == {"rows": 9, "duplicates": 3, "conflicting": 0}


def test_a_server_that_is_busy_for_a_while_costs_a_pause(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.run(sink)
    feeding.post_ids(0, 10)
    with busy(feeding.client):
        feeding.run(sink, steps=2)
        (problem,) = sink.health()
        assert "BUSY" in problem
    feeding.run(sink)
    assert (sink.health(), feeding.ids("examples")) == ([], names(0, 10))


def test_the_log_keeps_what_a_required_fm_has_not_finished(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    sink = feeding.sink()
    feeding.post_ids(0, 10)
    feeding.run(sink)
    assert (len(feeding.rows("examples")), feeding.kept_rows()) == (10, 10)
    feeding.read_group("f", acknowledge=False)
    feeding.run(sink, steps=2)
    assert feeding.kept_rows() == 10
    for partition in range(2):
        feeding.client.xack(keys.log("ads", partition, "examples"), keys.group("f"), "1-0")
    feeding.run(sink, steps=2)
    assert feeding.kept_rows() == 0


def test_a_log_that_an_fm_holds_is_read_on_from_the_position(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    sink = feeding.sink()
    for first in (0, 5, 20):
        feeding.post_ids(first, first + 15, chunk_rows=4)
        feeding.run(sink)
    assert (feeding.ids("examples"), sink.health(), feeding.kept_rows()) == (names(0, 35), [], 45)
    assert totals(sink) == {"rows": 35, "duplicates": 10, "conflicting": 0}


def test_an_fm_that_was_declared_a_moment_ago_misses_nothing(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.run(sink, steps=1)
    feeding.declare_fm("f")
    feeding.post_ids(0, 10)
    sink.step(now=feeding.now + 0.1)
    sink.step(now=feeding.now + 0.7)  # a commit, before the sink looks at the registry again
    assert (feeding.ids("examples"), feeding.kept_rows()) == (names(0, 10), 10)


def test_an_optional_fm_that_falls_behind_leaves_and_is_fed_from_the_table(
    feeding_with: Callable[..., Feeding],
) -> None:
    feeding = feeding_with(catch_up_bytes=1 << 20)
    feeding.declare_fm("f", required=False)
    sink = feeding.sink()
    image = {"user_id": "u" * 100_000}
    feeding.post_ids(0, 20, chunk_rows=3, **image)
    feeding.read_group("f", acknowledge=False)  # taken by a worker that died
    feeding.post_ids(20, 40, chunk_rows=3, **image)
    feeding.run(sink, steps=12)
    assert feeding.kept_rows() == 0
    assert sorted(row["example_id"] for row in feeding.read_group("f", "rescore:f")) == names(0, 40)
    assert feeding.read_group("f") == []
    feeding.post_ids(40, 45)
    assert sorted(row["example_id"] for row in feeding.read_group("f")) == names(40, 45)
    feeding.run(sink)
    assert (feeding.kept_rows("rescore:f"), sink.health()) == (0, [])


def test_a_lost_log_stops_its_table_and_shows(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.post_ids(0, 10)
    feeding.run(sink)
    feeding.client.delete(keys.log("ads", 0, "examples"), keys.counters("ads", 0))
    feeding.run(sink)
    problems = sink.health()  # one per log, as their counters are one key
    assert problems
    assert all("log_lost" in problem and "das recover" in problem for problem in problems)


def test_a_gap_in_the_log_stops_its_table(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.run(sink)
    feeding.post_ids(0, 40, chunk_rows=5)
    feeding.client.xdel(keys.log("ads", 0, "examples"), "1-1")
    feeding.run(sink)
    (problem,) = sink.health()
    assert "log_lost: partition 0 has 1-2 after 1-0" in problem
    assert feeding.rows("examples") == []


def test_the_sink_compacts_when_there_are_too_many_small_files(feeding_with: Callable[..., Feeding]) -> None:
    feeding = feeding_with(compact_files=4)
    sink = feeding.sink()
    for i in range(8):
        feeding.post_ids(10 * i, 10 * i + 10)
        feeding.run(sink, steps=3)
    assert metric(sink, "das_table_files", table="examples") < 5
    feeding.post_ids(75, 90)
    feeding.run(sink)
    assert (feeding.ids("examples"), sink.health()) == (names(0, 90), [])


def test_each_table_has_its_turn_to_be_compacted_however_fast_another_grows(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    sink = feeding.sink()
    compacted = set()
    for i in range(6):
        feeding.post_ids(10 * i, 10 * i + 10)
        feeding.score("f", names(10 * i, 10 * i + 10))
        feeding.run(sink, steps=3)
        (dataset,) = sink._datasets.values()
        before = {kind: len(feed.table.days[NOON.date()]) for kind, feed in dataset.feeds.items() if feed.table.days}
        dataset._compact_next(feeding.now, 1)
        compacted |= {
            kind for kind, files in before.items() if len(dataset.feeds[kind].table.days[NOON.date()]) < files
        }

    assert compacted == {"examples", "scored:f"}


def test_a_wish_to_compact_is_met_and_then_forgotten(feeding: Feeding) -> None:
    sink = feeding.sink()
    for i in range(3):
        feeding.post_ids(10 * i, 10 * i + 10)
        feeding.run(sink, steps=3)
    feeding.client.hset(keys.COMPACT, "ads", "token")
    feeding.run(sink, steps=3)
    assert metric(sink, "das_table_files", table="examples") == 1
    assert feeding.client.hget(keys.COMPACT, "ads") is None
    assert feeding.ids("examples") == names(0, 30)


def test_positions_are_shown_in_the_beat(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.post_ids(0, 40, chunk_rows=10)
    feeding.run(sink)
    (counters,) = [streams.read_counters(feeding.client, "ads", range(2), ["examples"])]
    expected = {str(p): Position(epoch=1, seq=counters[p, "examples"].last).entry_id for p in range(2)}
    assert sink.info()["datasets"]["ads"]["positions"] == expected


def test_nothing_in_the_service_writes_a_table_by_path() -> None:
    offenders = [path.name for path in SOURCE.glob("*.py") if "write_deltalake" in path.read_text()]
    assert offenders == []
