"""`das augment`: Parquet files in, the same rows in the same order out with supervision appended, or nothing at all."""

import contextlib
import fcntl
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from das_service.cli.app import build_app
from das_service.client import Client, DasClientError
from das_service.folder import Folder
from das_service.registry import COPY, dataset_field, fm_field, snapshot_field
from das_service.supervision.answer import LookupQuery
from das_service.supervision.augment_files import augment_files, list_sources, refuse_unfit
from das_service.supervision.join import OfflineJoin
from das_service.tables.duck import Duck
from das_service.up.embedded import free_port
from schemas.dataset import DatasetSpec
from schemas.snapshot import OutputColumns
from tests.conftest import ROOT
from tests.joining import (
    BASE_US,
    DAY_US,
    Failed,
    Fm,
    Said,
    caller_table,
    catalog_of,
    expected_row,
    write_tables,
)
from tests.spools import wait_until

SPEC = DatasetSpec.model_validate({"features": [{"name": "price", "type": "float"}], "partitions": 2})
OUTPUTS = OutputColumns(tasks=("click", "buy"), embeddings={"hidden": (3, "float16")})
NOON_US = BASE_US + DAY_US // 2
FM = Fm(
    "f",
    OUTPUTS,
    {"s1": NOON_US - DAY_US, "leaky": NOON_US + DAY_US},
    [
        [Said(f"e{i}", NOON_US, "s1", NOON_US, i) for i in range(20)],
        [Said(f"e{i}", NOON_US, "leaky", NOON_US, i) for i in range(20, 25)],
        [Said(f"e{i}", NOON_US + DAY_US, "s1", NOON_US, 100 + i) for i in range(10)],
    ],
    [[Failed("dead", NOON_US)]],
)
ADDED = ["status", "snapshot_id", "trained_through", "scored_at", "click__logit", "buy__logit", "hidden"]
ROWS = [("e3", NOON_US), ("nobody", NOON_US), ("e21", NOON_US), ("dead", NOON_US), ("e3", NOON_US + DAY_US)]
ROWS += [("e3", NOON_US), ("e19", NOON_US)]
STATUSES = {"present": 4, "pending": 0, "missing": 1, "failed": 1, "leaky": 1, "stale": 0}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The tables of `ads` and the registry's copy beside them; no server."""
    folder = Folder(str(tmp_path_factory.mktemp("tables")))
    catalog = catalog_of(SPEC, [FM])
    fields = {"revision": "1", dataset_field("ads"): SPEC.model_dump_json()}
    fields[fm_field("ads", "f")] = catalog.fm("ads", "f").model_dump_json()
    for name, record in catalog.snapshots["ads"]["f"].items():
        fields[snapshot_field("ads", "f", name)] = record.model_dump_json()
    folder.write(COPY, json.dumps(fields).encode())
    write_tables(folder, SPEC, FM)
    return folder


@pytest.fixture(scope="module")
def environment(tables: Folder) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("DAS_")}
    return {**others, "DAS_TABLES_URI": tables.uri, "DAS_REDIS_URL": f"redis://127.0.0.1:{free_port()}/0"}


Das = Callable[..., Result]


@pytest.fixture
def das(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Das:
    """Run `das augment` in this process; code: how it shall end."""
    for name in ("DAS_TABLES_URI", "DAS_REDIS_URL"):
        monkeypatch.setenv(name, environment[name])

    def run(*arguments: str | Path, code: int = 0) -> Result:
        done = CliRunner().invoke(build_app(), ["augment", *map(str, arguments)])
        assert done.exit_code == code, (done.stderr, done.exception)
        return done

    return run


def wanted(rows: list[tuple[str, int]]) -> list[dict[str, Any]]:
    outputs = [*OUTPUTS.tasks, *OUTPUTS.embeddings]
    return [expected_row(FM, SPEC, row, gap_seconds=None, form="encoded", outputs=outputs) for row in rows]


def assert_augmented(path: Path, mine: pa.Table, rows: list[tuple[str, int]]) -> None:
    """The file has the caller's columns as they were, and then what the reference says."""
    found = pq.read_table(path)
    assert found.column_names == [*mine.column_names, *[f"f__{name}" for name in ADDED]]
    assert found.select(mine.column_names).equals(mine)
    assert found.select([f"f__{name}" for name in ADDED]).to_pylist() == wanted(rows)


@pytest.fixture
def clicks(tmp_path: Path) -> Path:
    pq.write_table(caller_table(ROWS), tmp_path / "clicks.parquet", row_group_size=2)
    return tmp_path / "clicks.parquet"


def files_beside(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path.parent)) for found in path.parent.rglob("*"))


