"""Closing against a plain re-statement: which rows are closed when, with which labels, and which labels are late."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis
from deltalake import DeltaTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from das_service.logs import streams
from das_service.logs.records import EXAMPLES as EXAMPLES_LOG
from das_service.metrics import Metrics
from das_service.recover import recover
from das_service.role import RoleContext
from das_service.sink import feed, late_labels
from das_service.sink.sink import Sink
from das_service.tables.durable_table import DurableTable
from schemas import keys
from tests.served import Api, Stand

# One kind of server is enough: labels get into its tables on both in test_labels.py.
pytestmark = pytest.mark.parametrize("shared_server", ["valkey"], indirect=True)

START = datetime(2025, 3, 1, 6, tzinfo=UTC)
WINDOW, LATENESS = 30, 10
SPEC = {
    "features": [{"name": "price", "type": "float"}],
    "tasks": [
        {"name": "click", "label_window_seconds": 60 * WINDOW},
        {"name": "buy", "label_window_seconds": 120 * WINDOW, "negative_if_silent": False},
    ],
    "partitions": 1,
    "allowed_lateness_seconds": 60 * LATENESS,
    "max_future_seconds": 0,
}


def at(minute: int) -> str:
    return (START + timedelta(minutes=minute)).isoformat()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


def minute_of(time: datetime) -> int:
    return round((time - START).total_seconds() / 60)


@dataclass
class Stream:
    """A dataset that is fed and whose sink works when it is told to."""

    api: Api
    dataset: str
    now: float = 0.0
    partitions: int = 1
    spec: dict[str, Any] = field(default_factory=dict)
    sink: Sink | None = None
    client: redis.Redis = field(init=False)

    def __post_init__(self) -> None:
        self.client = redis.Redis.from_url(self.api.settings.redis_url.get_secret_value(), protocol=2)
        self.api.declare(self.dataset, {**SPEC, "partitions": self.partitions, **self.spec})

    def examples(self, rows: Sequence[tuple[str, int]]) -> None:
        body = [{"example_id": name, "event_time": at(minute), "price": 1.0} for name, minute in rows]
        assert self.api.post(body, self.dataset).status_code == 202

    def labels(self, rows: Sequence[tuple[str, int, dict[str, float]]]) -> None:
        body = [{"example_id": name, "label_time": at(minute), **labels} for name, minute, labels in rows]
        answer = self.api.http.post(f"/v1/datasets/{self.dataset}/labels", json={"labels": body})
        assert answer.status_code == 202, answer.text

    def settle(self) -> None:
        """Let the sink commit and close all that is due."""
        sink = self.sink or self.restart()
        for _ in range(4):
            self.now += 6.0
            sink.step(now=self.now)
        assert sink.health() == []

    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds
        self.settle()

    def restart(self, **overrides: Any) -> Sink:
        """Take another sink, as after a crash."""
        context = RoleContext(
            self.api.settings.model_copy(update=overrides),
            role="sink",
            instance=f"s{self.now}",
            client=self.client,
            metrics=Metrics("sink"),
        )
        self.stop()
        self.sink = Sink(context)
        return self.sink

    def stop(self) -> None:
        if self.sink is not None:
            self.sink.drain(deadline=float("-inf"))
            self.sink.close()
            self.client.delete("das:owner:sink")
            self.sink = None

    def rows(self, table: str) -> list[dict[str, Any]]:
        place = Path(self.api.settings.tables_uri) / self.dataset / table
        return DeltaTable(str(place)).to_pyarrow_table().to_pylist() if place.exists() else []

    def closed(self) -> list[tuple[str, int, float | None, float | None]]:
        rows = sorted(self.rows("closed"), key=lambda row: row["ready_seq"])
        assert [row["ready_seq"] for row in rows] == list(range(len(rows)))
        return [(r["example_id"], minute_of(r["event_time"]), r["click"], r["buy"]) for r in rows]

    def late(self) -> list[tuple[str, int, float | None, float | None]]:
        rows = self.rows("late_labels")
        return sorted(((r["example_id"], minute_of(r["label_time"]), r["click"], r["buy"]) for r in rows), key=str)


class Reference:
    """The same by hand: lists, loops, no code of the service."""

    def __init__(self) -> None:
        self.time_of: dict[str, int] = {}
        self.late_examples: set[str] = set()
        self.said: list[tuple[str, int, dict[str, float]]] = []
        self.closed: list[tuple[str, int, float | None, float | None]] = []
        self.labels_seen: dict[str, int] = {}
        self.latest: int | None = None

    def examples(self, rows: Sequence[tuple[str, int]]) -> None:
        for name, minute in rows:
            if name not in self.time_of:
                self.time_of[name] = minute
                if self.latest is not None and minute < self.latest - LATENESS:
                    self.late_examples.add(name)
        self.latest = max([minute for _, minute in rows] + ([] if self.latest is None else [self.latest]))

    def labels(self, rows: Sequence[tuple[str, int, dict[str, float]]]) -> None:
        for row in rows:
            if row not in self.said:
                self.said.append(row)

    def settle(self) -> None:
        if self.latest is None:
            return
        due = [
            (minute, name)
            for name, minute in self.time_of.items()
            if name not in self.labels_seen and minute + 2 * WINDOW < self.latest - LATENESS + 0.9
        ]
        for minute, name in sorted(due):
            values = []
            for task, window, silent in (("click", WINDOW, 0.0), ("buy", 2 * WINDOW, None)):
                inside = [
                    (label_minute, place, labels[task])
                    for place, (of, label_minute, labels) in enumerate(self.said)
                    if of == name and task in labels and 0 <= label_minute - minute <= window
                ]
                values.append(max(inside)[2] if inside else silent)
            self.closed.append((name, minute, values[0], values[1]))
            self.labels_seen[name] = len(self.said)

    def late(self) -> list[tuple[str, int, float | None, float | None]]:
        found = []
        for place, (name, label_minute, labels) in enumerate(self.said):
            if name not in self.labels_seen:
                continue
            late = dict(labels)
            if place < self.labels_seen[name]:
                for task, window in (("click", WINDOW), ("buy", 2 * WINDOW)):
                    if 0 <= label_minute - self.time_of[name] <= window:
                        late.pop(task, None)
            if late:
                found.append((name, label_minute, late.get("click"), late.get("buy")))
        return sorted(found, key=str)


NAMES = st.sampled_from([f"e{i}" for i in range(12)])
EXAMPLES = st.lists(st.tuples(NAMES, st.integers(0, 300)), min_size=1, max_size=6, unique_by=lambda row: row[0])
VALUES = st.fixed_dictionaries({}, optional={"click": st.sampled_from([0.0, 1.0]), "buy": st.sampled_from([0.5, 1.0])})
DAY = 24 * 60
MINUTES = st.one_of(st.integers(0, 400), st.integers(31 * DAY - 1, 31 * DAY + 300), st.just(300 * DAY))
LABELS = st.lists(st.tuples(NAMES, MINUTES, VALUES.filter(bool)), min_size=1, max_size=6)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("examples"), EXAMPLES),
        st.tuples(st.just("labels"), LABELS),
        st.tuples(st.just("settle"), st.booleans()),
    ),
    min_size=1,
    max_size=14,
)
_RUNS = iter(range(10**6))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_closed_rows_and_late_labels_are_those_of_the_reference(api: Api, steps: list[tuple[str, Any]]) -> None:
    stream, reference = Stream(api, f"d{next(_RUNS)}"), Reference()
    for what, rows in [*steps, ("settle", False)]:
        if what == "settle":
            if rows:
                stream.restart()
            stream.settle()
            reference.settle()
        else:
            getattr(stream, what)(rows)
            getattr(reference, what)(rows)
    stream.stop()
    stream.client.close()

    assert stream.closed() == reference.closed
    assert stream.late() == reference.late()
    late = {row["example_id"] for row in stream.rows("examples") if row["is_late"]}
    assert late == reference.late_examples


@pytest.fixture
def stream(api: Api) -> Iterator[Stream]:
    made = Stream(api, "one")
    yield made
    made.stop()
    made.client.close()


FEW = [("a", 0), ("b", 5), ("end", 200)]


def test_rows_wait_for_the_scores_of_required_fms_and_no_longer_than_they_may(stream: Stream) -> None:
    stream.api.declare_fm("f", stream.dataset)
    stream.examples(FEW)
    stream.settle()
    assert stream.closed() == []

    stream.restart(close_wait_seconds=0.0)
    stream.settle()

    assert [row[0] for row in stream.closed()] == ["a", "b"]


def test_rows_are_closed_once_they_are_scored_or_dead_lettered(stream: Stream) -> None:
    stream.api.declare_fm("f", stream.dataset)
    stand = Stand(stream.api.settings, stream.client, dataset=stream.dataset)
    stand.validate()
    stream.examples(FEW[:1])
    stand.work()
    stream.examples(FEW[1:])
    stream.settle()
    assert [row[0] for row in stream.closed()] == ["a"]

    stand.work(fail=True)
    stream.settle()

    assert [row[0] for row in stream.closed()] == ["a", "b"]


def test_an_fm_that_is_not_required_is_not_waited_for(stream: Stream) -> None:
    stream.api.declare_fm("f", stream.dataset, required=False)
    stream.examples(FEW)
    stream.settle()

    assert [row[0] for row in stream.closed()] == ["a", "b"]


def test_an_fm_that_came_later_is_not_waited_for(stream: Stream) -> None:
    stream.examples(FEW)
    stream.api.declare_fm("f", stream.dataset)
    stream.settle()

    assert [row[0] for row in stream.closed()] == ["a", "b"]


def test_the_last_rows_of_a_stream_close_as_time_goes_by(stream: Stream) -> None:
    stream.examples([("a", 0), ("b", 5)])
    stream.labels([("a", 3, {"click": 1.0})])
    stream.settle()
    assert stream.closed() == []

    stream.let_time_pass(60.0 * (2 * WINDOW + LATENESS + 10))

    assert stream.closed() == [("a", 0, 1.0, None), ("b", 5, 0.0, None)]


@pytest.mark.parametrize("table", ["closed", "late_labels"])
@pytest.mark.parametrize("step", ["before", "after"])
def test_a_crash_at_a_commit_neither_loses_nor_doubles_a_row_or_a_late_label(
    stream: Stream, monkeypatch: pytest.MonkeyPatch, table: str, step: str
) -> None:
    commit = DurableTable.commit

    def cut(self: DurableTable, *args: Any, **kwargs: Any) -> None:
        if self.table != table:
            commit(self, *args, **kwargs)
            return
        if step == "after":
            commit(self, *args, **kwargs)
        raise Killed

    stream.examples(FEW)
    stream.labels([("a", 3, {"click": 1.0}), ("a", 100, {"click": 0.0}), ("b", 150, {"buy": 1.0})])
    monkeypatch.setattr(DurableTable, "commit", cut)
    with pytest.raises(Killed):
        stream.settle()
    monkeypatch.setattr(DurableTable, "commit", commit)
    stream.restart()
    stream.settle()
    stream.labels([("b", 10, {"click": 1.0})])
    stream.settle()

    assert stream.closed() == [("a", 0, 1.0, None), ("b", 5, 0.0, None)]
    assert stream.late() == [("a", 100, 0.0, None), ("b", 10, 1.0, None), ("b", 150, None, 1.0)]


def test_each_partition_counts_its_ready_rows_and_all_rows_close(api: Api) -> None:
    stream = Stream(api, "many", partitions=3)
    rows = [(f"e{i}", i % 90) for i in range(400)]
    for first in range(0, 400, 50):
        stream.examples(rows[first : first + 50])
        stream.settle()
    stream.examples([("end", 400)])
    for _ in range(3):
        stream.settle()
    found = stream.rows("closed")
    stream.stop()
    stream.client.close()

    assert sorted(row["example_id"] for row in found) == sorted(name for name, _ in rows)
    for partition in range(3):
        ready = sorted(row["ready_seq"] for row in found if row["_partition"] == partition)
        assert ready == list(range(len(ready)))


def test_compaction_changes_no_closed_row(stream: Stream) -> None:
    for part in range(6):
        stream.examples([(f"e{part}", 10 * part), (f"end{part}", 100 + 10 * part)])
        stream.settle()
    before = stream.closed()
    assert stream.sink is not None
    closer = stream.sink._datasets[stream.dataset]._closer
    assert closer is not None

    assert closer.compact(now=stream.now, most_small_files=1)

    assert len(before) == 6
    assert stream.closed() == before


def test_a_label_that_was_posted_before_the_example_that_moves_the_watermark_counts(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, posted = streams.read_after, list[str]()

    def read_late(client: redis.Redis, dataset: str, kind: str, *args: Any, **kwargs: Any) -> Any:
        if kind == EXAMPLES_LOG and not posted:  # since the sink read the counters of this turn
            posted.append(kind)
            stream.labels([("a", 3, {"click": 1.0})])
            stream.examples([("end", 300)])
        return read(client, dataset, kind, *args, **kwargs)

    monkeypatch.setattr(feed, "read_after", read_late)
    stream.examples([("a", 0)])
    stream.settle()

    assert stream.closed() == [("a", 0, 1.0, None)]
    assert stream.late() == []


def test_of_labels_at_one_time_in_one_request_the_last_counts(stream: Stream) -> None:
    stream.examples(FEW)
    stream.labels([(name, 6, {"click": value}) for name, value in (("a", 1.0), ("a", 0.0), ("b", 0.0), ("b", 1.0))])
    stream.settle()

    assert stream.closed() == [("a", 0, 0.0, None), ("b", 5, 1.0, None)]


@pytest.mark.parametrize("granularity", ["day", "week", "month"])
def test_rows_of_the_first_day_that_there_is_close(api: Api, granularity: str) -> None:
    stream = Stream(api, "old", spec={"table_granularity": granularity, "max_future_seconds": 300})
    api.post([{"example_id": "old", "event_time": "0001-01-01T00:00:00Z", "price": 1.0}], "old")
    stream.examples(FEW)
    stream.settle()
    closed = stream.rows("closed")
    stream.stop()
    stream.client.close()

    assert sorted(row["example_id"] for row in closed) == ["a", "b", "old"]


@pytest.mark.parametrize("task", ["row", "time", "example", "l", "first"])
def test_a_task_may_have_a_name_that_closing_uses_itself(api: Api, task: str) -> None:
    stream = Stream(api, "names", spec={"tasks": [{"name": task, "label_window_seconds": 1800}]})
    stream.examples(FEW)
    stream.labels([("a", 3, {task: 1.0}), ("b", 150, {task: 1.0})])
    stream.settle()
    closed, late = stream.rows("closed"), stream.rows("late_labels")
    stream.stop()
    stream.client.close()

    assert sorted((row["example_id"], row[task]) for row in closed) == [("a", 1.0), ("b", 0.0)]
    assert [row["example_id"] for row in late] == ["b"]


def test_the_last_rows_of_a_stream_close_whatever_restarts_meanwhile(stream: Stream) -> None:
    stream.examples([("a", 0), ("b", 5)])
    for _ in range(7):
        stream.restart()
        stream.settle()
        assert stream.closed() == []
        stream.let_time_pass(600.0)

    stream.restart()
    stream.let_time_pass(600.0)
    stream.let_time_pass(600.0)

    assert [row[0] for row in stream.closed()] == ["a", "b"]


def test_late_labels_are_looked_for_in_parts_and_none_is_lost_or_doubled(stream: Stream) -> None:
    stream.examples(FEW)
    stream.settle()
    assert stream.sink is not None
    closer = stream.sink._datasets[stream.dataset]._closer
    assert closer is not None
    closer._late_due_at = float("inf")
    for minute in range(10, 16):
        stream.labels([("a", minute, {"click": 1.0})])
        stream.settle()
    stream.restart(commit_rows=2)
    for _ in range(6):
        stream.settle()

    assert stream.late() == [("a", minute, 1.0, None) for minute in range(10, 16)]


@pytest.mark.parametrize("granularity", ["day", "month"])
def test_labels_of_old_examples_are_late_too_each_once(api: Api, granularity: str) -> None:
    stream = Stream(api, f"old_{granularity}", spec={"table_granularity": granularity})
    stream.examples(FEW)
    stream.settle()
    minutes = [12, 30 * DAY, 31 * DAY, 31 * DAY + 1, 65 * DAY, 200 * DAY]
    wanted: list[tuple[str, int, float, None]] = []
    for place, minute in enumerate(minutes):
        stream.labels([("a", minute, {"click": 1.0}), ("nobody", minute, {"click": 1.0})])
        wanted.append(("a", minute, 1.0, None))
        if place % 2:
            stream.restart(commit_rows=2)
        stream.let_time_pass(600.0)
        stream.let_time_pass(600.0)
        assert stream.late() == sorted(wanted, key=str)
    stream.restart()
    stream.let_time_pass(600.0)
    late = stream.late()
    stream.stop()
    stream.client.close()

    assert late == sorted(wanted, key=str)


def test_old_examples_are_gone_over_a_part_at_a_time_and_a_label_of_several_is_written_once(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the sink is killed between two parts."""
    monkeypatch.setattr(late_labels, "_OLD_ROWS", 1)
    stream = Stream(api, "parts_of_old")
    for day in range(15):
        stream.examples([("a", day * DAY), ("b", day * DAY), ("mover", day * DAY + 12 * 60)])
    stream.settle()
    stream.labels(
        [("a", 100 * DAY, {"click": 1.0}), ("b", 101 * DAY, {"buy": 0.5}), ("nobody", 100 * DAY, {"buy": 0.5})]
    )
    stream.settle()
    looked = []
    for _ in range(20):
        stream.let_time_pass(600.0)
        looked.append(len(stream.late()))
        if len(looked) == 2:
            stream.restart()
    late = stream.late()
    stream.stop()
    stream.client.close()

    assert looked[:2] == [0, 0]
    assert late == [("a", 100 * DAY, 1.0, None), ("b", 101 * DAY, None, 0.5)]


