"""Training batches: what they hold, in which order, and that a cursor gives the same bytes whatever comes after."""

import itertools
import json
import random
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from das_service.batches import pages, reader
from das_service.batches.cursor import decode_cursor, encode_cursor
from schemas import keys
from schemas.wire import ARROW_STREAM
from tests.training import SPEC, Read, Trained, at, click_of, example, expected_order

# One kind of server is enough: the rows come from tables.
pytestmark = pytest.mark.parametrize("shared_server", ["valkey"], indirect=True)


def test_rows_come_with_features_labels_and_supervision(trained: Trained) -> None:
    trained.close(0, 300)
    read = trained.read(fms="f", embedding_format="float32")
    numbers = [int(name[1:]) for name in read.ids]
    assert len(numbers) > 250
    assert len(set(numbers)) == len(numbers)
    for number, row in zip(numbers, read.table.to_pylist(), strict=True):
        assert {name: row[name] for name in example(number)} == example(number)
        assert row["click"] == click_of(number)
        assert row["buy"] is None
        assert row["f__status"] == "present"
        assert row["f__snapshot_id"] == "s1"
        assert row["f__click__logit"] == float(number)
        assert row["f__hidden"] == [float(number), -float(number)]


def test_rows_come_in_ready_order_each_once(trained: Trained) -> None:
    trained.close(0, 400)
    assert trained.read(fms="f", batch_rows=17).ids == expected_order(trained)


@pytest.mark.parametrize("hashes", [1 << 62, 7, 1])
def test_examples_are_found_by_hash_and_told_apart_by_id_where_hashes_are_equal(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, hashes: int
) -> None:
    whole, find, found_by = keys.example_hashes, pages.PageReader._matching_examples, []

    def matching(self: pages.PageReader, *args: Any, key: str) -> Any:
        found_by.append(key)
        return find(self, *args, key=key)

    monkeypatch.setattr(keys, "example_hashes", lambda digests: whole(digests) % hashes)
    monkeypatch.setattr(pages.PageReader, "_matching_examples", matching)
    trained.close(0, 300)
    read = trained.read(fms="f", batch_rows=40)
    assert read.ids == expected_order(trained)
    assert len(read.ids) > 250
    for name, row in zip(read.ids, read.table.to_pylist(), strict=True):
        assert (f"e{row['price']:.0f}", f"e{row['f__click__logit']:.0f}") == (name, name)
    assert set(found_by) == {"_example_hash"} | ({"example_id"} if hashes < 300 else set())
    filtered = trained.read(fms="f", filter=json.dumps([["price", "<", 100]]))
    assert filtered.ids == [name for name in read.ids if int(name[1:]) < 100]