def test_a_file_in_a_file_out(das: Das, clicks: Path, tmp_path: Path) -> None:
    done = das(clicks, tmp_path / "new" / "out.parquet", "--json")

    assert_augmented(tmp_path / "new" / "out.parquet", caller_table(ROWS), ROWS)
    record = json.loads(done.stdout)
    assert (record["rows"], record["statuses"]) == (7, {"f": STATUSES})
    assert files_beside(clicks) == ["clicks.parquet", "new", "new/out.parquet"]


def test_it_says_in_words_what_it_did(das: Das, clicks: Path, tmp_path: Path) -> None:
    done = das(clicks, tmp_path / "out.parquet")

    assert done.stdout.splitlines()[0].startswith("7 rows")
    assert "f: 4 present, 1 missing, 1 failed, 1 leaky" in done.stdout
    assert "on their way are called missing" in done.stderr


def test_columns_of_all_kinds_stay_as_they_are(das: Das, tmp_path: Path) -> None:
    table = caller_table(ROWS, id_type=pa.dictionary(pa.int32(), pa.string()), time_type=pa.timestamp("ms", "UTC"))
    columns = {
        "tags": pa.array([["a", None], None, [], ["b"], ["c"], None, []]),
        "deep": pa.array([{"x": {"y": [1, 2]}}, None, {"x": None}, None, None, None, None]),
        "half": pa.array(np.arange(7), pa.float16()),
        "vector": pa.array([[0.5, 1.5]] * 7, pa.list_(pa.float32(), 2)),
        "word": pa.array(list("abcabca")).dictionary_encode(),
        "none": pa.nulls(7),
        "with.dot": pa.array([b"\\0"] * 7),
        "Price": pa.array([1] * 7), "price": pa.array([2] * 7),
    }  # fmt: skip
    for name, column in columns.items():
        table = table.append_column(name, column)
    table = table.replace_schema_metadata({"mine": "yes"})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=3)

    das(tmp_path / "in.parquet", tmp_path / "out.parquet")

    mine = pq.read_table(tmp_path / "in.parquet")
    assert_augmented(tmp_path / "out.parquet", mine, ROWS)
    assert pq.read_schema(tmp_path / "out.parquet").metadata[b"mine"] == b"yes"


def test_embeddings_say_how_they_are_decoded(das: Das, clicks: Path, tmp_path: Path) -> None:
    das(clicks, tmp_path / "out.parquet")

    metadata = pq.read_schema(tmp_path / "out.parquet").field("f__hidden").metadata
    assert (metadata[b"codec"], metadata[b"size"]) == (b"float16", b"3")


def test_a_folder_in_the_same_names_out(das: Das, tmp_path: Path) -> None:
    parts = {"b.parquet": ROWS[:4], "a.parquet": ROWS[4:], "day=1/it's [x]*.parquet": ROWS[2:5], "empty.parquet": []}
    for name, rows in parts.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(caller_table(rows), tmp_path / "in" / name)
    (tmp_path / "in" / "_SUCCESS").touch()
    (tmp_path / "in" / "notes.txt").write_text("no table")

    done = das(tmp_path / "in", tmp_path / "out", "--json")

    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")) == sorted(parts)
    for name, rows in parts.items():
        assert_augmented(tmp_path / "out" / name, caller_table(rows), rows)
    assert json.loads(done.stdout)["rows"] == 10


def test_a_file_without_rows_gets_its_columns(das: Das, tmp_path: Path) -> None:
    pq.write_table(caller_table([]), tmp_path / "in.parquet")

    das(tmp_path / "in.parquet", tmp_path / "out.parquet")

    assert_augmented(tmp_path / "out.parquet", caller_table([]), [])


