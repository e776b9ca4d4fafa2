"""The offline join over real Delta tables: whatever the tables and the caller's rows, it equals a plain reference."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from das_service.errors import InvalidRowsError, UnavailableError, UnknownNameError
from das_service.folder import Folder
from das_service.sink.compaction import compact_step
from das_service.supervision.answer import STATUSES, LookupQuery
from das_service.supervision.join import OfflineJoin
from das_service.supervision.windows import FileRows, Rows, iter_windows
from das_service.tables.duck import Duck
from schemas.dataset import TIMESTAMP, DatasetSpec
from schemas.snapshot import OutputColumns
from tests.joining import (
    BASE_US,
    DAY_US,
    SECOND_US,
    Failed,
    Fm,
    Said,
    batches_of,
    caller_table,
    catalog_of,
    day_of,
    expected_row,
    files_of,
    write_tables,
)

RICH = OutputColumns(
    tasks=("click", "row"),
    embeddings={"hidden": (2, "float16"), "row": (3, "int8"), "a": (1, "float32"), "s": (3, "int4")},
)
PLAIN = OutputColumns(tasks=("click",), embeddings={})
IDS = ["a", "a", "a", "b", "b", "é✓", "a'b", "nul\0", "x" * 256, ""]
IMPOSTORS = ["zz", "a ", "A"]  # nobody asks for them; their rows carry the hash of an id that somebody asks for
TIMES = st.builds(
    lambda day, moment: BASE_US + day * DAY_US + moment,
    st.sampled_from([0, 0, 0, 1, 2, 3, -70]),
    st.sampled_from([0, 1, 43_200 * SECOND_US, DAY_US - 1]),
)
THROUGH = st.builds(lambda time, shift: time + shift, TIMES, st.sampled_from([-80 * DAY_US, -1, 0, 1]))
ID_TYPES = [
    pa.string(), pa.large_string(), pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
]  # fmt: skip
TIME_TYPES = [TIMESTAMP, pa.timestamp("ms", "UTC"), pa.timestamp("ns", "Asia/Kolkata"), pa.timestamp("s", "+01:00")]
ODD_NAMES = [
    "plain.parquet", "it's.parquet", "[ab].parquet", "*.parquet", "?.parquet", "a[*]?.parquet", "ü ✓.parquet",
    "back\\slash.parquet", '"double".parquet', "{a,b}.parquet", "50%25.parquet", "event_day=2026-02-27/x.parquet",
    "example_id=a/x.parquet", "no ending", "**/x.parquet", "~/x.parquet", "]x[.parquet", "new\nline*.parquet",
]  # fmt: skip


@pytest.fixture(scope="module")
def duck() -> Iterator[Duck]:
    duck = Duck(memory_bytes=256 * 1024 * 1024, threads=2, joins_as_written=True)
    yield duck
    duck.close()


def spec_of(granularity: str) -> DatasetSpec:
    features = [{"name": "price", "type": "float"}]
    return DatasetSpec.model_validate({"features": features, "partitions": 2, "table_granularity": granularity})


@dataclass(frozen=True)
class Case:
    """Tables, a caller's rows, and what is asked of them."""

    spec: DatasetSpec
    fms: list[Fm]
    rows: list[tuple[str, int]]
    query: LookupQuery


def commits_of(rows: st.SearchStrategy[Any]) -> st.SearchStrategy[list[list[Any]]]:
    """Give rows in commits, so that a day has several files; often none, so that there is no table."""
    commit = st.lists(rows, min_size=3, max_size=15)
    return st.one_of(st.just([]), st.lists(commit, min_size=1, max_size=3), st.lists(commit, min_size=2, max_size=3))


