"""What shadows said, from the scored log into the table: stored once, nobody's outcome, and in nobody's way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from das_service.logs import records, streams
from das_service.redis_client import run_script
from das_service.sink.compaction import compact_step
from schemas import keys
from schemas.entries import Position
from tests.conftest import Server, make_settings
from tests.feeding import OUTPUTS, Feeding, joined, metric, names


@pytest.fixture
def feeding(server: Server, tmp_path: Path) -> Iterator[Feeding]:
    with server.client() as client:
        feeding = Feeding(make_settings(server, tmp_path, commit_seconds=0.5), client)
        feeding.declare_fm("f")
        feeding.register("f", "s1", "s2", "s3")
        yield feeding
        feeding.close()


def shadow(feeding: Feeding, example_ids: list[str], **options: Any) -> list[int]:
    """Log what a shadow said of examples as a worker does; give what the script answers."""
    return feeding.say_aside("f", example_ids, **options)


def said(feeding: Feeding) -> list[tuple[str, str, bool]]:
    """Every row of the table: example, snapshot, whether it is a shadow's."""
    rows = feeding.rows("supervision/f")
    return sorted((row["example_id"], row["snapshot_id"], row["_is_shadow"]) for row in rows)


def counts(feeding: Feeding) -> dict[str, int]:
    found = feeding.status()["fms"]["f"]
    return {name: found[name] for name in ("scored", "failed", "pending", "diverted")}


def test_a_shadows_rows_are_stored_beside_the_outcomes_and_counted_as_nobodys(feeding: Feeding) -> None:
    feeding.post_ids(0, 10)
    feeding.read_group("f")
    feeding.score("f", names(0, 10))
    shadow(feeding, names(0, 4))
    sink = feeding.sink()
    feeding.run(sink)

    expected = [(name, "s1", False) for name in names(0, 10)] + [(name, "s2", True) for name in names(0, 4)]
    assert said(feeding) == sorted(expected)
    assert counts(feeding) == {"scored": 10, "failed": 0, "pending": 0, "diverted": 0}
    assert metric(sink, "das_scored_rows_total", fm="f") == 10


def test_rows_are_accounted_for_while_a_shadows_lie_in_the_log(feeding: Feeding) -> None:
    feeding.post_ids(0, 10)
    feeding.read_group("f")
    feeding.score("f", names(0, 6))
    shadow(feeding, names(0, 6))
    assert counts(feeding) == {"scored": 0, "failed": 0, "pending": 6, "diverted": 0}
    shadow(feeding, names(0, 2), snapshot_id="s3")
    feeding.score("f", names(6, 10))
    assert counts(feeding)["pending"] == 10
    feeding.run(feeding.sink())

    assert counts(feeding) == {"scored": 10, "failed": 0, "pending": 0, "diverted": 0}
    assert feeding.kept_rows(records.scored_log("f")) == 0
    counted = streams.read_counters(feeding.client, "ads", range(2), [records.scored_log("f")])
    assert sum(found.kept_bytes for found in counted.values()) == 0


def test_rows_are_counted_right_also_where_a_shadows_are_the_first_that_is_kept(feeding: Feeding) -> None:
    kind = records.scored_log("f")
    feeding.post_ids(0, 50)
    feeding.read_group("f")
    feeding.score("f", names(0, 20))
    shadow(feeding, names(0, 20))
    feeding.score("f", names(20, 50))

    for partition in range(2):
        committed = Position(epoch=1, seq=0)
        assert streams.trim_log(feeding.client, "ads", partition, kind, committed=committed, groups=[])[0] == 1

    assert (feeding.kept_rows(kind), counts(feeding)["pending"]) == (30, 30)
    logs = [keys.log("ads", 0, kind)]
    assert run_script(feeding.client, "raise_epoch", [keys.counters("ads", 0), *logs], [2, 1, kind]) == 1
    assert feeding.kept_rows(kind) == 30


def test_a_shadow_speaks_of_an_example_once(feeding: Feeding) -> None:
    feeding.post_ids(0, 10)
    feeding.score("f", names(0, 10))
    shadow(feeding, names(0, 6))
    shadow(feeding, names(3, 8), logit=1.0)
    sink = feeding.sink()
    feeding.run(sink)
    shadow(feeding, names(6, 10), logit=2.0)
    shadow(feeding, names(0, 3), snapshot_id="s3")
    shadow(feeding, names(0, 3), snapshot_id="s1")  # it has given the outcome of these
    feeding.run(sink)

    shadows = [(name, snapshot) for name, snapshot, is_shadow in said(feeding) if is_shadow]
    assert shadows == sorted([(f"e{i}", "s2") for i in range(10)] + [(f"e{i}", "s3") for i in range(3)])
    logits = {row["example_id"]: row["click__logit"] for row in feeding.rows("supervision/f") if row["_is_shadow"]}
    assert [logits[f"e{i}"] for i in range(3, 10)] == [9.0, 9.0, 9.0, 1.0, 1.0, 2.0, 2.0]
    assert counts(feeding)["scored"] == 10


