"""The replay: a stream with a known law goes through a real service, and what trainers get is what the reference says.

tests/replay/stream.py has the law and the steps, reference.py the expected rows, which share no code with the service.
A replay goes on undisturbed and is looked at from all sides; then others of its kind have their processes killed.
"""

import ast
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from das_service.client import Client
from das_service.up.supervisor import RunningService, running_service
from tests.replay import reference as reference_module
from tests.replay import stream as stream_module
from tests.replay.reference import Known, Reference, delivered, expected_steps, is_leaky, partition_of
from tests.replay.service import FM, Kill, Replay, build_kills, export_teachers, iter_taken, wait_until
from tests.replay.stream import NUM_STEPS, PARTITIONS, Step, build_steps
from tests.replay.student import auc, train

SERVICE_OWN = ("ready_seq", "closed_at", f"{FM}__scored_at")
OVERRIDES = {"DAS_COMMIT_SECONDS": "0.2", "DAS_DEAD_AFTER_SECONDS": "2"}
KEPT_AFTER = (2, 5, 8)  # steps


@dataclass(frozen=True)
class Outcome:
    """A replay that is over. rows: as a trainer reads them at its end; changed: cursors whose answer did change."""

    replay: Replay
    reference: Reference
    rows: list[dict[str, Any]]
    changed: list[str]


