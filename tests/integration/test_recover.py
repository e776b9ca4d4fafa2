"""`das recover` on both servers: what is lost is refused and said, what survives is kept, scoring is made up for."""

import contextlib
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner

from das_service import recover as recovery
from das_service.cli.app import build_app
from das_service.errors import ConflictError, UnavailableError
from das_service.logs import streams
from das_service.recover import Report, recover
from das_service.registry import Registry
from das_service.sink.rescore_plan import read_plan, write_plan
from das_service.sink.sink import Sink
from das_service.up.embedded import free_port
from schemas import keys
from schemas.dataset import example_schema
from schemas.entries import Position, parse_entry
from schemas.supervision import FAILED
from tests.conftest import Server, make_settings
from tests.feeding import DAY_US, NOON, NOON_US, Feeding, names


@pytest.fixture
def feeding(own_server: Server, tmp_path: Path) -> Iterator[Feeding]:
    with own_server.client() as client:
        feeding = Feeding(make_settings(own_server, tmp_path, commit_seconds=0.5), client)
        yield feeding
        feeding.close()


def lose_everything(feeding: Feeding) -> None:
    """The server comes back empty."""
    feeding.client.flushall()


class Rewind:
    """Puts a server back to an earlier state, as a restored copy of its disk does."""

    def __init__(self, server: Server, copy: Path) -> None:
        self._server = server
        self._copy = copy

    def keep(self) -> None:
        self._server.kill()
        shutil.copytree(self._server.folder, self._copy)
        self._server.start()

    def put_back(self) -> None:
        self._server.kill()
        shutil.rmtree(self._server.folder)
        shutil.copytree(self._copy, self._server.folder)
        self._server.start()


def problems(feeding: Feeding) -> set[str]:
    found = streams.check_logs(feeding.client, feeding.folder, "ads")
    return {problem.code for problem in found}


def run(feeding: Feeding, sink: Sink | None = None) -> Sink:
    sink = sink or feeding.sink()
    feeding.run(sink, steps=12)
    return sink


def rescored(feeding: Feeding) -> list[str]:
    return sorted(row["example_id"] for row in feeding.read_group("f", "rescore:f"))


def test_nothing_is_recovered_when_nothing_is_lost(feeding: Feeding) -> None:
    feeding.post_ids(0, 10)
    run(feeding)
    with pytest.raises(ConflictError) as refusal:
        recover(feeding.settings)
    assert refusal.value.code == "nothing_lost"


def test_after_an_empty_server_the_tables_go_on_in_a_new_epoch(feeding: Feeding) -> None:
    feeding.post_ids(0, 10)
    sink = run(feeding)
    feeding.post_ids(10, 15)  # acknowledged, in the lost log alone
    lose_everything(feeding)
    run(feeding, sink)
    assert ["registry" in sink.health()[0], "log_lost" in sink.health()[1]] == [True, True]
    with pytest.raises(UnavailableError, match="recover"):
        Registry(feeding.client, feeding.folder).check()
    report = recover(feeding.settings)
    assert (report.registry_restored, report.epochs, problems(feeding)) == (True, {"ads": 2}, set())
    assert [(log.partition, log.log, log.server_had, log.surviving_entries) for log in report.logs] == [
        (partition, log, None, 0) for partition in (0, 1) for log in ("examples", "labels")
    ]
    feeding.post_ids(5, 20)
    run(feeding, sink)
    assert (sink.health(), feeding.ids("examples"), feeding.kept_rows()) == ([], names(0, 20), 0)
    positions = {row["log_position"] >> 40 for row in feeding.rows("examples")}
    assert positions == {0, 1}


def test_a_sink_that_starts_after_the_loss_says_so(feeding: Feeding) -> None:
    feeding.post_ids(0, 10)
    run(feeding)
    lose_everything(feeding)
    assert "recover" in run(feeding).health()[0]