@st.composite
def fms_of(draw: st.DrawFn, name: str, outputs: OutputColumns, granularity: str) -> Fm:
    """Give an FM and its tables: a snapshot says one thing of an example (I2), outcomes at one time, backfills too."""
    through = {snapshot_id: draw(THROUGH) for snapshot_id in draw(st.permutations(["s10", "s2", "B"]))}
    said = st.builds(
        Said,
        example_id=st.sampled_from([*IDS, *IMPOSTORS]),
        event_time=TIMES,
        snapshot_id=st.sampled_from(sorted(through)),
        scored_at=st.sampled_from([BASE_US, BASE_US + 1, BASE_US - DAY_US]),
        number=st.integers(0, 2**20),
        is_backfill=st.booleans(),
    )
    kept: dict[tuple[Any, ...], Said] = {}
    times: dict[tuple[Any, ...], int] = {}
    commits: list[list[Said]] = []
    for drawn in draw(commits_of(said)):
        commits.append([])
        for row in drawn:
            example = (row.example_id, day_of(row.event_time, granularity))
            hash_of = "a" if row.example_id in IMPOSTORS else None
            time = times.setdefault((*example, row.is_backfill), row.event_time)
            one = row._replace(event_time=time, hash_of=hash_of)
            if kept.setdefault((*example, row.snapshot_id), one) is one:
                commits[-1].append(one)
    failed = st.builds(Failed, example_id=st.sampled_from(IDS), event_time=TIMES)
    return Fm(name, outputs, through, [commit for commit in commits if commit], draw(commits_of(failed)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    granularity = draw(st.sampled_from(["day", "day", "week", "month"]))
    fms = [draw(fms_of("f", RICH, granularity)), draw(fms_of("g_2", PLAIN, granularity))]
    caller_times = TIMES.map(lambda time: time - time % SECOND_US)
    query = LookupQuery(
        fms=draw(st.sampled_from([("f",), ("f", "g_2"), ("g_2", "f")])),
        outputs=draw(st.sampled_from([None, None, ("click",), ("row", "s"), ("hidden", "click", "a")])),
        embedding_format=draw(st.sampled_from(["encoded", "float16", "float32"])),
        max_freshness_gap_seconds=draw(st.sampled_from([None, None, 0.0, 86_400.0, 0.000001, 1e12])),
    )
    rows = draw(st.lists(st.tuples(st.sampled_from(IDS), caller_times), min_size=4, max_size=40))
    return Case(spec_of(granularity), fms, rows, query)


def join_all(case: Case, folder: Folder, duck: Duck, rows: Iterator[Rows], *, window_rows: int) -> pa.Table:
    """Give what the join adds to all rows; its schema is what it said before."""
    join = OfflineJoin(duck, folder, catalog_of(case.spec, case.fms), "ads", case.query, client=None)
    added = []
    for window in iter_windows(rows, most_rows=window_rows, granularity=case.spec.table_granularity):
        joined = join.join(window)
        added.append(joined.columns)
        for fm, counts in joined.counts.items():
            told = joined.columns[f"{fm}__status"].to_pylist()
            assert counts.tolist() == [told.count(status) for status in STATUSES]
    assert {table.schema for table in added} == {join.schema}
    return pa.concat_tables(added)


def expected(case: Case) -> list[dict[str, Any]]:
    """Give the rows of the plain reference, columns in their order."""
    fms = {fm.name: fm for fm in case.fms}
    outputs = case.query.outputs or ("click", *RICH.tasks, *RICH.embeddings)
    return [
        {
            name: value
            for fm in case.query.fms
            for name, value in expected_row(
                fms[fm], case.spec, row, gap_seconds=case.query.max_freshness_gap_seconds,
                form=case.query.embedding_format, outputs=outputs,
            ).items()
        }
        for row in case.rows
    ]  # fmt: skip


def write_case(case: Case, root: Path, *, compacted: bool = False) -> Folder:
    folder = Folder(str(root / "example_id=a" / "snapshot_id=B" / "it's [the] tables *"))
    for fm in case.fms:
        for table in write_tables(folder, case.spec, fm):
            while compacted and compact_step(table, most_small_files=2, target_bytes=1 << 20):
                pass
    return folder


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    case=cases(),
    window_rows=st.integers(1, 45),
    piece_rows=st.integers(1, 45),
    types=st.tuples(st.sampled_from(ID_TYPES), st.sampled_from(TIME_TYPES)),
    names=st.lists(st.sampled_from(ODD_NAMES), min_size=1, max_size=3, unique=True),
    compacted=st.booleans(),
)
def test_the_join_equals_the_plain_reference(
    tmp_path_factory: pytest.TempPathFactory,
    duck: Duck,
    case: Case,
    window_rows: int,
    piece_rows: int,
    types: tuple[pa.DataType, pa.DataType],
    names: list[str],
    compacted: bool,
) -> None:
    root = tmp_path_factory.mktemp("join")
    folder = write_case(case, root, compacted=compacted)
    table = caller_table(case.rows, id_type=types[0], time_type=types[1])
    wanted = expected(case)

    from_batches = join_all(case, folder, duck, iter(batches_of(table, batch_rows=piece_rows)), window_rows=window_rows)
    files = files_of(table, [root / "mine" / name for name in names], group_rows=piece_rows)
    from_files = join_all(case, folder, duck, files, window_rows=window_rows)

    assert from_batches.column_names == list(wanted[0])
    assert from_batches.to_pylist() == wanted
    assert from_files.to_pylist() == wanted


NOON_US = BASE_US + DAY_US // 2
OLD = {"s1": NOON_US - DAY_US}
HAND = spec_of("day")


def said(example_id: str, snapshot_id: str = "s1", *, scored_at: int = NOON_US, number: int = 1) -> Said:
    return Said(example_id, NOON_US, snapshot_id, scored_at, number)


def answers(duck: Duck, folder: Folder, fm: Fm, ids: list[str], *, time: int = NOON_US, **asked: Any) -> list[Any]:
    """Give (status, snapshot, logit) of ids that all have one time."""
    case = Case(HAND, [fm], [(name, time) for name in ids], LookupQuery(fms=("f",), **asked))
    rows = iter(batches_of(caller_table(case.rows), batch_rows=10))
    table = join_all(case, folder, duck, rows, window_rows=10)
    names = ("f__status", "f__snapshot_id", "f__click__logit")
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def written(folder: Folder, fm: Fm) -> Fm:
    write_tables(folder, HAND, fm)
    return fm


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "tables"))


