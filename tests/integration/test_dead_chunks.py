"""Entries that no table takes: kept whole in `dead_chunks`, once, while everything else goes on."""

import json
from pathlib import Path

import pytest

from das_service.logs import streams
from das_service.sink import dead_chunks
from schemas import keys
from schemas.dataset import example_schema
from schemas.entries import Position, head_fields
from tests.feeding import SPEC, Feeding, metric, names

SPEC_SCHEMA = example_schema(SPEC)


def test_an_entry_that_no_table_takes_is_set_aside_and_the_rest_goes_on(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.post_ids(0, 4)
    head = head_fields(SPEC_SCHEMA, num_rows=3, num_features=len(SPEC.features), meta={})
    bad = streams.Chunk(dataset="ads", partition=1, kind="examples", data=b"not arrow", head=head, num_rows=3)
    (appended,) = feeding.append([bad])
    feeding.post_ids(4, 8)
    feeding.run(sink, steps=60)
    assert feeding.ids("examples") == names(0, 8)
    (row,) = feeding.rows("dead_chunks")
    assert (row["kind"], row["partition"], row["log_position"], row["data"], row["num_rows"]) == (
        "examples", 1, appended.position.number, b"not arrow", 3,
    )  # fmt: skip
    assert (sink.health(), feeding.kept_rows()) == ([], 0)
    assert metric(sink, "das_dead_chunks_total", kind="examples") == 1


@pytest.mark.parametrize(
    "head",
    [["v", "1"], ["v", "1", "n", "three", "c", "\u00e9", "m", "{}", "s", "x"], ["v", "one"]],
    ids=["no fields", "no number", "no version"],
)
def test_an_entry_whose_header_cannot_be_read_is_set_aside_as_it_is_and_the_rest_goes_on(
    feeding: Feeding, head: list[str]
) -> None:
    feeding.declare_fm("f")
    sink = feeding.sink()
    bad = streams.Chunk(dataset="ads", partition=1, kind="examples", data=b"\xff rows", head=head, num_rows=3)
    (appended,) = feeding.append([bad])
    feeding.post_ids(0, 8)
    feeding.run(sink, steps=60)
    assert (feeding.ids("examples"), sink.health()) == (names(0, 8), [])
    (row,) = feeding.rows("dead_chunks")
    assert (row["partition"], row["log_position"], row["data"]) == (1, appended.position.number, b"\xff rows")
    fields = {name: value.encode("latin-1").decode() for name, value in json.loads(row["meta"]).items()}
    assert {name: fields[name] for name in head[::2]} == dict(zip(head[::2], head[1::2], strict=True))
    assert {"t", "r", "b"} <= fields.keys()
    assert metric(sink, "das_dead_chunks_total", kind="examples") == 1
    for partition in range(2):
        feeding.client.xreadgroup(keys.group("f"), "w", {keys.log("ads", partition, "examples"): ">"})
        feeding.client.xack(keys.log("ads", partition, "examples"), keys.group("f"), "1-0", "1-1")
    feeding.run(sink)
    assert [feeding.client.xlen(keys.log("ads", partition, "examples")) for partition in range(2)] == [0, 0]
    assert sink.health() == []


def test_a_log_is_freed_up_to_an_entry_that_cannot_be_read(feeding: Feeding) -> None:
    bad = [
        streams.Chunk(dataset="ads", partition=1, kind="examples", data=data, head=["v", "1"], num_rows=3)
        for data in (b"x", b"y")
    ]
    feeding.append(bad)
    freed = streams.trim_log(feeding.client, "ads", 1, "examples", committed=Position(epoch=1, seq=0), groups=[])
    assert (freed, feeding.client.xlen(keys.log("ads", 1, "examples"))) == ((1, ""), 1)


def test_an_entry_of_a_later_version_waits_for_a_sink_of_that_version(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.append([streams.Chunk(dataset="ads", partition=1, kind="examples", data=b"", head=["v", "2"], num_rows=3)])
    feeding.run(sink, steps=60)
    (problem,) = sink.health()
    assert "has format 2: upgrade this role" in problem
    assert not (Path(feeding.settings.tables_uri) / "ads" / "dead_chunks").exists()


def test_a_hole_in_the_log_is_not_passed_while_entries_are_tried_one_by_one(feeding: Feeding) -> None:
    sink = feeding.sink()
    feeding.run(sink)
    bad = streams.Chunk(dataset="ads", partition=1, kind="examples", data=b"x", head=["v", "1"], num_rows=3)
    feeding.append([bad])
    feeding.post_ids(0, 40, chunk_rows=5)
    feeding.client.xdel(keys.log("ads", 1, "examples"), "1-2")
    feeding.run(sink, steps=60)
    (problem,) = sink.health()
    assert "log_lost: partition 1 has 1-3 after 1-1" in problem


def test_an_entry_is_set_aside_once(feeding: Feeding) -> None:
    head = head_fields(SPEC_SCHEMA, num_rows=3, num_features=len(SPEC.features), meta={})
    bad = streams.Chunk(dataset="ads", partition=1, kind="examples", data=b"not arrow", head=head, num_rows=3)
    feeding.append([bad])
    ((entry_id, fields),) = streams.read_raw_after(feeding.client, "ads", "examples", {1: None}, count=1)[1]
    entry = dead_chunks.RawEntry(entry_id, fields)
    where = {"kind": "examples", "partition": 1, "entry": entry, "retention_hours": 168}
    assert dead_chunks.divert(feeding.folder, "ads", reason="no", **where)
    assert not dead_chunks.divert(feeding.folder, "ads", reason="no", **where)
    assert len(feeding.rows("dead_chunks")) == 1