def test_every_cursor_gives_the_rest_of_the_same_bytes(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    trained.close(0, 400)
    whole = trained.read(fms="f", batch_rows=50)
    before = {cursor: trained.read(cursor=cursor).content for cursor in [whole.start, *whole.cursors]}
    for number, cursor in enumerate(whole.cursors):
        assert Read(before[cursor]).ids == whole.ids[50 * (number + 1) :]
    trained.close(400, 300)
    compact(trained)
    assert {cursor: trained.read(cursor=cursor).content for cursor in before} == before
    assert vacuum(trained)
    assert {cursor: trained.read(cursor=cursor).content for cursor in before} == before
    monkeypatch.setattr("das_service.batches.stream._MOST_PAGE_ROWS", 23)
    assert {cursor: trained.read(cursor=cursor).content for cursor in before} == before


def test_a_reader_that_hangs_up_while_a_page_is_made_leaves_when_it_is_made(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.close(0, 400)
    opened, is_waiting, whole = threading.Event(), threading.Event(), pages.PageReader.read

    def read(self: pages.PageReader, ranges: list[tuple[int, int]]) -> pages.Page:
        if ranges[0][0] >= 28:
            is_waiting.set()
            assert opened.wait(30)
        return whole(self, ranges)

    async def receive() -> dict[str, Any]:
        """Hang up as soon as the second page is waited for."""
        assert await anyio.to_thread.run_sync(is_waiting.wait, 30)
        threading.Timer(0.5, opened.set).start()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        """Take the head of the answer and nothing of its body: this reader's socket is full."""
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()

    monkeypatch.setattr("das_service.batches.stream._MOST_PAGE_ROWS", 23)
    monkeypatch.setattr(pages.PageReader, "read", read)
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": f"/v1/datasets/{trained.dataset}/batches", "query_string": b"fms=f&batch_rows=30",
        "headers": [(b"accept", ARROW_STREAM.encode())], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        "state": dict(trained.api.http.app_state),
    }  # fmt: skip
    portal = trained.api.http.portal
    assert portal is not None
    portal.call(trained.api.http.app, scope, receive, send)
    assert opened.is_set()
    assert trained.read(fms="f").ids == expected_order(trained)


def vacuum(trained: Trained) -> list[str]:
    """Delete at once what compaction has replaced; give the files."""
    from deltalake import DeltaTable

    tables = [place.parent for place in Path(trained.api.settings.tables_uri).rglob("_delta_log")]
    return [
        name
        for table in tables
        for name in DeltaTable(str(table)).vacuum(0, dry_run=False, enforce_retention_duration=False)
    ]


def compact(trained: Trained) -> None:
    """Let the sink put all small files of all tables together."""
    assert trained.sink is not None
    trained.client.hset("das:compact", trained.dataset, json.dumps({"id": "1", "most_small_files": 1}))
    places = list((Path(trained.api.settings.tables_uri) / trained.dataset).rglob("_delta_log"))
    assert len(places) >= 4
    versions = [len(list(place.glob("*.json"))) for place in places]
    for _ in range(12):
        trained.now += 30.0
        trained.sink.step(now=trained.now)
    assert [len(list(place.glob("*.json"))) for place in places] > versions


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_shards_are_disjoint_and_complete(trained: Trained, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from das_service.batches import shards

    monkeypatch.setattr(shards, "_BLOCK_ROWS", 30)
    trained.close(0, 400)
    parts = [trained.read(shard=f"{number}/{total}", batch_rows=11).ids for number in range(total)]
    assert sorted(itertools.chain(*parts)) == sorted(expected_order(trained))
    assert max(map(len, parts)) - min(map(len, parts)) <= 60


def test_what_a_reader_has_left_is_shared_by_any_number_of_others(trained: Trained) -> None:
    trained.close(0, 600)
    read = [trained.read(shard=f"{number}/2", batch_rows=20) for number in range(2)]
    chance = random.Random(5)
    delivered, cursors = [], []
    for part in read:
        taken = chance.randrange(len(part.batches))
        delivered += part.ids[: 20 * taken]
        cursors.append(part.cursors[taken - 1] if taken else part.start)
    for total in (1, 2, 3):
        rest = [
            trained.read(cursor=cursor, split=f"{number}/{total}").ids for cursor in cursors for number in range(total)
        ]
        assert sorted([*delivered, *itertools.chain(*rest)]) == sorted(expected_order(trained))


FILTERS = [
    ('[["price", ">=", 100]]', lambda row: row["price"] >= 100),
    (
        '[["user_id", "in", ["u1", "u3"]], ["item", "!=", null]]',
        lambda row: row["user_id"] in {"u1", "u3"} and row["item"] is not None,
    ),
    ('[["item", "not in", [1, 2]]]', lambda row: row["item"] is not None and row["item"] not in {1, 2}),
    ('[["click", "=", 1.0]]', lambda row: click_of(int(row["example_id"][1:])) == 1.0),
    ('[["event_time", "<", "2026-03-01T01:00:00Z"]]', lambda row: row["event_time"] < at(3600)),
    ('[["is_late", "=", false], ["user_id", "<", "u2"]]', lambda row: row["user_id"] < "u2"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "passes"), FILTERS)
def test_a_filter_leaves_the_rows_that_pass_in_their_order(trained: Trained, text: str, passes: Any) -> None:
    trained.close(0, 300)
    wanted = [name for name in expected_order(trained) if passes(example(int(name[1:])))]
    assert wanted
    read = trained.read(filter=text, fms="f", batch_rows=16, columns="price")
    assert read.ids == wanted
    assert read.table.column_names[:4] == ["example_id", "event_time", "price", "f__status"]
    assert [batch.num_rows for batch in read.batches[:-1]] == [16] * (len(read.batches) - 1)
    assert trained.read(cursor=read.cursors[0]).ids == wanted[16:]


def test_from_and_to_bound_event_time(trained: Trained) -> None:
    trained.close(0, 300)
    read = trained.read(since=at(2000).isoformat(), until=at(5000).isoformat())
    assert read.ids == [i for i in expected_order(trained) if at(2000) <= example(int(i[1:]))["event_time"] < at(5000)]


def test_supervision_after_the_bounds_is_not_seen(trained: Trained) -> None:
    trained.close(0, 200)
    early = trained.read(fms="f")
    trained.stand.validate("s2", trained_through=datetime(2026, 2, 1, tzinfo=UTC))
    trained.close(200, 200)
    again = trained.read(cursor=early.start)
    assert again.content == early.content
    later = trained.read(fms="f")
    assert set(later.table["f__snapshot_id"].to_pylist()) == {"s1", "s2"}


def test_cursors_from_before_a_backfill_do_not_see_it_and_later_ones_do(trained: Trained) -> None:
    trained.close(0, 200)
    trained.stand.validate("s2", trained_through=datetime(2026, 2, 1, tzinfo=UTC))
    early = trained.read(fms="f", snapshot="s2")
    trained.backfill("s2")
    trained.settle()
    assert trained.read(cursor=early.start).content == early.content
    assert set(early.table["f__status"].to_pylist()) == {"missing"}
    later = trained.read(fms="f", snapshot="s2").table
    assert set(later["f__status"].to_pylist()) == {"present"}
    assert later["f__click__logit"].to_pylist() == later["price"].to_pylist()
    assert set(trained.read(fms="f").table["f__snapshot_id"].to_pylist()) == {"s1"}


def test_only_the_pinned_snapshot_counts(trained: Trained) -> None:
    trained.close(0, 200)
    trained.stand.validate("s2", trained_through=datetime(2026, 2, 1, tzinfo=UTC))
    trained.close(200, 200)
    rows = trained.read(fms="f", snapshot="s2").table.select(["f__status", "f__snapshot_id"]).to_pylist()
    assert {row["f__snapshot_id"] for row in rows if row["f__status"] == "present"} == {"s2"}
    assert {row["f__status"] for row in rows} == {"present", "missing"}


def test_as_of_gives_what_was_closed_and_scored_then(trained: Trained) -> None:
    trained.close(0, 200)
    first = trained.read(fms="f")
    now = datetime.now(UTC)
    trained.settle()
    as_of = now.isoformat()
    read = trained.read(fms="f", as_of=as_of)
    assert read.table.equals(first.table)
    trained.close(200, 200)
    trained.settle()
    again = trained.read(fms="f", as_of=as_of)
    assert again.content == read.content
    assert trained.read(cursor=read.start).content == read.content
    assert sum(decode_cursor(read.start, dataset=trained.dataset, partitions=3).end) == first.table.num_rows


def test_as_of_before_anything_was_closed_has_no_rows(trained: Trained) -> None:
    before = datetime.now(UTC).isoformat()
    trained.settle()
    empty = trained.read(fms="f", as_of=before)
    trained.close(0, 100)
    assert (empty.ids, trained.read(fms="f", as_of=before).ids) == ([], [])


def test_extend_goes_on_where_a_cursor_ended(trained: Trained) -> None:
    trained.close(0, 200)
    first = trained.read(fms="f")
    trained.close(200, 200)
    second = trained.read(cursor=first.cursors[-1], extend=True)
    assert trained.read(cursor=first.cursors[-1]).ids == []
    assert sorted(first.ids + second.ids) == sorted(expected_order(trained))
    third = trained.read(cursor=first.cursors[0], extend=True)
    assert third.ids == second.ids


def test_json_gives_rows_and_the_cursor_behind_them(trained: Trained) -> None:
    trained.close(0, 100)
    ids, cursor = [], None
    while True:
        params = (
            {"fms": "f", "batch_rows": 30, "max_rows": 30} if cursor is None else {"cursor": cursor, "max_rows": 30}
        )
        answer = trained.api.http.get(
            "/v1/datasets/stream/batches", params=params, headers={"Accept": "application/json"}
        )
        assert answer.status_code == 200, answer.text
        ids += [row["example_id"] for row in answer.json()["rows"]]
        if not answer.json()["rows"]:
            break
        cursor = answer.json()["cursor"]
    assert ids == expected_order(trained)


def test_a_dataset_without_closed_rows_gives_none(trained: Trained) -> None:
    read = trained.read(fms="f")
    assert read.ids == []
    assert read.table.column_names[:3] == ["example_id", "event_time", "price"]


BAD = [
    ({"filter": "display"}, 400, "filter_invalid", "JSON list"),
    ({"filter": '{"price": 1}'}, 400, "filter_invalid", "list of"),
    ({"filter": '[["nothing", "=", 1]]'}, 400, "filter_invalid", "'nothing'"),
    ({"filter": '[["price", "=", "1"]]'}, 400, "filter_invalid", "a finite number"),
    ({"filter": '[["price", "like", 1]]'}, 400, "filter_invalid", "no operator 'like'"),
    ({"filter": '[["tags", "=", "t1"]]'}, 400, "filter_invalid", "category_list"),
    ({"filter": '[["price", "in", []]]'}, 400, "filter_invalid", "1 to"),
    ({"filter": '[["event_time", "<", "2026-03-01"]]'}, 400, "filter_invalid", "2024-05-01T12:00:00Z"),
    ({"filter": '[["1=1; --", "=", 1]]'}, 400, "filter_invalid", "no column"),
    ({"filter": '[["price", ["="], 1]]'}, 400, "filter_invalid", "an operator is a text"),
    ({"filter": '[["price", {}, 1]]'}, 400, "filter_invalid", "an operator is a text"),
    ({"filter": f'[["price", "=", 1{"0" * 400}]]'}, 400, "filter_invalid", "a finite number"),
    ({"filter": '[["example_id", "=", "\\ud800"]]'}, 400, "filter_invalid", "a string"),
    ({"shard": "4/4"}, 400, "shard_invalid", "0 to 3"),
    ({"shard": "-1/4"}, 400, "shard_invalid", "no shard"),
    ({"shard": "0/0"}, 400, "shard_invalid", "1 to"),
    ({"split": "0/2"}, 400, "shard_invalid", "cursor"),
    ({"columns": "price,nothing"}, 400, "unknown_column", "nothing"),
    ({"fms": "nobody"}, 404, "unknown_fm", "nobody"),
    ({"fms": "f", "outputs": "nothing"}, 422, "unknown_output", "nothing"),
    ({"fms": "f", "snapshot": "s9"}, 404, "unknown_snapshot", "s9"),
    ({"snapshot": "s1"}, 400, "snapshot_invalid", "fm:id"),
    ({"cursor": "AQ"}, 400, "cursor_invalid", "cut"),
    ({"cursor": "no cursor!"}, 400, "cursor_invalid", "characters"),
    ({"as_of": "2999-01-01T00:00:00Z"}, 400, "as_of_in_future", "future"),
    ({"follow": True, "until": "2999-01-01T00:00:00Z"}, 400, "malformed", "to"),
    ({"extend": True}, 400, "malformed", "cursor"),
    ({"fm": "f"}, 400, "malformed", "query.fm"),
]


@pytest.mark.parametrize(("params", "status", "code", "words"), BAD)
def test_what_is_no_request_is_refused_in_words(
    trained: Trained, params: dict[str, Any], status: int, code: str, words: str
) -> None:
    answer = trained.ask(**params)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert words in answer.json()["detail"]


def test_a_cursor_that_is_damaged_or_of_another_dataset_is_refused(trained: Trained) -> None:
    trained.close(0, 60)
    cursor = trained.read(fms="f").start
    for place in range(0, len(cursor), 7):
        damaged = cursor[:place] + ("A" if cursor[place] != "A" else "B") + cursor[place + 1 :]
        assert trained.ask(cursor=damaged).json()["code"] == "cursor_invalid"
    assert trained.ask(cursor=cursor[:-3]).json()["code"] == "cursor_invalid"
    answer = trained.api.http.get("/v1/datasets/ads/batches", params={"cursor": cursor})
    assert (answer.status_code, answer.json()["code"]) == (409, "cursor_other_dataset")
    answer = trained.ask(cursor=cursor, fms="f", columns="price")
    assert (answer.status_code, answer.json()["code"]) == (400, "cursor_invalid")
    assert "columns" in answer.json()["detail"]


def test_a_cursor_of_rows_that_are_gone_is_told_so(trained: Trained) -> None:
    from deltalake import DeltaTable

    trained.close(0, 200)
    cursor = trained.read(fms="f").start
    table = DeltaTable(str(Path(trained.api.settings.tables_uri) / trained.dataset / "closed"))
    table.delete("ready_seq < 20")
    answer = trained.ask(cursor=cursor)
    assert (answer.status_code, answer.json()["code"]) == (410, "cursor_expired")


def test_a_reader_at_its_end_is_told_that_older_tables_were_put_back(trained: Trained) -> None:
    """It would wait for rows, or leave out those that close until the tables have come as far again."""
    trained.close(0, 100)
    cursor = decode_cursor(trained.read(fms="f").cursors[-1], dataset=trained.dataset, partitions=3)
    further = tuple(end + 40 for end in cursor.end)
    ahead = encode_cursor(cursor.model_copy(update={"low": further, "end": further}))
    for going in ({}, {"extend": True}, {"follow": True}):
        answer = trained.ask(cursor=ahead, **going)
        assert (answer.status_code, answer.json()["code"]) == (410, "cursor_expired")


def test_where_few_rows_match_empty_batches_say_how_far_was_looked(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "STRIDE_ROWS", 60)
    trained.close(0, 300)
    total = trained.read().table.num_rows
    wanted = trained.read(filter='[["example_id", "=", "nobody"]]')
    assert wanted.ids == []
    assert len(wanted.cursors) > 3
    left = [decode_cursor(cursor, dataset=trained.dataset, partitions=3).num_rows for cursor in wanted.cursors]
    assert left == sorted(left, reverse=True)
    assert left[0] < total
    assert left[-1] == 0
    assert trained.read(filter='[["example_id", "=", "nobody"]]').content == wanted.content
    few = expected_order(trained)[::50]
    found = trained.read(filter=json.dumps([["example_id", "in", few]]), batch_rows=2)
    assert found.ids == few
    for cursor in found.cursors:
        rest = trained.read(cursor=cursor).ids
        assert rest == few[len(few) - len(rest) :]
    whole = [batch.num_rows for batch in trained.read(batch_rows=16).batches]
    assert whole == [16] * (total // 16) + [total % 16]


def test_a_cursor_of_rows_that_the_tables_never_had_is_told_so(trained: Trained) -> None:
    trained.close(0, 100)
    read = trained.read(fms="f")
    cursor = decode_cursor(read.start, dataset=trained.dataset, partitions=3)
    ahead = cursor.model_copy(update={"end": tuple(end + 1 for end in cursor.end)})
    answer = trained.ask(cursor=encode_cursor(ahead))
    assert (answer.status_code, answer.json()["code"]) == (410, "cursor_expired")


def test_a_cursor_can_t_be_dealt_out_for_ever(trained: Trained) -> None:
    trained.close(0, 100)
    cursor = trained.read().start
    for _ in range(4):
        cursor = trained.read(cursor=cursor, split="0/32", max_rows=0).start
    answer = trained.ask(cursor=cursor, split="0/32")
    assert (answer.status_code, answer.json()["code"]) == (400, "shard_invalid")


def test_a_feature_that_is_added_later_does_not_change_what_a_cursor_gives(trained: Trained) -> None:
    trained.close(0, 120)
    read = trained.read(fms="f")
    grown = {**SPEC, "features": [*SPEC["features"], {"name": "extra", "type": "float", "nullable": True}]}
    assert trained.api.http.put("/v1/datasets/stream", json=grown).status_code == 200
    assert trained.read(cursor=read.start).content == read.content
    assert set(trained.read(columns="extra").table["extra"].to_pylist()) == {None}