def test_the_registry_comes_back_from_its_copy(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    run(feeding)
    before = feeding.registry.read_copy()
    lose_everything(feeding)
    recover(feeding.settings)
    after = {key.decode(): value.decode() for key, value in feeding.client.hgetall(keys.REGISTRY).items()}
    assert {**after, "revision": ""} == {**before, "revision": ""}
    assert int(after["revision"]) > int(before["revision"])
    Registry(feeding.client, feeding.folder).check()


def test_one_lost_log_is_enough_and_the_others_are_kept(feeding: Feeding) -> None:
    run(feeding)
    feeding.post_ids(0, 40, chunk_rows=5)
    other = [row for row in names(0, 40) if keys.digests([row.encode()])[8] % 2 == 1]
    feeding.client.delete(keys.log("ads", 0, "examples"))
    assert problems(feeding) == {"log_lost"}
    recover(feeding.settings)
    sink = run(feeding)
    assert (feeding.ids("examples"), sink.health()) == (other, [])
    feeding.post_ids(0, 40)
    run(feeding, sink)
    assert (feeding.ids("examples"), sink.health()) == (names(0, 40), [])


def test_after_a_rewound_server_surviving_entries_are_committed(
    feeding: Feeding, own_server: Server, tmp_path: Path
) -> None:
    rewind = Rewind(own_server, tmp_path / "copy")
    feeding.post_ids(0, 10)
    sink = run(feeding)
    feeding.post_ids(10, 20)
    rewind.keep()
    feeding.post_ids(20, 30)
    feeding.client.set(keys.owner("sink"), "somebody else")  # 10..30 stay in the log
    rewind.put_back()
    feeding.client.hincrby(keys.counters("ads", 0), "epoch", -1)
    assert problems(feeding) == {"log_rewound"}
    report = recover(feeding.settings)
    assert {log.surviving_entries for log in report.logs if log.log == "examples"} == {1}
    run(feeding, sink)
    assert feeding.ids("examples") == names(0, 20)
    feeding.post_ids(25, 35)
    run(feeding, sink)
    assert (feeding.ids("examples"), sink.health()) == (sorted(names(0, 20) + names(25, 35)), [])
    assert feeding.kept_rows() == 0


def test_a_server_behind_the_tables_is_refused_until_it_is_recovered(
    feeding: Feeding, own_server: Server, tmp_path: Path
) -> None:
    rewind = Rewind(own_server, tmp_path / "copy")
    feeding.post_ids(0, 10)
    rewind.keep()
    for first in range(10, 30, 5):
        feeding.post_ids(first, first + 5)
    sink = run(feeding)
    rewind.put_back()
    run(feeding, sink)
    assert "log_rewound" in sink.health()[0]
    recover(feeding.settings)
    run(feeding, sink)
    feeding.post_ids(25, 40)
    run(feeding, sink)
    assert (feeding.ids("examples"), sink.health()) == (names(0, 40), [])
    info = sink.info()["datasets"]["ads"]
    assert (info["rows"], info["duplicates"]) == (40, 5)


def test_examples_whose_scoring_was_lost_are_scored_again(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    feeding.post_ids(0, 10)
    feeding.read_group("f")
    feeding.score("f", names(0, 4))
    feeding.fail("f", ["e4"])
    sink = run(feeding)
    feeding.score("f", ["e5"])  # acknowledged by the worker, in the lost scored log alone
    lose_everything(feeding)
    report = recover(feeding.settings)
    assert report.rescoring == {"ads/f": 1}
    feeding.post_ids(10, 12)
    run(feeding, sink)
    assert rescored(feeding) == names(5, 10)
    assert sorted(row["example_id"] for row in feeding.read_group("f")) == ["e10", "e11"]
    assert read_plan(feeding.folder, "ads", "f").is_done


def test_what_the_surviving_log_still_brings_is_not_scored_twice(
    feeding: Feeding, own_server: Server, tmp_path: Path
) -> None:
    rewind = Rewind(own_server, tmp_path / "copy")
    feeding.declare_fm("f")
    feeding.post_ids(0, 4)
    feeding.read_group("f")
    feeding.score("f", names(0, 3))
    feeding.post_ids(4, 8)
    rewind.keep()
    feeding.post_ids(8, 12)
    sink = run(feeding)  # 0..12 are in the table, 0..3 scored
    rewind.put_back()
    recover(feeding.settings)
    run(feeding, sink)
    assert sorted(row["example_id"] for row in feeding.read_group("f")) == names(4, 8)
    assert rescored(feeding) == sorted(["e3", *names(8, 12)])


def test_an_fm_is_not_given_examples_from_before_its_start(feeding: Feeding) -> None:
    sink = run(feeding)
    feeding.post_ids(0, 5)
    run(feeding, sink)
    feeding.declare_fm("f")
    feeding.post_ids(5, 10)
    run(feeding, sink)
    lose_everything(feeding)
    recover(feeding.settings)
    run(feeding, sink)
    assert rescored(feeding) == names(5, 10)


def lose(feeding: Feeding, kind: str) -> None:
    """One log of all partitions is gone; counters, groups and online values of the server are not."""
    for partition in range(2):
        feeding.client.delete(keys.log("ads", partition, kind))


@pytest.mark.parametrize("is_committed", [True, False])
def test_scores_that_stand_online_are_published_again_as_they_are(feeding: Feeding, *, is_committed: bool) -> None:
    feeding.declare_fm("f")
    feeding.register("f", "s0", "s1")
    sink = run(feeding)
    feeding.post_ids(0, 12)
    feeding.post({"example_id": f"e{i}", "event_time": NOON_US + DAY_US} for i in range(2))  # other examples, unscored
    feeding.read_group("f")
    if is_committed:
        run(feeding, sink)
    feeding.put_online("f", names(0, 5), logit=1.5)
    feeding.put_online("f", names(5, 9), logit=2.5, snapshot=1, scored_at=NOON_US + 7)
    feeding.put_online("f", ["e9"], logit=0.0, state=FAILED)  # its dead letter is lost as well
    lose(feeding, "scored:f")
    lose(feeding, "dead:f")
    recover(feeding.settings)
    run(feeding, sink)
    rows = {row["example_id"]: row for row in feeding.rows("supervision/f")}
    found = {
        name: (row["click__logit"], row["hidden"], row["snapshot_id"], row["scored_at"], row["trained_through"])
        for name, row in rows.items()
    }
    day_before = NOON - timedelta(days=1)
    first = dict.fromkeys(names(0, 5), (1.5, b"wxyz", "s0", NOON, day_before))
    second = dict.fromkeys(names(5, 9), (2.5, b"wxyz", "s1", NOON + timedelta(microseconds=7), day_before))
    assert found == first | second
    assert len(feeding.rows("supervision/f")) == 9
    assert rescored(feeding) == sorted([*names(9, 12), "e0", "e1"])


def test_nothing_is_looked_up_before_all_that_survived_is_committed(own_server: Server, tmp_path: Path) -> None:
    with own_server.client() as client:
        feeding = Feeding(make_settings(own_server, tmp_path, commit_seconds=0.5, commit_event_days=1), client)
        feeding.declare_fm("f")
        sink = run(feeding)
        for day in range(5):
            feeding.post_ids(10 * day, 10 * day + 10, event_time=NOON_US + day * DAY_US)
        feeding.read_group("f")
        lose(feeding, "scored:f")
        recover(feeding.settings)
        for _ in range(8):  # a commit takes one event day
            run(feeding, sink)
        assert rescored(feeding) == names(0, 50)
        feeding.close()


def test_what_was_finished_between_unfinished_entries_is_lost_too(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    sink = run(feeding)
    feeding.post_ids(0, 40, chunk_rows=1)
    feeding.read_group("f", acknowledge=False)
    finished = []
    for partition in range(2):
        name = keys.log("ads", partition, "examples")
        taken = [f"1-{seq}" for seq in range(3, 9)]
        feeding.client.xack(name, keys.group("f"), *taken)
        for entry_id, fields in feeding.client.xrange(name, taken[0], taken[-1]):
            batch = parse_entry(entry_id, fields).batch(example_schema(feeding.spec))
            finished += batch.column("example_id").to_pylist()
    feeding.post_ids(40, 50)  # not read by the FM yet
    lose(feeding, "scored:f")
    recover(feeding.settings)
    run(feeding, sink)
    assert (rescored(feeding), sink.health()) == (sorted(finished), [])


def test_as_many_rows_of_other_examples_do_not_hide_what_is_lost(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    feeding.post_ids(0, 10)
    feeding.read_group("f")
    feeding.score("f", names(5, 15))  # the examples 10..15 are lost with the log, their scores are not
    sink = run(feeding)
    assert len(feeding.rows("supervision/f")) == len(feeding.rows("examples")) == 10
    lose_everything(feeding)
    recover(feeding.settings)
    run(feeding, sink)
    assert rescored(feeding) == names(0, 5)


def test_a_sink_that_feeds_meanwhile_does_not_undo_a_recovery(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    feeding.post_ids(0, 10)
    feeding.read_group("f")
    sink = run(feeding)
    known = read_plan(feeding.folder, "ads", "f")
    lose_everything(feeding)
    recover(feeding.settings)
    write_plan(feeding.folder, "ads", "f", known)  # by a sink that had read it before
    run(feeding, sink)
    assert rescored(feeding) == names(0, 10)


@pytest.mark.parametrize("step", ["write_logs_file", "write_loss", "show_planned", "run_script"])
def test_a_recovery_that_was_cut_can_be_run_again(feeding: Feeding, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    feeding.declare_fm("f")
    feeding.post_ids(0, 10)
    feeding.read_group("f")
    sink = run(feeding)
    lose_everything(feeding)

    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recovery, step, cut)
        with pytest.raises(KeyboardInterrupt):
            recover(feeding.settings)
    assert problems(feeding) != set()
    report = recover(feeding.settings)
    assert report.epochs["ads"] >= 2
    feeding.post_ids(10, 20)
    run(feeding, sink)
    assert (feeding.ids("examples"), sink.health(), rescored(feeding)) == (names(0, 20), [], names(0, 10))


def test_what_survived_is_committed_also_where_the_clock_says_that_it_is_newer(
    own_server: Server, tmp_path: Path
) -> None:
    """The server goes on with another machine's clock; a commit is full of new entries alone."""
    with own_server.client() as client:
        feeding = Feeding(make_settings(own_server, tmp_path, commit_seconds=0.5, commit_rows=5), client)
        sink = run(feeding)
        feeding.post_ids(0, 10)
        log = keys.log("ads", 0, "examples")
        ((entry_id, fields),) = client.xrange(log)
        client.delete(log)
        client.xadd(log, {**fields, b"t": b"%d" % (int(fields[b"t"]) + DAY_US)}, id=entry_id)
        client.delete(keys.log("ads", 1, "examples"))
        recover(feeding.settings)
        is_second = {name: keys.digests([name.encode()])[8] % 2 == 1 for name in names(0, 60)}
        feeding.post(({"example_id": name} for name, second in is_second.items() if second), chunk_rows=5)
        for _ in range(3):
            run(feeding, sink)
        first = [name for name in names(0, 10) if not is_second[name]]
        assert feeding.ids("examples") == sorted([*first, *(name for name, second in is_second.items() if second)])
        assert (sink.health(), feeding.kept_rows()) == ([], 0)
        feeding.close()


def test_a_new_epoch_is_later_than_all_that_the_tables_know(feeding: Feeding) -> None:
    feeding.post_ids(0, 10)
    run(feeding)
    old = feeding.folder.read("ads/_das/logs.json")
    assert old is not None
    for _ in range(2):
        lose_everything(feeding)
        recover(feeding.settings)
        feeding.post_ids(0, 10)
        run(feeding)
    feeding.folder.write("ads/_das/logs.json", old)  # put back from an older copy than the tables
    lose_everything(feeding)
    assert recover(feeding.settings).epochs == {"ads": 4}


def test_a_server_and_a_record_of_logs_that_are_older_than_the_tables_are_refused(
    feeding: Feeding, own_server: Server, tmp_path: Path
) -> None:
    rewind = Rewind(own_server, tmp_path / "copy")
    feeding.post_ids(0, 10)
    run(feeding)
    old = feeding.folder.read("ads/_das/logs.json")
    assert old is not None
    rewind.keep()
    lose_everything(feeding)
    recover(feeding.settings)
    feeding.post_ids(10, 20)
    sink = run(feeding)
    rewind.put_back()
    feeding.folder.write("ads/_das/logs.json", old)
    assert problems(feeding) == {"log_rewound"}
    assert recover(feeding.settings).epochs == {"ads": 3}
    feeding.post_ids(15, 25)
    run(feeding, sink)
    assert (sink.health(), feeding.ids("examples")) == ([], names(0, 25))


@pytest.mark.parametrize("step", ["run_script", "show_planned"])  # before the epoch is raised, and after that
def test_of_two_recoveries_at_once_one_gives_up_and_nothing_is_undone(
    feeding: Feeding, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    feeding.declare_fm("f")
    feeding.post_ids(0, 10)
    sink = run(feeding)
    lose_everything(feeding)
    whole = getattr(recovery, step)

    def other_first(*args: Any) -> Any:
        monkeypatch.setattr(recovery, step, whole)
        recover(feeding.settings)
        feeding.post_ids(10, 30, chunk_rows=1)
        run(feeding, sink)
        return whole(*args)

    monkeypatch.setattr(recovery, step, other_first)
    with pytest.raises(ConflictError) as refusal:
        recover(feeding.settings)
    assert (refusal.value.code, problems(feeding)) == ("busy", set())
    feeding.post_ids(30, 40)
    run(feeding, sink)
    assert (sink.health(), feeding.ids("examples")) == ([], names(0, 40))


def test_groups_and_generations_are_made_again(feeding: Feeding) -> None:
    feeding.declare_fm("f")
    run(feeding)
    lose_everything(feeding)
    recover(feeding.settings)
    groups = streams.read_groups(feeding.client, "ads", range(2), "examples")
    assert {partition: list(found) for partition, found in groups.items()} == {0: ["fm:f"], 1: ["fm:f"]}
    assert feeding.client.get(keys.generation("ads", 0, "f")) == b"0"


def test_the_report_can_be_read(feeding: Feeding) -> None:
    feeding.post_ids(0, 10)
    run(feeding)
    with contextlib.suppress(redis.exceptions.ResponseError):
        lose_everything(feeding)
    report: Report = recover(feeding.settings)
    lines = str(report).splitlines()
    assert lines[:2] == ["the registry was restored from its copy", "dataset ads goes on in epoch 2"]
    assert f"the table has it up to {Position(epoch=1, seq=0).entry_id}" in lines[2]


def test_a_server_that_is_not_there_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAS_REDIS_URL", f"redis://127.0.0.1:{free_port()}")
    monkeypatch.setenv("DAS_TABLES_URI", str(tmp_path))
    result = CliRunner().invoke(build_app(), ["recover", "--yes"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("das: the server of the logs or the tables' folder can't be used")