def test_each_status_of_the_contract_by_hand(duck: Duck, folder: Folder) -> None:
    through = {"fresh": NOON_US, "after": NOON_US + 1, "old": NOON_US - DAY_US}
    rows = [said("tie", "fresh"), said("late", "after"), said("old", "old"), said("scored after all", number=5)]
    rows[3] = rows[3]._replace(snapshot_id="fresh")
    dead = [Failed("dead", NOON_US), Failed("scored after all", NOON_US), Failed("late", NOON_US)]
    fm = written(folder, Fm("f", PLAIN, through, [rows], [dead]))

    found = answers(
        duck, folder, fm, ["tie", "late", "old", "dead", "scored after all", "nobody", "tie"],
        max_freshness_gap_seconds=3600.0,
    )  # fmt: skip

    assert found == [
        ("present", "fresh", 1.0), ("leaky", None, None), ("stale", None, None), ("failed", None, None),
        ("present", "fresh", 5.0), ("missing", None, None), ("present", "fresh", 1.0),
    ]  # fmt: skip


def test_the_earliest_scored_valid_snapshot_counts_and_of_two_the_smaller_id(duck: Duck, folder: Folder) -> None:
    through = {"s2": NOON_US, "s10": NOON_US, "leaky": NOON_US + 1}
    first = [said("a", "s2", scored_at=7, number=2), said("b", "s10", scored_at=9, number=10), said("c", "leaky")]
    second = [said("a", "s10", scored_at=7, number=10), said("b", "s2", scored_at=8, number=2)]
    second += [said("c", "s2", scored_at=NOON_US + 9, number=2)]
    fm = written(folder, Fm("f", PLAIN, through, [first, second]))

    found = answers(duck, folder, fm, ["a", "b", "c"])

    assert found == [("present", "s10", 10.0), ("present", "s2", 2.0), ("present", "s2", 2.0)]


def test_what_is_not_handed_out_is_not_in_a_buffer_either(duck: Duck, folder: Folder) -> None:
    fm = written(folder, Fm("f", RICH, {"after": NOON_US + 1}, [[said("a", "after", number=77)]]))
    case = Case(HAND, [fm], [("a", NOON_US)] * 3, LookupQuery(fms=("f",), embedding_format="encoded"))

    (batch,) = join_all(
        case, folder, duck, iter(batches_of(caller_table(case.rows), batch_rows=3)), window_rows=3
    ).to_batches()

    values = [column for name, column in zip(batch.schema.names, batch.columns, strict=True) if name != "f__status"]
    indices = [column.indices if pa.types.is_dictionary(column.type) else column for column in values]
    assert {bytes(column.buffers()[1]).strip(b"\0") for column in indices} == {b""}
    assert batch["f__status"].to_pylist() == ["leaky"] * 3


