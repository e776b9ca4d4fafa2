"""Which snapshot scores which stored example, how a backfill is held back, and what its options may be."""

import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from das_service.cli.output import InputError
from das_service.registry import Catalog, FmRecord, SnapshotRecord
from fm_inference.backfill import main, parse_moment
from fm_inference.backfill_pace import Backlog, Pace
from fm_inference.backfill_spans import Span, spans_between, usable_snapshots
from tests.declared import SPEC


def snapshot(name: str, trained_through: int | None = 0, *, state: str = "validated") -> SnapshotRecord:
    moment = None if trained_through is None else datetime.fromtimestamp(trained_through, UTC)
    return SnapshotRecord.model_validate(
        {"snapshot_id": name, "uri": "/nowhere", "sha256": "", "state": state, "trained_through": moment,
         "registered_at": datetime(2026, 1, 1, tzinfo=UTC)}
    )  # fmt: skip


def named(spans: list[Span]) -> list[tuple[int, int, str | None]]:
    return [
        (span.first_us // 10**6, span.end_us // 10**6, span.snapshot and span.snapshot.snapshot_id) for span in spans
    ]


def test_each_event_time_belongs_to_the_newest_snapshot_that_is_not_trained_past_it() -> None:
    snapshots = [snapshot("b", 20), snapshot("a", 10), snapshot("c", 30)]
    assert named(spans_between(snapshots, 5 * 10**6, 40 * 10**6)) == [
        (5, 10, None), (10, 20, "a"), (20, 30, "b"), (30, 40, "c"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [(12, 15, [(12, 15, "a")]), (1, 2, [(1, 2, None)]), (20, 21, [(20, 21, "b")]), (10, 20, [(10, 20, "a")])],
)
def test_spans_are_cut_at_what_was_asked_for(first: int, end: int, expected: list[tuple[int, int, str | None]]) -> None:
    snapshots = [snapshot("a", 10), snapshot("b", 20)]
    assert named(spans_between(snapshots, first * 10**6, end * 10**6)) == expected


def test_of_two_snapshots_trained_alike_the_one_registered_later_scores() -> None:
    assert named(spans_between([snapshot("a", 10), snapshot("b", 10)], 0, 20 * 10**6)) == [(0, 10, None), (10, 20, "b")]


def test_rejected_unvalidated_and_shadow_snapshots_are_not_used_and_retired_ones_are() -> None:
    records = {
        "active": snapshot("active"), "old": snapshot("old"), "new": snapshot("new"), "shadow": snapshot("shadow"),
        "bad": snapshot("bad", state="rejected"), "fresh": snapshot("fresh", None, state="validating"),
    }  # fmt: skip
    fm = FmRecord(
        fm="f", required=True, active="active", shadow="shadow", retired=("old",), snapshots=tuple(sorted(records))
    )
    catalog = Catalog(revision=1, datasets={"ads": SPEC}, fms={"ads": {"f": fm}}, snapshots={"ads": {"f": records}})
    assert [each.snapshot_id for each in usable_snapshots(catalog, "ads", "f")] == ["active", "new", "old"]


def test_a_backfill_stands_still_until_the_sink_and_the_workers_have_caught_up() -> None:
    seen = [Backlog(scored_bytes=101, live_rows=0), Backlog(scored_bytes=0, live_rows=11)]
    left = [*seen, Backlog(scored_bytes=99, live_rows=10)]
    pace = Pace(
        lambda: left.pop(0), most_bytes=100, most_live_rows=10, rows_per_second=None, stopping=threading.Event()
    )
    assert (pace.wait(5), left) == (True, [])


def test_a_backfill_that_is_to_stop_waits_for_nothing() -> None:
    stopping = threading.Event()
    stopping.set()
    pace = Pace(
        lambda: Backlog(scored_bytes=101, live_rows=0), most_bytes=100, most_live_rows=10, rows_per_second=0.001,
        stopping=stopping,
    )  # fmt: skip
    assert not pace.wait(5)


def test_a_backfill_scores_no_more_rows_a_second_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part waits until those before it have had their time; time that was lost is not made up for."""
    now, waited = 100.0, []

    class Stopping(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            nonlocal now
            waited.append(timeout)
            now += timeout or 0.0
            return False

    monkeypatch.setattr(time, "monotonic", lambda: now)
    pace = Pace(
        lambda: Backlog(scored_bytes=0, live_rows=0), most_bytes=1, most_live_rows=1, rows_per_second=50.0,
        stopping=Stopping(),
    )  # fmt: skip
    for num_rows in (100, 25, 100):
        assert pace.wait(num_rows)
    assert waited == [0.0, 2.0, 0.5]
    now += 60.0
    assert pace.wait(100)
    assert pace.wait(1)
    assert waited[3:] == [0.0, 2.0]


def test_a_date_is_its_midnight_in_utc_and_a_time_needs_an_offset() -> None:
    midnight = datetime(2026, 3, 1, tzinfo=UTC)
    assert parse_moment("2026-03-01", "--from") == parse_moment("2026-03-01T01:00:00+01:00", "--from") == midnight
    for text in ("2026-03-01T00:00:00", "yesterday"):
        with pytest.raises(InputError, match="--from"):
            parse_moment(text, "--from")


def test_a_server_that_can_not_be_reached_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DAS_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("DAS_TABLES_URI", str(tmp_path))
    assert main(["ads", "--fm", "f", "--from", "2026-02-01", "--to", "2026-04-01"]) == 1
    said = capsys.readouterr().err
    assert (said.startswith("das: the server"), said.count("\n")) == (True, 1)