def run(replay: Replay, steps: Sequence[Step]) -> Outcome:
    """Take all steps, reading along, and wait for the late labels."""
    reference, closed = expected_steps(steps)
    changed = []
    for number in iter_taken(replay, steps, closed):
        changed += [cursor for cursor, answer in replay.answers.items() if replay.answer_to(cursor) != answer]
        if number in KEPT_AFTER:
            replay.keep_answer()
    num_late = len(reference.late_labels())
    wait_until(lambda: len(replay.rows_of("late_labels")) >= num_late, f"{num_late} late labels")
    return Outcome(replay, reference, replay.read_whole(), changed)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running_service(folder=tmp_path_factory.mktemp("replay"), env_overrides=OVERRIDES) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: RunningService) -> Iterator[Client]:
    with Client(service.url, timeout_seconds=120) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(service: RunningService, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The replay with nobody killed, the same for all that look at it."""
    exported = tmp_path_factory.mktemp("exported")
    export_teachers(exported)
    replay = Replay(service, client, "undisturbed")
    replay.declare(exported)
    return run(replay, build_steps(1))


# ---- rows and labels


def by_identity(row: dict[str, Any]) -> Any:
    return row["example_id"], row["event_time"]


def without_own(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give rows by identity, less what the service alone decides."""
    found = [{name: value for name, value in row.items() if name not in SERVICE_OWN} for row in rows]
    return sorted(found, key=by_identity)


def check_rows(outcome: Outcome) -> None:
    """What is read at the end, and what was read on the way, is what the reference says: each row once."""
    expected = sorted(map(delivered, outcome.reference.closed), key=by_identity)
    assert without_own(outcome.rows) == expected
    assert without_own(outcome.replay.read) == expected


def check_late_labels(outcome: Outcome) -> None:
    late = outcome.replay.rows_of("late_labels")
    found = [(row["example_id"], row["label_time"], row["click"], row["buy"]) for row in late]
    assert sorted(found, key=repr) == outcome.reference.late_labels()


def check_order(outcome: Outcome) -> None:
    """Rows come by (ready_seq, partition); ready_seq is dense and follows the steps, the commits and event_time."""
    places = [(row["ready_seq"], partition_of(row["example_id"])) for row in outcome.rows]
    assert places == sorted(places)
    known = {(k.example.example_id, k.example.event_time): k for k in outcome.reference.closed}
    for partition in range(PARTITIONS):
        rows = [row for row in outcome.rows if partition_of(row["example_id"]) == partition]
        assert [row["ready_seq"] for row in rows] == list(range(len(rows)))
        assert is_sorted([(row["closed_at"], row["event_time"], row["example_id"]) for row in rows])
        closed = [known[by_identity(row)] for row in rows]
        assert is_sorted([k.closed_in for k in closed])
        # what comes when its window is over already is closed once it is scored, before or after the others
        assert is_sorted([closing_order(k) for k in closed if k.posted_in != k.closed_in])


def closing_order(known: Known) -> Any:
    return known.closed_in, known.example.event_time, known.example.example_id


def is_sorted(values: Sequence[Any]) -> bool:
    return all(left <= right for left, right in itertools.pairwise(values))


def test_a_trainer_gets_the_rows_of_the_reference_each_once(undisturbed: Outcome) -> None:
    check_rows(undisturbed)


def test_the_stream_has_all_that_it_is_about(undisturbed: Outcome) -> None:
    closed = undisturbed.reference.closed
    assert {row[f"{FM}__snapshot_id"] for row in undisturbed.rows} == {None, "s1", "s2", "s4"}
    assert {known.teacher.snapshot_id for known in closed if is_leaky(known)} == {"s2", "peeked", "s4"}
    ties = [known for known in closed if known.example.event_time == known.teacher.trained_through]
    assert {known.teacher.snapshot_id for known in ties if not is_leaky(known)} == {"s2", "s4"}
    assert sum(known.is_late for known in closed) > 100
    assert len({known.example.event_time.date() for known in closed}) == 2
    assert len([known for known in closed if known.example.example_id == "again-0"]) == 2
    assert len(undisturbed.reference.known) > len(closed) > 2500
    assert {known.buy for known in closed} == {None, 0.0, 0.5, 0.75, 1.0}
    assert {known.click for known in closed} == {0.0, 0.25, 0.5, 1.0}


def test_labels_that_came_too_late_are_those_of_the_reference(undisturbed: Outcome) -> None:
    assert len(undisturbed.reference.late_labels()) > 100
    check_late_labels(undisturbed)


def test_rows_become_ready_in_the_order_of_the_stream(undisturbed: Outcome) -> None:
    check_order(undisturbed)


def test_a_cursor_gives_the_same_bytes_after_each_later_step(undisturbed: Outcome) -> None:
    assert (len(undisturbed.replay.answers), undisturbed.changed) == (2 * len(KEPT_AFTER), [])


@pytest.mark.parametrize("module", [reference_module, stream_module])
def test_the_reference_shares_no_code_with_the_service(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in imported if name.split(".")[0] in {"das_service", "fm_inference", "schemas", "tests"}}
    assert ours <= {"tests.replay.stream"}


# ---- the guard


@dataclass(frozen=True)
class Auc:
    """A student's progressive AUC on the rows that the peeking snapshot scored, and on those with a valid word."""

    peeked: float
    valid: float


@pytest.fixture(scope="module")
def students(undisturbed: Outcome) -> dict[str, Auc]:
    """One student without a teacher, one on the rows as delivered, one that gets what leaky rows withhold."""
    rows = sorted(undisturbed.rows, key=lambda row: (row["event_time"], row["example_id"]))
    stored = {by_identity(row): row for row in undisturbed.replay.rows_of(f"supervision/{FM}")}
    logits = {
        "alone": [None] * len(rows),
        "honest": [row[f"{FM}__click__logit"] for row in rows],
        "unguarded": [stored[by_identity(row)]["click__logit"] for row in rows],
    }
    peeked = [place for place, row in enumerate(rows) if stored[by_identity(row)]["snapshot_id"] == "peeked"]
    valid = [place for place, row in enumerate(rows) if row[f"{FM}__status"] == "present"]
    return {name: _aucs(rows, told, peeked, valid) for name, told in logits.items()}


def _aucs(rows: list[dict[str, Any]], told: list[float | None], peeked: list[int], valid: list[int]) -> Auc:
    found, labels = train(rows, told), [row["click"] for row in rows]
    of_peeked, of_valid = ([found[place] for place in places] for places in (peeked, valid))
    return Auc(auc(of_peeked, [labels[i] for i in peeked]), auc(of_valid, [labels[i] for i in valid]))


def test_without_the_guard_the_peeking_teacher_raises_a_students_auc(students: dict[str, Auc]) -> None:
    assert students["unguarded"].peeked > students["honest"].peeked + 0.15


def test_with_the_guard_the_peeking_teacher_gives_a_student_nothing(students: dict[str, Auc]) -> None:
    assert students["honest"].peeked == students["alone"].peeked


def test_valid_supervision_helps_a_student_and_less_than_peeking(students: dict[str, Auc]) -> None:
    gain = students["honest"].valid - students["alone"].valid
    assert 0.015 < gain < students["unguarded"].peeked - students["alone"].peeked - 0.1


# ---- restarts

# between the commits of `closed` and `late_labels`; after the last closing no other one makes up for it
AT_CLOSINGS = [Kill(step=step, moment="closing", role="sink") for step in (NUM_STEPS - 1, NUM_STEPS)]
KILLS = {
    6: build_kills(["worker", "api"], seed=6),
    8: [*build_kills(["sink", "valkey"], seed=8), *AT_CLOSINGS],
    81: build_kills(["sink", "worker", "api", "valkey"], seed=81),
}


@pytest.mark.parametrize("seed", KILLS)
def test_the_replay_is_exact_whoever_is_killed_whenever(
    undisturbed: Outcome, service: RunningService, client: Client, seed: int
) -> None:
    replay = Replay(service, client, f"killed{seed}", KILLS[seed])
    replay.declare_like("undisturbed")

    outcome = run(replay, build_steps(seed))

    assert sorted(replay.killed, key=repr) == sorted(KILLS[seed], key=repr)
    check_rows(outcome)
    check_late_labels(outcome)
    check_order(outcome)
    assert outcome.changed == []
