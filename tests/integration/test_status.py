"""Every accepted row is somewhere (I5), on both servers: by the counters, whatever was lost, diverted or is planned."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from das_service.logs import streams
from das_service.logs.backlog import Reader, read_unfinished
from das_service.recover import recover
from das_service.sink import rescore
from das_service.supervision.lookup import unfinished_partitions
from das_service.watch import status
from schemas import keys
from schemas.dataset import example_schema
from schemas.entries import Position, head_fields
from tests.conftest import Server, make_settings
from tests.feeding import DAY_US, NOON_US, SPEC, Feeding, names


@pytest.fixture
def feeding(server: Server, tmp_path: Path) -> Iterator[Feeding]:
    with server.client() as client:
        feeding = Feeding(make_settings(server, tmp_path, commit_seconds=0.5, catch_up_bytes=1 << 20), client)
        feeding.declare_fm("f", required=False)
        yield feeding
        feeding.close()


def counts(feeding: Feeding) -> dict[str, int]:
    """What is accepted and where it is, checked to be the same."""
    found = feeding.status()
    places = {name: found[name] for name in ("distinct", "duplicates", "conflicting", "diverted", "in_log")}
    assert found["accepted"] == sum(places.values())
    return {name: number for name, number in places.items() if number}


def fm_counts(feeding: Feeding) -> dict[str, int]:
    found = feeding.status()["fms"]["f"]
    return {name: found[name] for name in ("scored", "failed", "pending")}


def backlog(feeding: Feeding) -> tuple[int, int, int]:
    found = feeding.status()["fms"]["f"]
    return found["backlog_entries"], found["pending"], found["backlog_bytes"]


def log_bytes(feeding: Feeding, *, kind: str = "examples") -> int:
    found = streams.read_counters(feeding.client, "ads", range(2), [kind])
    return sum(counted.kept_bytes for counted in found.values())


def test_rows_are_accounted_for_at_once_after_an_empty_server(feeding: Feeding) -> None:
    feeding.post_ids(0, 100)
    sink = feeding.sink()
    feeding.run(sink)
    feeding.client.flushall()
    recover(feeding.settings)
    feeding.post_ids(90, 110)
    assert counts(feeding) == {"distinct": 100, "in_log": 20}
    feeding.run(sink, steps=12)
    assert counts(feeding) == {"distinct": 110, "duplicates": 10}


def test_rows_are_accounted_for_when_a_log_lost_rows_that_were_counted(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.run(sink)
    feeding.post_ids(0, 100)
    for partition in range(2):
        feeding.client.delete(keys.log("ads", partition, "examples"))
    recover(feeding.settings)
    assert (counts(feeding), log_bytes(feeding)) == ({}, 0)
    feeding.post_ids(0, 30)
    assert counts(feeding) == {"in_log": 30}
    feeding.run(sink, steps=12)
    assert counts(feeding) == {"distinct": 30}


def test_a_commit_in_the_middle_of_a_look_hides_no_row(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    feeding.post_ids(0, 20, chunk_rows=3)
    feeding.read_group("f")
    sink, real = feeding.sink(), status.read_counters

    def commit_first(*args: Any) -> Any:
        monkeypatch.setattr(status, "read_counters", real)
        feeding.run(sink)
        return real(*args)

    monkeypatch.setattr(status, "read_counters", commit_first)
    assert counts(feeding) == {"distinct": 20}
    assert feeding.kept_rows() == 0


def test_entries_of_an_older_epoch_are_unfinished_too(feeding: Feeding) -> None:
    feeding.post_ids(0, 40, chunk_rows=1)
    feeding.client.delete(keys.log("ads", 0, "scored:f"))
    assert unfinished_partitions(feeding.client, "ads", "f", [0, 1]) == {0, 1}
    recover(feeding.settings)
    feeding.post_ids(40, 50, chunk_rows=1)
    assert counts(feeding) == {"in_log": 50}
    assert backlog(feeding) == (50, 50, log_bytes(feeding))
    feeding.run(feeding.sink(), steps=12)
    assert fm_counts(feeding) == {"scored": 0, "failed": 0, "pending": 50}
    feeding.read_group("f")
    assert backlog(feeding) == (0, 0, 0)
    assert unfinished_partitions(feeding.client, "ads", "f", [0, 1]) == set()


def test_old_entries_that_no_new_one_follows_are_unfinished(feeding: Feeding) -> None:
    feeding.post_ids(0, 40, chunk_rows=1)
    feeding.client.delete(keys.log("ads", 0, "scored:f"))
    recover(feeding.settings)
    feeding.run(feeding.sink(), steps=12)
    assert unfinished_partitions(feeding.client, "ads", "f", [0, 1]) == {0, 1}
    assert (fm_counts(feeding)["pending"], backlog(feeding)[0]) == (40, 40)


def test_all_entries_that_a_worker_holds_are_counted(feeding: Feeding) -> None:
    feeding.post(({"example_id": f"e{i}", "user_id": "u" * (i % 50)} for i in range(600)), chunk_rows=2)
    feeding.read_group("f", acknowledge=False)
    held = sum(feeding.client.xlen(keys.log("ads", partition, "examples")) for partition in range(2))
    assert (held > 200, backlog(feeding)) == (True, (held, 600, log_bytes(feeding)))
    rows = entries = size = 0
    for partition in range(2):
        name = keys.log("ads", partition, "examples")
        for at, (entry_id, fields) in enumerate(feeding.client.xrange(name)):
            if at % 5 < 2:
                feeding.client.xack(name, keys.group("f"), entry_id)
            else:
                entries, rows, size = entries + 1, rows + int(fields[b"n"]), size + len(fields[b"d"])
    assert backlog(feeding) == (entries, rows, size)


def test_held_entries_beyond_what_is_looked_at_are_taken_to_be_like_the_others(feeding: Feeding) -> None:
    feeding.post_ids(0, 4000, chunk_rows=1)
    feeding.read_group("f", acknowledge=False)
    feeding.read_group("f", acknowledge=False)  # a read takes 1,000 entries of a partition
    feeding.read_group("f", acknowledge=False)
    for partition in range(2):
        odd = [f"1-{seq}" for seq in range(1, 1900, 2)]
        feeding.client.xack(keys.log("ads", partition, "examples"), keys.group("f"), *odd)
    entries, rows, _ = backlog(feeding)
    assert (entries, rows) == (4000 - 2 * 950, 4000 - 2 * 950)


def bad_chunk(partition: int, kind: str, num_rows: int) -> streams.Chunk:
    head = head_fields(example_schema(SPEC), num_rows=num_rows, num_features=len(SPEC.features), meta={})
    return streams.Chunk(dataset="ads", partition=partition, kind=kind, data=b"no", head=head, num_rows=num_rows)


def test_rows_that_no_table_takes_are_accounted_for(feeding: Feeding) -> None:
    feeding.post_ids(0, 4)
    feeding.append([bad_chunk(1, "examples", 3), bad_chunk(0, "scored:f", 2)])
    feeding.post_ids(4, 8)
    assert counts(feeding) == {"in_log": 11}
    feeding.run(feeding.sink(), steps=60)
    assert counts(feeding) == {"distinct": 8, "diverted": 3}
    assert feeding.status()["fms"]["f"]["diverted"] == 2


def test_what_a_plan_has_still_to_feed_is_pending(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescore, "RESCORE_BYTES", 1)  # there is room in an empty log alone
    feeding.post_ids(0, 10)
    feeding.post_ids(10, 16, event_time=NOON_US + DAY_US)
    feeding.read_group("f")
    feeding.score("f", names(0, 3))
    feeding.fail("f", names(3, 4))
    sink = feeding.sink()
    feeding.run(sink)
    feeding.client.flushall()
    recover(feeding.settings)
    assert fm_counts(feeding) == {"scored": 3, "failed": 1, "pending": 12}
    assert unfinished_partitions(feeding.client, "ads", "f", [0, 1]) == {0, 1}
    feeding.run(sink, steps=12)
    assert (feeding.kept_rows("rescore:f"), fm_counts(feeding)["pending"]) == (6, 12)
    assert len(feeding.read_group("f", "rescore:f")) == 6
    assert (fm_counts(feeding)["pending"], backlog(feeding)[0]) == (6, 0)
    assert unfinished_partitions(feeding.client, "ads", "f", [0, 1]) == {0, 1}
    feeding.run(sink, steps=3)
    assert len(feeding.read_group("f", "rescore:f")) == 6
    assert fm_counts(feeding) == {"scored": 3, "failed": 1, "pending": 0}
    assert unfinished_partitions(feeding.client, "ads", "f", [0, 1]) == set()


def test_a_partition_without_losses_has_nothing_pending(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescore, "RESCORE_BYTES", 1)
    feeding.post_ids(0, 10)
    feeding.post_ids(10, 16, event_time=NOON_US + DAY_US)
    feeding.read_group("f")
    ids = names(0, 16)
    feeding.score("f", [name for name in names(0, 10) if partition_of(name) == 1])
    feeding.score("f", [name for name in names(10, 16) if partition_of(name) == 1], event_time=NOON_US + DAY_US)
    sink = feeding.sink()
    feeding.run(sink)
    feeding.client.flushall()
    recover(feeding.settings)
    feeding.run(sink, steps=12)
    feeding.read_group("f", "rescore:f")
    assert {partition_of(name) for name in ids} == {0, 1}
    assert unfinished_partitions(feeding.client, "ads", "f", [0, 1]) == {0}


def partition_of(example_id: str) -> int:
    return int.from_bytes(keys.digests([example_id.encode()])[8:], "little") % 2


def test_what_an_fm_leaves_after_a_loss_is_fed_too(feeding: Feeding) -> None:
    image: dict[str, Any] = {"user_id": "u" * 100_000}
    feeding.post_ids(0, 40, chunk_rows=3, **image)
    feeding.client.delete(keys.log("ads", 0, "scored:f"))
    recover(feeding.settings)
    feeding.post_ids(40, 80, chunk_rows=3, **image)
    sink = feeding.sink()
    for _ in range(12):
        feeding.run(sink, steps=1)
        assert sum(fm_counts(feeding).values()) == 80
    assert (feeding.kept_rows(), feeding.read_group("f")) == (0, [])
    assert sorted(row["example_id"] for row in feeding.read_group("f", "rescore:f")) == names(0, 80)


def test_what_is_unfinished_up_to_a_position_is_counted_alone(feeding: Feeding) -> None:
    feeding.post_ids(0, 40, chunk_rows=2)
    name = keys.log("ads", 0, "examples")
    ids = [entry_id for entry_id, _ in feeding.client.xrange(name)]
    rows = [int(fields[b"n"]) for _, fields in feeding.client.xrange(name)]
    feeding.client.xreadgroup(keys.group("f"), "w", {name: ">"}, count=6)
    feeding.client.xack(name, keys.group("f"), ids[1], ids[3], ids[4])
    for at in range(9):
        reader = Reader(partition=0, kind="examples", group=keys.group("f"), up_to=Position(epoch=1, seq=at))
        (found,) = read_unfinished(feeding.client, "ads", [reader])
        left = [seq for seq in range(at + 1) if seq not in {1, 3, 4}]
        assert (found.entries, found.rows) == (len(left), sum(rows[seq] for seq in left))


def test_what_an_fm_that_left_the_log_has_still_to_get_is_pending(
    feeding: Feeding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescore, "RESCORE_BYTES", 1)
    image: dict[str, Any] = {"user_id": "u" * 100_000}
    feeding.post_ids(0, 120, chunk_rows=3, **image)
    finished = feeding.read_group("f", acknowledge=False)[:3]  # of the first entry: the others' worker died
    feeding.client.xack(keys.log("ads", 0, "examples"), keys.group("f"), "1-0")
    feeding.score("f", sorted(row["example_id"] for row in finished))
    feeding.post_ids(120, 140, chunk_rows=3, **image)
    sink = feeding.sink()
    seen = []
    for _ in range(12):
        feeding.run(sink, steps=1)
        seen.append(fm_counts(feeding))
    assert feeding.kept_rows() == 0
    assert {sum(found.values()) for found in seen} == {140}
    assert 0 < feeding.kept_rows("rescore:f") < 137
    assert unfinished_partitions(feeding.client, "ads", "f", [0, 1]) == {0, 1}
    fed = []
    for _ in range(12):
        fed += feeding.read_group("f", "rescore:f")
        feeding.run(sink, steps=1)
    assert sorted({row["example_id"] for row in fed}) == sorted(
        {*names(0, 140)} - {row["example_id"] for row in finished}
    )
    assert (len(fed), fm_counts(feeding)) == (137, {"scored": 3, "failed": 0, "pending": 0})