def test_an_example_of_another_event_day_is_another_example(duck: Duck, folder: Folder) -> None:
    fm = written(folder, Fm("f", PLAIN, OLD, [[said("a"), said("a")._replace(event_time=NOON_US + DAY_US, number=2)]]))

    assert answers(duck, folder, fm, ["a"], time=NOON_US - NOON_US % DAY_US) == [("present", "s1", 1.0)]
    assert answers(duck, folder, fm, ["a"], time=NOON_US + DAY_US) == [("present", "s1", 2.0)]
    assert answers(duck, folder, fm, ["a"], time=NOON_US - DAY_US) == [("missing", None, None)]


def test_an_example_is_found_by_its_day_when_the_caller_has_another_time_of_it(duck: Duck, folder: Folder) -> None:
    """Also of several snapshots, beside rows that are found at their times and one that has no supervision."""
    through = {"fresh": NOON_US, "after": NOON_US + 1, "old": NOON_US - DAY_US}
    early, noon = NOON_US - DAY_US // 4, NOON_US
    rows = [
        said("moved", "after", scored_at=NOON_US, number=1),
        said("moved", "old", scored_at=NOON_US + 2, number=2),
        said("moved", "fresh", scored_at=NOON_US + 1, number=3),
        said("there", "fresh", number=4)._replace(event_time=early),
    ]
    fm = written(folder, Fm("f", PLAIN, through, [rows[:2], rows[2:]]))
    join = OfflineJoin(duck, folder, catalog_of(HAND, [fm]), "ads", LookupQuery(fms=("f",)), client=None)
    table = caller_table([("moved", early + 1), ("there", early), ("nobody", early), ("moved", noon - 1)])

    (window,) = iter_windows(iter(batches_of(table, batch_rows=10)), most_rows=10, granularity="day")
    found = join.join(window).columns

    assert found["f__status"].to_pylist() == ["present", "leaky", "missing", "present"]
    assert found["f__snapshot_id"].to_pylist() == ["fresh", None, None, "fresh"]


def test_what_counts_of_outcome_and_backfill_does_not_depend_on_the_other_rows(duck: Duck, folder: Folder) -> None:
    """An example was sent with two times: its outcome has one of them, what a backfill said the stored one."""
    live = said("a", "live")._replace(event_time=NOON_US + 9)
    back = said("a", "back", scored_at=NOON_US + 1)._replace(is_backfill=True)
    fm = written(folder, Fm("f", PLAIN, {"live": NOON_US - 1, "back": NOON_US - 1}, [[live], [back]]))
    join = OfflineJoin(duck, folder, catalog_of(HAND, [fm]), "ads", LookupQuery(fms=("f",)), client=None)

    for others in ([], [("b", NOON_US + 20)]):
        rows = iter(batches_of(caller_table([("a", NOON_US), *others]), batch_rows=10))
        (window,) = iter_windows(rows, most_rows=10, granularity="day")
        assert join.join(window).columns["f__snapshot_id"].to_pylist()[0] == "live"


def test_tables_that_are_not_there_yet_are_missing_rows(duck: Duck, folder: Folder) -> None:
    assert answers(duck, folder, Fm("f", PLAIN, OLD), ["a", "b"]) == [("missing", None, None)] * 2


def test_an_fm_without_a_snapshot_gives_its_status_alone(duck: Duck, folder: Folder) -> None:
    fm = written(folder, Fm("f", PLAIN, {}, [], [[Failed("dead", NOON_US)]]))
    catalog = catalog_of(HAND, [fm])
    bare = catalog.fm("ads", "f").model_copy(update={"outputs": None})
    catalog.fms["ads"]["f"] = bare
    join = OfflineJoin(duck, folder, catalog, "ads", LookupQuery(fms=("f",)), client=None)
    rows = batches_of(caller_table([("dead", NOON_US), ("a", NOON_US)]), batch_rows=9)
    (window,) = iter_windows(rows, most_rows=9, granularity="day")

    assert join.join(window).columns.to_pylist() == [{"f__status": "failed"}, {"f__status": "missing"}]