def test_outcomes_enter_whatever_a_shadow_has_said_of_the_example(feeding: Feeding) -> None:
    feeding.post_ids(0, 4)
    feeding.score("f", names(0, 2))
    shadow(feeding, names(0, 4))
    sink = feeding.sink()
    feeding.run(sink)
    feeding.score("f", names(2, 4))
    feeding.run(sink)

    assert [row for row in said(feeding) if not row[2]] == [(name, "s1", False) for name in names(0, 4)]


def test_a_dead_letter_stays_one_when_a_shadow_has_scored_its_example(feeding: Feeding) -> None:
    feeding.post_ids(0, 4)
    shadow(feeding, names(0, 4))
    sink = feeding.sink()
    feeding.run(sink)
    feeding.fail("f", names(0, 4))
    feeding.run(sink)

    assert counts(feeding)["failed"] == 4


def test_a_default_join_never_gives_what_a_shadow_said(feeding: Feeding) -> None:
    feeding.post_ids(0, 4)
    feeding.score("f", names(0, 2))
    shadow(feeding, names(0, 4))
    feeding.run(feeding.sink())

    rows = joined(feeding, ["e0", "e1", "e2", "e3"])

    assert [(row["f__status"], row["f__snapshot_id"]) for row in rows] == [("present", "s1")] * 2 + [
        ("missing", None)
    ] * 2


def test_compaction_keeps_shadows_apart_and_loses_no_row(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.post_ids(0, 30)
    for first in range(0, 30, 10):
        feeding.score("f", names(first, first + 10))
        shadow(feeding, names(first, first + 5))
        feeding.run(sink)
    before = said(feeding)
    table = next(feed.table for feed in sink._datasets["ads"].feeds.values() if feed.kind == "scored:f")

    while compact_step(table, most_small_files=1, target_bytes=1 << 30):
        pass

    files = [file for files in table.days.values() for file in files]
    assert (said(feeding), sorted(file.kind for file in files)) == (before, ["part", "shadow"])
    assert {row["f__snapshot_id"] for row in joined(feeding, names(0, 30))} == {"s1"}
    assert counts(feeding)["scored"] == 30


def test_a_table_from_before_there_were_shadows_takes_them(feeding: Feeding, monkeypatch: pytest.MonkeyPatch) -> None:
    from das_service.sink import table_rows
    from schemas import tables

    feeding.post_ids(0, 4)
    feeding.score("f", names(0, 2))
    without = tables.supervision_table_schema(OUTPUTS)
    without = without.remove(without.get_field_index("_is_shadow"))
    with monkeypatch.context() as patch:
        patch.setattr(table_rows, "supervision_table_schema", lambda _: without)
        old = feeding.sink("sink-0")
        feeding.run(old)
        old.close()
    assert set(feeding.rows("supervision/f")[0]) == set(without.names)

    feeding.score("f", names(2, 4))
    shadow(feeding, names(0, 4))
    feeding.run(feeding.sink(), steps=12)

    found = [row for row in feeding.rows("supervision/f") if not row["_is_shadow"]]
    assert sorted((row["example_id"], row["_is_shadow"]) for row in found) == [
        ("e0", None), ("e1", None), ("e2", False), ("e3", False),
    ]  # fmt: skip
    assert [row["f__status"] for row in joined(feeding, names(0, 4))] == ["present"] * 4


@pytest.mark.parametrize(("changes", "code"), [({"generation": 1}, -1), ({"max_bytes": 10}, -4)])
def test_a_shadow_that_is_withdrawn_or_finds_the_log_full_appends_nothing(
    feeding: Feeding, changes: dict[str, int], code: int
) -> None:
    before = feeding.kept_rows(records.scored_log("f"))

    assert set(shadow(feeding, names(0, 10), **changes)) == {code}

    entries = streams.read_after(feeding.client, "ads", records.scored_log("f"), dict.fromkeys(range(2)), count=10)
    assert (feeding.kept_rows(records.scored_log("f")), sum(map(len, entries.values()))) == (before, 0)
