"""Stored examples scored again: real snapshots, a real server, the real sink; exactly once, and nothing is counted."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from das_service.metrics import Metrics
from das_service.registry import FmRecord, SnapshotRecord, fm_field, snapshot_field
from das_service.role import RoleContext
from das_service.sink.sink import Sink
from das_service.snapshot_folder import read_manifest
from das_service.watch.status import dataset_status
from fm_inference import backfill_run
from fm_inference.backfill import main
from fm_inference.backfill_run import Backfill, BackfillQuery, Tally
from fm_inference.engine import load_engine
from fm_inference.publishing import microseconds
from schemas import keys
from tests.conftest import ROOT, Server, make_settings
from tests.declared import NOON, Declared
from tests.fakes import expected_supervision
from tests.lanes import at_work
from tests.roles import Roles

pytestmark = pytest.mark.parametrize("shared_server", ["valkey"], indirect=True)  # on both: test_backfill_rows.py
HOUR = timedelta(hours=1)
SHIFTS = {"s1": 1.0, "s2": 2.0, "s3": 3.0}
TRAINED = {"s1": NOON, "s2": NOON + 24 * HOUR, "s3": NOON + 48 * HOUR}


def example(number: int) -> dict[str, Any]:
    """An example every six hours from a day before s1 on: every eighth lies at a trained_through exactly."""
    return {
        "example_id": f"e{number}", "event_time": NOON - 24 * HOUR + (number % 20) * 6 * HOUR,
        "price": float(number % 7), "user_id": f"u{number % 5}", "item": number % 11,
    }  # fmt: skip


def newest(row: Mapping[str, Any]) -> str | None:
    return max((name for name, through in TRAINED.items() if through <= row["event_time"]), default=None)


@dataclass
class Stored:
    """FM f with three snapshots: e0..e39 were there before it, it has scored e40..e79 with s1, and e80..e83 wait."""

    declared: Declared
    sinks: list[Sink] = field(default_factory=list)
    now: float = 0.0

    def fill(self) -> None:
        self.post(0, 40)
        self.settle()
        self.declared.declare_fm("f")
        for name, shift in SHIFTS.items():
            self.publish(name, shift=shift)
        self.declared.activate("f", "s1")
        folder = Path(self.declared.catalog.snapshot("ads", "f", "s1").uri)
        with at_work(self.declared, load_engine(folder, read_manifest(folder), device="cpu")):
            self.post(40, 40)
        self.post(80, 4)
        self.settle()

    def publish(self, name: str, **options: Any) -> None:
        """Let FM f have a validated snapshot."""
        options.setdefault("trained_through", TRAINED.get(name))
        folder = self.declared.register("f", name, **options)
        outputs = read_manifest(folder).outputs.columns()
        self.declared.registry.change(
            snapshot_field("ads", "f", name), SnapshotRecord,
            lambda old: old.model_copy(update={"state": "validated", "trained_through": options["trained_through"]}),
        )  # fmt: skip
        self.change_fm(outputs=outputs)

    def change_fm(self, **changes: Any) -> None:
        self.declared.registry.change(fm_field("ads", "f"), FmRecord, lambda old: old.model_copy(update=changes))

    def post(self, first: int, count: int, **values: Any) -> None:
        rows = [{**example(number), **values} for number in range(first, first + count)]
        digests = keys.digest_array(pa.array([row["example_id"] for row in rows]))
        partitions = keys.partitions_of(digests, self.declared.spec.partitions)
        for partition in set(partitions.tolist()):
            self.declared.append(partition, [row for row, p in zip(rows, partitions, strict=True) if p == partition])

    def settle(self) -> None:
        if not self.sinks:
            context = RoleContext(
                self.declared.settings, role="sink", instance="sink", client=self.declared.client,
                metrics=Metrics("sink"),
            )  # fmt: skip
            self.sinks.append(Sink(context))
        for _ in range(6):
            self.now += 6.0
            self.sinks[0].step(now=self.now)
        assert self.sinks[0].health() == []

    def backfill(
        self,
        *,
        settle: bool = True,
        stopping: threading.Event | None = None,
        on_progress: Callable[[Tally], object] = lambda _: None,
        **options: Any,
    ) -> Tally:
        query = BackfillQuery(
            dataset="ads", fm="f", wait=False,
            **{"first_us": microseconds(NOON - 1000 * HOUR), "end_us": microseconds(NOON + 1000 * HOUR), **options},
        )  # fmt: skip
        declared = self.declared
        run = Backfill(
            declared.settings, declared.client, declared.catalog, query,
            stopping=stopping or threading.Event(), on_progress=on_progress,
        )  # fmt: skip
        tally = run.run()
        if settle:
            self.settle()
        return tally

    def rows(self, table: str = "supervision/f") -> list[dict[str, Any]]:
        place = Path(self.declared.settings.tables_uri) / "ads" / table
        return DeltaTable(str(place)).to_pyarrow_table().to_pylist()

    def said(self) -> list[tuple[str, str]]:
        """What backfills said: example and snapshot."""
        return sorted((row["example_id"], row["snapshot_id"]) for row in self.rows() if row["_is_backfill"])

    def counts(self) -> dict[str, int]:
        declared = self.declared
        now_us = microseconds(NOON)
        found = dataset_status(declared.client, declared.folder, declared.catalog, "ads", now_us=now_us)["fms"]["f"]
        return {name: found[name] for name in ("scored", "failed", "pending", "diverted")}


def expected() -> list[tuple[str, str]]:
    """What the newest usable snapshots have to say, less what s1 has said already and what its worker has to score."""
    wanted = [(example(number), newest(example(number)), number >= 40) for number in range(80)]
    return sorted((row["example_id"], name) for row, name, by_s1 in wanted if name and not (by_s1 and name == "s1"))


@pytest.fixture
def stored(server: Server, tmp_path: Path) -> Iterator[Stored]:
    with server.client() as client:
        settings = make_settings(server, tmp_path, batch_rows=16)
        stored = Stored(Declared(settings, client))
        stored.fill()
        yield stored
        for sink in stored.sinks:
            sink.close()


def test_each_example_is_scored_by_the_newest_snapshot_that_has_not_seen_its_label(stored: Stored) -> None:
    before = stored.counts()

    tally = stored.backfill()

    assert stored.said() == expected()
    made = {row["example_id"]: row for row in stored.rows() if row["_is_backfill"]}
    for name, row in made.items():
        logits, _ = expected_supervision(
            [example(int(name[1:]))], stored.declared.spec, shift=SHIFTS[row["snapshot_id"]]
        )
        assert row["click__logit"] == logits["click"][0]
        assert row["trained_through"] == TRAINED[row["snapshot_id"]] <= row["event_time"]
    too_early = sum(newest(example(number)) is None for number in range(84))
    already = sum(newest(example(number)) == "s1" for number in range(40, 80))
    pending = sum(newest(example(number)) is not None for number in range(80, 84))
    assert (tally.rows, tally.too_early, tally.already, tally.pending, tally.failed) == (
        84, too_early, already, pending, 0,
    )  # fmt: skip
    assert sum(tally.scored.values()) == len(expected()) == 84 - too_early - already - pending
    assert stored.counts() == before


def test_a_second_run_has_nothing_to_do(stored: Stored) -> None:
    first = stored.backfill()
    second = stored.backfill()
    assert (sum(second.scored.values()), second.already) == (0, first.already + len(expected()))
    assert stored.said() == expected()


def test_a_run_that_was_cut_is_completed_by_the_next_without_a_double(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = backfill_run.append_backfill, []

    def cut(*arguments: Any, **options: Any) -> str:
        calls.append(1)
        if len(calls) == 3:
            raise ConnectionError("cut")
        return append(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(backfill_run, "append_backfill", cut)
        with pytest.raises(ConnectionError):
            stored.backfill()
    stored.settle()
    some = stored.said()
    assert 0 < len(some) < len(expected())

    tally = stored.backfill()

    assert stored.said() == expected()
    assert sum(tally.scored.values()) == len(expected()) - len(some)


def test_a_run_that_is_stopped_ends_after_its_batch_and_the_next_completes_it(stored: Stored) -> None:
    stopping = threading.Event()
    stopped = stored.backfill(stopping=stopping, on_progress=lambda tally: tally.scored and stopping.set())
    assert stopped.stopped
    assert 0 < len(stored.said()) < len(expected())
    assert not stored.backfill().stopped
    assert stored.said() == expected()


def test_what_was_appended_and_not_committed_is_not_stored_twice(stored: Stored) -> None:
    stored.backfill(settle=False)
    stored.backfill()
    assert stored.said() == expected()


def test_only_the_event_times_asked_for_are_scored(stored: Stored) -> None:
    first, end = NOON + 6 * HOUR, NOON + 36 * HOUR
    stored.backfill(first_us=microseconds(first), end_us=microseconds(end))
    inside = {f"e{number}" for number in range(80) if first <= example(number)["event_time"] < end}
    assert stored.said() == [(name, snapshot) for name, snapshot in expected() if name in inside]


def test_a_dry_run_counts_what_a_run_would_score_and_writes_nothing(stored: Stored) -> None:
    tally = stored.backfill(dry_run=True)
    assert (sum(tally.scored.values()), stored.said()) == (len(expected()), [])
    assert stored.backfill().scored == tally.scored


def test_a_new_snapshot_says_its_part_beside_what_others_said(stored: Stored) -> None:
    stored.backfill()
    stored.publish("s4", shift=4.0, trained_through=NOON + 12 * HOUR)
    TRAINED_4 = NOON + 12 * HOUR
    tally = stored.backfill()
    mine = {f"e{n}" for n in range(80) if TRAINED_4 <= example(n)["event_time"] < TRAINED["s2"]}
    assert {row for row in stored.said() if row[1] == "s4"} == {(name, "s4") for name in mine}
    assert dict(tally.scored) == {"s4": len(mine)}


def test_the_shadow_scores_no_stored_example(stored: Stored) -> None:
    stored.change_fm(shadow="s3", shadow_share=0.5)
    stored.backfill()
    assert {snapshot for _, snapshot in stored.said()} == {"s1", "s2"}


@pytest.mark.parametrize("poison", ["raise", "nan"])
def test_a_row_that_the_model_fails_on_is_said_and_holds_up_no_other(stored: Stored, poison: str) -> None:
    stored.publish("s4", poison=poison, poison_above=5.5, trained_through=NOON + 72 * HOUR)

    tally = stored.backfill()

    late = [number for number in range(80) if example(number)["event_time"] >= NOON + 72 * HOUR]
    good = sorted((f"e{n}", "s4") for n in late if n % 7 < 6)
    assert [row for row in stored.said() if row[1] == "s4"] == good
    assert (tally.failed, len(tally.reasons) > 0) == (len(late) - len(good), True)


def test_the_workers_outcome_of_a_backfilled_example_is_counted_once_and_enters(stored: Stored) -> None:
    stored.backfill()
    before = stored.counts()
    folder = Path(stored.declared.catalog.snapshot("ads", "f", "s1").uri)
    with at_work(stored.declared, load_engine(folder, read_manifest(folder), device="cpu")):
        pass
    stored.settle()
    assert stored.counts() == {**before, "scored": before["scored"] + 4, "pending": 0}
    assert (before["scored"], before["pending"]) == (40, 4)


def environment(declared: Declared) -> dict[str, str]:
    settings = declared.settings
    return {
        "DAS_REDIS_URL": settings.redis_url.get_secret_value(), "DAS_TABLES_URI": settings.tables_uri,
        "DAS_SNAPSHOTS_URI": settings.snapshots_uri,
    }  # fmt: skip


def test_the_command_waits_for_the_commit_and_says_what_it_did(stored: Stored, tmp_path: Path) -> None:
    stored.sinks.pop().close()
    roles = Roles(stored.declared.settings, tmp_path)
    roles.start("sink", DAS_INSTANCE="another")
    try:
        process = subprocess.run(
            [sys.executable, "-m", "das_service.cli", "backfill", "ads", "--fm", "f", "--from", "2026-02-01", "--to",
             "2026-04-01T00:00:00Z", "--rows-per-second", "10000", "--json"],
            env={**roles_environment(), **environment(stored.declared)}, cwd=ROOT, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
    finally:
        roles.close()
    assert process.returncode == 0, process.stderr
    said = json.loads(process.stdout)
    assert (said["committed"], said["rows"], sum(said["scored"].values())) == (True, 84, len(expected()))
    assert stored.said() == expected()


def roles_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("DAS_")}


RANGE = ("--from", "2026-02-01", "--to", "2026-04-01")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere", "--fm", "f", *RANGE], 1, "there is no dataset 'nowhere'"),
        (["ads", "--fm", "g", *RANGE], 1, "there is no FM 'g' of dataset 'ads'"),
        (["ads", "--fm", "f", *RANGE], 1, "FM 'f' of dataset 'ads' has no snapshot to score with"),
        (["ads", "--fm", "f", "--from", "2026-04-01", "--to", "2026-04-01"], 2, "must be before --to"),
        (["ads", "--fm", "f", *RANGE, "--rows-per-second", "0"], 2, "--rows-per-second must be above 0"),
    ],
)
def test_what_can_not_be_done_is_said_in_one_line(
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    with server.client() as client:
        declared = Declared(make_settings(server, tmp_path), client)
        declared.declare_fm("f")
        for name, value in environment(declared).items():
            monkeypatch.setenv(name, value)
        assert main(arguments) == code
    error = capsys.readouterr().err
    assert (said in error, error.count("\n")) == (True, 1)


def test_a_server_that_lost_its_log_is_refused(
    stored: Stored, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(stored.declared).items():
        monkeypatch.setenv(name, value)
    stored.declared.client.delete(keys.log("ads", 0, "scored:f"))
    assert (main(["ads", "--fm", "f", *RANGE]), "das recover" in capsys.readouterr().err) == (1, True)
