"""What backfills said, from the scored log into the table: served, stored once, and nobody's outcome."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from das_service.dead_letters import list_dead_letters
from das_service.logs import records, streams
from das_service.sink.compaction import compact_step
from schemas.entries import BACKFILL
from tests.conftest import Server, make_settings
from tests.feeding import Feeding, joined, metric, names
from tests.training import Trained, example, expected_order


@pytest.fixture
def feeding(server: Server, tmp_path: Path) -> Iterator[Feeding]:
    with server.client() as client:
        feeding = Feeding(make_settings(server, tmp_path, commit_seconds=0.5), client)
        feeding.declare_fm("f")
        feeding.register("f", "s1", "s2", "s3")
        yield feeding
        feeding.close()


def backfill(feeding: Feeding, example_ids: list[str], **options: Any) -> list[int]:
    return feeding.say_aside("f", example_ids, mark=BACKFILL, generation="", **options)


def said(feeding: Feeding) -> list[tuple[str, str, str]]:
    """Every row of the table: example, snapshot, and what it is."""
    kinds = {(False, False): "outcome", (True, False): "shadow", (False, True): "backfill"}
    return sorted(
        (row["example_id"], row["snapshot_id"], kinds[row["_is_shadow"], row["_is_backfill"]])
        for row in feeding.rows("supervision/f")
    )


def counts(feeding: Feeding) -> dict[str, int]:
    found = feeding.status()["fms"]["f"]
    return {name: found[name] for name in ("scored", "failed", "pending", "diverted")}


def test_what_a_backfill_says_is_stored_beside_the_outcomes_and_counted_nowhere(feeding: Feeding) -> None:
    feeding.post_ids(0, 10)
    feeding.read_group("f")
    feeding.score("f", names(0, 6))
    backfill(feeding, names(0, 8))
    assert counts(feeding) == {"scored": 0, "failed": 0, "pending": 6, "diverted": 0}
    feeding.score("f", names(6, 10))
    sink = feeding.sink()
    feeding.run(sink)

    outcomes = [(name, "s1", "outcome") for name in names(0, 10)]
    assert said(feeding) == sorted(outcomes + [(name, "s2", "backfill") for name in names(0, 8)])
    assert counts(feeding) == {"scored": 10, "failed": 0, "pending": 0, "diverted": 0}
    assert metric(sink, "das_scored_rows_total", fm="f") == 10
    counted = streams.read_counters(feeding.client, "ads", range(2), [records.scored_log("f")])
    assert sum(found.kept_bytes for found in counted.values()) == 0


def test_a_snapshot_is_stored_once_however_often_backfills_say_it(feeding: Feeding) -> None:
    feeding.post_ids(0, 10)
    feeding.score("f", names(0, 10))
    backfill(feeding, names(0, 6))
    backfill(feeding, names(3, 8))
    backfill(feeding, names(0, 10), snapshot_id="s1")  # it has given the outcome of these
    sink = feeding.sink()
    feeding.run(sink)
    backfill(feeding, names(0, 10))
    backfill(feeding, names(0, 2), snapshot_id="s3")
    feeding.run(sink)

    found = [(name, snapshot) for name, snapshot, kind in said(feeding) if kind == "backfill"]
    assert found == sorted([(name, "s2") for name in names(0, 10)] + [(name, "s3") for name in names(0, 2)])
    assert counts(feeding)["scored"] == 10


def test_what_a_snapshot_said_as_a_shadow_keeps_no_backfill_out_and_a_backfill_keeps_the_shadow_out(
    feeding: Feeding,
) -> None:
    feeding.post_ids(0, 4)
    feeding.score("f", names(0, 4))
    feeding.say_aside("f", names(0, 2))
    backfill(feeding, names(0, 4))
    sink = feeding.sink()
    feeding.run(sink)
    feeding.say_aside("f", names(0, 4))
    feeding.run(sink)

    assert [row for row in said(feeding) if row[2] != "outcome"] == sorted(
        [(name, "s2", "backfill") for name in names(0, 4)] + [(name, "s2", "shadow") for name in names(0, 2)]
    )


def test_the_first_valid_supervision_is_served_whether_a_worker_or_a_backfill_gave_it(feeding: Feeding) -> None:
    feeding.post_ids(0, 4)
    feeding.score("f", names(0, 2))
    backfill(feeding, names(0, 3))
    feeding.run(feeding.sink())

    rows = joined(feeding, names(0, 4))
    assert [row["f__status"] for row in rows] == ["present", "present", "present", "missing"]
    assert [row["f__snapshot_id"] for row in rows] == ["s1", "s1", "s2", None]


def test_an_outcome_after_a_backfill_enters_and_is_counted(feeding: Feeding) -> None:
    feeding.post_ids(0, 4)
    feeding.read_group("f")
    backfill(feeding, names(0, 4))
    sink = feeding.sink()
    feeding.run(sink)
    feeding.score("f", names(0, 4))
    feeding.score("f", names(0, 4))
    feeding.run(sink)

    outcomes = [row for row in said(feeding) if row[2] == "outcome"]
    assert outcomes == [(name, "s1", "outcome") for name in names(0, 4)]
    assert counts(feeding) == {"scored": 4, "failed": 0, "pending": 0, "diverted": 0}


def test_a_dead_letter_that_was_backfilled_stays_one_and_can_be_replayed(feeding: Feeding) -> None:
    feeding.post_ids(0, 4)
    feeding.read_group("f")
    feeding.fail("f", names(0, 4))
    sink = feeding.sink()
    feeding.run(sink)
    backfill(feeding, names(0, 4))
    feeding.run(sink)

    letters = list_dead_letters(feeding.client, feeding.folder, "ads", "f", partitions=2, limit=10)
    assert (len(letters), counts(feeding)["failed"]) == (4, 4)
    assert {row["f__status"] for row in joined(feeding, names(0, 4))} == {"present"}


def test_compaction_keeps_backfills_apart_and_loses_no_row(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.post_ids(0, 30)
    for first in range(0, 30, 10):
        feeding.score("f", names(first, first + 10))
        feeding.say_aside("f", names(first, first + 2), snapshot_id="s3")
        backfill(feeding, names(first, first + 5))
        feeding.run(sink)
    before = said(feeding)
    table = next(feed.table for feed in sink._datasets["ads"].feeds.values() if feed.kind == "scored:f")

    while compact_step(table, most_small_files=1, target_bytes=1 << 30):
        pass

    kinds = sorted(file.kind for files in table.days.values() for file in files)
    assert (said(feeding), kinds) == (before, ["backfill", "part", "shadow"])


def test_a_backfill_that_finds_the_log_full_appends_nothing(feeding: Feeding) -> None:
    backfill(feeding, names(0, 10))
    before = feeding.kept_rows(records.scored_log("f"))

    assert set(backfill(feeding, names(0, 10), max_bytes=10)) == {-4}
    assert feeding.kept_rows(records.scored_log("f")) == before


def test_a_row_closes_when_its_worker_has_scored_it_whatever_a_backfill_said(trained: Trained) -> None:
    trained.close(0, 100)
    rows = [example(number) for number in range(100, 300)]
    assert trained.api.post([{**row, "event_time": row["event_time"].isoformat()} for row in rows], "stream").is_success
    trained.settle()
    trained.backfill("s1")
    trained.settle()
    assert set(expected_order(trained)) <= {f"e{number}" for number in range(100)}
    trained.stand.work()
    trained.settle()
    assert len(expected_order(trained)) > 200