def test_labels_that_come_while_old_examples_are_gone_over_are_written_once(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a partition whose log is shorter than another's, too."""
    monkeypatch.setattr(late_labels, "_OLD_ROWS", 1)
    names = [f"e{i}" for i in range(8)]
    of = keys.partitions_of(keys.digest_array(pa.array(names)), 2).tolist()
    long, short = names[of.index(0)], names[of.index(1)]
    stream = Stream(api, "between_parts", partitions=2)
    for day in range(12):
        stream.examples([(long, day * DAY), (short, day * DAY)])
        stream.examples([(name, day * DAY + 12 * 60) for name in names if name not in (long, short)])
    stream.settle()
    said = [(long, 100 * DAY + minute) for minute in range(6)] + [(short, 100 * DAY)]
    for name, minute in said:
        stream.labels([(name, minute, {"click": 1.0})])
    stream.let_time_pass(600.0)
    stream.let_time_pass(600.0)
    begun = stream.late()
    for minute in (1, 2):
        said.append((short, 100 * DAY + minute))
        stream.labels([(short, 100 * DAY + minute, {"click": 1.0})])
    for _ in range(20):
        stream.let_time_pass(600.0)
    late = stream.late()
    stream.stop()
    stream.client.close()

    assert begun == []
    assert late == sorted(((name, minute, 1.0, None) for name, minute in said), key=str)


def test_labels_before_anything_is_closed_are_no_problem(stream: Stream) -> None:
    stream.examples([("a", 0)])
    stream.labels([("a", 3, {"click": 1.0})])
    sink = stream.restart()
    for step in range(6):
        sink.step(now=6.0 * step)
        assert sink._datasets[stream.dataset].problems == []

    assert stream.late() == []


def test_rows_that_were_open_when_the_server_was_lost_close_after_a_recovery(stream: Stream) -> None:
    stream.examples([("a", 0), ("b", 5)])
    stream.settle()
    stream.stop()
    for key in stream.client.scan_iter("*"):
        stream.client.delete(key)
    recover(stream.api.settings)
    stream.settle()

    stream.let_time_pass(60.0 * (2 * WINDOW + LATENESS + 10))

    assert [row[0] for row in stream.closed()] == ["a", "b"]