def test_the_join_sees_the_tables_as_they_were_when_it_was_made(duck: Duck, folder: Folder) -> None:
    fm = Fm("f", PLAIN, OLD, [[said("a")], [said("b")], [said("c")]])
    (table,) = write_tables(folder, HAND, fm)
    join = OfflineJoin(duck, folder, catalog_of(HAND, [fm]), "ads", LookupQuery(fms=("f",)), client=None)
    assert compact_step(table, most_small_files=2, target_bytes=1 << 20) == 3
    table.vacuum()
    rows = batches_of(caller_table([("a", NOON_US), ("b", NOON_US)]), batch_rows=9)
    (window,) = iter_windows(rows, most_rows=9, granularity="day")

    assert join.join(window).columns["f__status"].to_pylist() == ["present"] * 2


def test_a_snapshot_that_the_registry_does_not_know_yet_is_told_and_not_guessed(duck: Duck, folder: Folder) -> None:
    written(folder, Fm("f", PLAIN, {"s1": 0, "s2": 0}, [[said("a", "s2")]]))

    with pytest.raises(UnavailableError, match="try again") as caught:
        answers(duck, folder, Fm("f", PLAIN, {"s1": 0}), ["a"])

    assert caught.value.code == "registry_behind"


def test_names_that_are_not_declared_are_refused(duck: Duck, folder: Folder) -> None:
    catalog = catalog_of(HAND, [Fm("f", PLAIN, OLD)])

    def ask(dataset: str, **asked: Any) -> None:
        OfflineJoin(duck, folder, catalog, dataset, LookupQuery(**asked), client=None)

    with pytest.raises(UnknownNameError, match="dataset 'nope'"):
        ask("nope", fms=("f",))
    with pytest.raises(UnknownNameError, match="FM 'nope' of dataset 'ads'"):
        ask("ads", fms=("f", "nope"))
    with pytest.raises(InvalidRowsError, match="output nope; there are click"):
        ask("ads", fms=("f",), outputs=("click", "nope"))


def test_files_are_read_by_their_very_names(duck: Duck, folder: Folder, tmp_path: Path) -> None:
    decoys = ["a.parquet", "b.parquet", "ab.parquet", "y/x.parquet", "x.parquet", "new line.parquet"]
    parts = []
    for number, name in enumerate([*decoys, *ODD_NAMES]):
        parts += files_of(caller_table([(f"e{number}", NOON_US)]), [tmp_path / name], group_rows=1)
    mine = parts[len(decoys) :]
    rows = [(f"e{number}", NOON_US) for number in range(len(decoys), len(parts))]
    fm = written(folder, Fm("f", PLAIN, OLD, [[said(f"e{number}", number=number) for number in range(len(parts))]]))
    case = Case(HAND, [fm], rows, LookupQuery(fms=("f",)))

    assert join_all(case, folder, duck, iter(mine), window_rows=100).to_pylist() == expected(case)


@pytest.mark.parametrize("column", ["row", "EVENT_TIME", "filename", "file_index", "asked", ""])
def test_columns_of_the_caller_do_not_get_in_the_way_of_a_file(
    duck: Duck, folder: Folder, tmp_path: Path, column: str
) -> None:
    fm = written(folder, Fm("f", PLAIN, OLD, [[said(f"e{number}", number=number) for number in range(5)]]))
    case = Case(HAND, [fm], [(f"e{number}", NOON_US) for number in range(4, -1, -1)], LookupQuery(fms=("f",)))
    table = caller_table(case.rows).add_column(0, column, pa.array(["e0"] * 5))
    pq.write_table(table, tmp_path / "mine.parquet")
    rows = FileRows(path=str(tmp_path / "mine.parquet"), first=0, event_time=np.full(5, NOON_US))

    assert join_all(case, folder, duck, iter([rows]), window_rows=100).to_pylist() == expected(case)