@pytest.fixture(scope="module")
def duck() -> Iterator[Duck]:
    duck = Duck(memory_bytes=256 * 1024 * 1024, joins_as_written=True)
    yield duck
    duck.close()


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(-5, 30), max_size=25), min_size=1, max_size=4),
    st.integers(1, 30),
    st.integers(1, 30),
)
def test_whatever_the_files_row_groups_and_windows_rows_stay_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    tables: Folder,
    duck: Duck,
    numbers: list[list[int]],
    group_rows: int,
    window_rows: int,
) -> None:
    root = tmp_path_factory.mktemp("files")
    rows = [[(f"e{i}", NOON_US + i % 2 * DAY_US) for i in part] for part in numbers]
    (root / "in").mkdir()
    for number, part in enumerate(rows):
        pq.write_table(caller_table(part), root / "in" / f"{number}.parquet", row_group_size=group_rows)
    query = LookupQuery(fms=("f",), embedding_format="encoded")
    join = OfflineJoin(duck, tables, catalog_of(SPEC, [FM]), "ads", query, client=None)
    told = []

    summary = augment_files(
        list_sources(root / "in"), root / "out", join, window_rows=window_rows, as_folder=True,
        on_progress=lambda summary: told.append(summary.rows),
    )  # fmt: skip

    for number, part in enumerate(rows):
        assert_augmented(root / "out" / f"{number}.parquet", caller_table(part), part)
    assert summary.rows == sum(map(len, rows)) == max(told, default=0)
    assert told == sorted(told)


# ---- bad input: a sentence, nothing written, what stood there stays


def refused(das: Das, source: Path, target: Path, *arguments: str, code: int = 2) -> str:
    """Give what it says when it refuses; nothing beside the files that were there."""
    before = files_beside(target)
    done = das(source, target, *arguments, code=code)
    assert files_beside(target) == before
    assert done.stdout == ""
    return done.stderr


def test_a_target_that_is_there_is_refused_and_replaced_on_request(das: Das, clicks: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    target.write_text("mine")

    assert "out.parquet is there already" in refused(das, clicks, target)
    assert target.read_text() == "mine"
    das(clicks, target, "--overwrite")
    assert_augmented(target, caller_table(ROWS), ROWS)


def test_a_folder_that_is_there_is_replaced_on_request(das: Das, clicks: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    clicks.rename(tmp_path / "in" / "clicks.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "clicks.parquet").write_text("mine")

    assert "out is there already" in refused(das, tmp_path / "in", tmp_path / "out")
    das(tmp_path / "in", tmp_path / "out", "--overwrite")
    assert files_beside(tmp_path / "in") == ["in", "in/clicks.parquet", "out", "out/clicks.parquet"]
    assert_augmented(tmp_path / "out" / "clicks.parquet", caller_table(ROWS), ROWS)


def test_a_file_may_be_replaced_by_itself(das: Das, clicks: Path) -> None:
    das(clicks, clicks, "--overwrite")

    assert_augmented(clicks, caller_table(ROWS), ROWS)
    assert files_beside(clicks) == ["clicks.parquet"]


GOOD = caller_table(ROWS)
IDS, TIMES = GOOD["example_id"], GOOD["event_time"]


def with_column(name: str, column: Any) -> pa.Table:
    return GOOD.set_column(GOOD.schema.get_field_index(name), name, column)


NULL_TIME = pa.concat_arrays([TIMES.combine_chunks().slice(0, 6), pa.nulls(1, TIMES.type)])
TABLES: list[tuple[str, pa.Table, tuple[str, ...]]] = [
    ("no id", GOOD.drop_columns(["example_id"]), ("bad.parquet", "example_id", "missing")),
    ("no time", GOOD.drop_columns(["event_time"]), ("bad.parquet", "event_time", "missing")),
    ("number ids", with_column("example_id", pa.array(range(7))), ("bad.parquet", "example_id", "int64")),
    ("naive times", with_column("event_time", TIMES.cast(pa.timestamp("us"))), ("event_time", "without a time zone")),
    ("null times", with_column("event_time", NULL_TIME), ("bad.parquet", "event_time is null in row 6")),
    ("null ids", with_column("example_id", pa.array([None, *["a"] * 6])), ("bad.parquet", "example_id is null")),
    (
        "nanoseconds", with_column("event_time", pa.array([0, 0, 1, 0, 0, 0, 0], pa.timestamp("ns", "UTC"))),
        ("bad.parquet", "row 2", "finer than a microsecond"),
    ),
    ("collision", GOOD.append_column("f__hidden", pa.nulls(7)), ("bad.parquet", "f__hidden")),
    ("row number", GOOD.append_column("file_row_number", pa.nulls(7)), ("bad.parquet", "file_row_number", "rename")),
    ("other case", GOOD.append_column("Example_ID", pa.nulls(7)), ("bad.parquet", "Example_ID", "rename")),
]  # fmt: skip


@pytest.mark.parametrize(("table", "words"), [t[1:] for t in TABLES], ids=[t[0] for t in TABLES])
def test_a_file_that_can_not_be_joined_is_named_with_the_reason(
    das: Das, clicks: Path, tmp_path: Path, table: pa.Table, words: tuple[str, ...]
) -> None:
    (tmp_path / "in").mkdir()
    clicks.rename(tmp_path / "in" / "a.parquet")
    pq.write_table(table, tmp_path / "in" / "bad.parquet")

    said = refused(das, tmp_path / "in", tmp_path / "out")

    assert [word for word in words if word not in said] == [], said


def damaged(column: int) -> Callable[[Path], bytes]:
    """Damage the pages of a column; the footer stays whole."""

    def damage(path: Path) -> bytes:
        data = bytearray(path.read_bytes())
        chunk = pq.ParquetFile(path).metadata.row_group(1).column(column)
        first = chunk.dictionary_page_offset or chunk.data_page_offset
        data[first : first + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
        return bytes(data)

    return damage


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda _: b"a,b\n1,2\n", lambda path: path.read_bytes()[:-9], damaged(0), damaged(1), damaged(2)],
    ids=["empty", "csv", "cut", "own column", "times", "ids"],
)
def test_a_file_that_is_not_parquet_is_named(
    das: Das, clicks: Path, tmp_path: Path, damage: Callable[[Path], bytes]
) -> None:
    (tmp_path / "bad.parquet").write_bytes(damage(clicks))

    said = refused(das, tmp_path / "bad.parquet", tmp_path / "out.parquet")

    assert "bad.parquet" in said


def test_a_path_that_is_not_there_and_a_folder_without_files_are_told(das: Das, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()

    assert "nope" in refused(das, tmp_path / "nope", tmp_path / "out")
    assert "no *.parquet file" in refused(das, tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--dataset", "nope"), "there is no dataset 'nope'"),
        (("--fm", "nope"), "there is no FM 'nope'"),
        (("--output", "nope"), "the output nope; there are buy, click, hidden"),
        (("--folder", "nowhere"), "nowhere"),
    ],
)
def test_names_that_are_not_there_are_told(das: Das, clicks: Path, options: tuple[str, str], word: str) -> None:
    assert word in refused(das, clicks, clicks.with_name("out.parquet"), *options)


def test_a_full_disk_leaves_nothing_and_says_so(environment: dict[str, str], clicks: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    done = subprocess.run(
        command_of(clicks, tmp_path / "out.parquet"),
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )  # fmt: skip

    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (2, "", False)
    assert "out.parquet can't be written" in done.stderr
    assert files_beside(clicks) == ["clicks.parquet"]


def command_of(source: Path, target: Path) -> list[str]:
    return [sys.executable, "-m", "das_service.cli", "augment", str(source), str(target)]


def test_a_run_that_fails_leaves_what_stood_there(das: Das, clicks: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    target.write_text("mine")
    pq.write_table(with_column("example_id", pa.array([None, *["a"] * 6])), tmp_path / "bad.parquet")

    refused(das, tmp_path / "bad.parquet", target, "--overwrite")

    assert target.read_text() == "mine"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes many seconds, so that a busy machine does not get to its end before it is told to stop."""
    path = tmp_path_factory.mktemp("many") / "many.parquet"
    size = 3_000_000
    table = pa.table(
        {
            "example_id": pa.array(np.char.mod("e%d", np.arange(size)).astype(object), pa.string()),
            "event_time": pa.array(np.full(size, NOON_US)).cast(pa.timestamp("us", "UTC")),
        }
    )
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(5):
            writer.write_table(table)
    return path


def interrupt(
    command: list[str], environment: dict[str, str], target: Path, *numbers: signal.Signals
) -> tuple[int, str]:
    """Send signals to a command that has begun to write; give its exit code and what it said."""
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: process.poll() is not None or files_beside(target) != [], seconds=60)
        for number in numbers:
            process.send_signal(number)
        _, said = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    return process.returncode, said


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGHUP,), (signal.SIGINT, signal.SIGTERM, signal.SIGTERM)],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP", "several"],
)
def test_an_interrupted_run_leaves_no_part_of_a_target(
    environment: dict[str, str], many: Path, tmp_path: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    target = tmp_path / "out.parquet"

    code, said = interrupt(command_of(many, target), environment, target, *numbers)

    assert (code, "Traceback" in said, files_beside(target)) == (130, False, [])


def test_what_a_killed_run_left_goes_with_the_next(
    environment: dict[str, str], das: Das, many: Path, clicks: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new" / "out.parquet"

    code, _ = interrupt(command_of(many, target), environment, target, signal.SIGKILL)
    assert (code, len(list(target.parent.iterdir()))) == (-signal.SIGKILL, 1)
    das(clicks, target)

    assert files_beside(target) == ["out.parquet"]
    assert_augmented(target, caller_table(ROWS), ROWS)


# ---- the client's way to it


@pytest.fixture
def client(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    for name in ("DAS_TABLES_URI", "DAS_REDIS_URL"):
        monkeypatch.setenv(name, environment[name])
    with Client("http://127.0.0.1:1") as client:
        yield client


def test_the_client_joins_files_and_gives_the_account(client: Client, clicks: Path, tmp_path: Path) -> None:
    record = client.augment_files("ads", clicks, tmp_path / "out.parquet", fms=["f"])

    assert (record["rows"], record["statuses"]) == (7, {"f": STATUSES})
    assert_augmented(tmp_path / "out.parquet", caller_table(ROWS), ROWS)


def test_the_client_passes_on_what_is_asked(client: Client, clicks: Path, tmp_path: Path) -> None:
    record = client.augment_files(
        "ads", clicks, tmp_path / "out.parquet", fms=["f"], outputs=["buy"], max_freshness_gap_seconds=60
    )

    assert record["statuses"]["f"] == {**STATUSES, "present": 0, "stale": 4}
    assert pq.read_schema(tmp_path / "out.parquet").names[-2:] == ["f__scored_at", "f__buy__logit"]


def test_the_client_says_why_files_are_refused(client: Client, clicks: Path, tmp_path: Path) -> None:
    (tmp_path / "out.parquet").write_text("mine")

    with pytest.raises(DasClientError, match="is there already") as caught:
        client.augment_files("ads", clicks, tmp_path / "out.parquet", fms=["f"])

    assert caught.value.code == "augment_refused"
    assert (tmp_path / "out.parquet").read_text() == "mine"


CALL = """
import sys
from das_service.client import Client
Client().augment_files("ads", *sys.argv[1:], fms=["f"])
"""


def test_the_client_lets_an_interrupted_run_tidy_up(environment: dict[str, str], many: Path, tmp_path: Path) -> None:
    """The client's process alone hears the signal, as in a notebook."""
    target = tmp_path / "out.parquet"
    command = [sys.executable, "-c", CALL, str(many), str(target)]

    _, said = interrupt(command, environment, target, signal.SIGINT)

    assert (said.splitlines()[-1], files_beside(target)) == ("KeyboardInterrupt", [])


class Terminal:
    """A stderr that is a terminal of 60 columns."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 60, 0, 0))
        self.file = os.fdopen(slave, "w")

    def shown(self) -> str:
        os.set_blocking(self._master, False)
        return os.read(self._master, 1 << 20).decode()

    def close(self) -> None:
        self.file.close()
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    for name in ("COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.closing(Terminal()) as terminal:
        yield terminal


def test_on_a_terminal_the_client_shows_the_bar(
    client: Client, terminal: Terminal, clicks: Path, tmp_path: Path
) -> None:
    with contextlib.redirect_stderr(terminal.file):
        client.augment_files("ads", clicks, tmp_path / "out.parquet", fms=["f"])

    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.shown()))
    bars = [line for line in lines if "\u2501" in line]
    assert [line for line in bars if line.startswith("7 rows")] != []
    assert max(map(len, bars)) <= 60


def test_on_a_terminal_too_the_client_says_why_files_are_refused(
    client: Client, terminal: Terminal, tmp_path: Path
) -> None:
    pq.write_table(with_column("example_id", pa.array([None, *["a"] * 6])), tmp_path / "bad.parquet")

    with contextlib.redirect_stderr(terminal.file), pytest.raises(DasClientError) as caught:
        client.augment_files("ads", tmp_path / "bad.parquet", tmp_path / "out.parquet", fms=["f"])

    assert caught.value.detail == f"{tmp_path / 'bad.parquet'}: example_id is null in some row"
    assert f"das: {tmp_path}" in terminal.shown()


def test_files_are_looked_at_before_the_first_is_joined(duck: Duck, tables: Folder, clicks: Path) -> None:
    pq.write_table(GOOD.drop_columns(["event_time"]), clicks.with_name("z.parquet"))

    with pytest.raises(Exception, match=r"z\.parquet: column event_time: the column is missing"):
        refuse_unfit(list_sources(clicks.parent), [])
