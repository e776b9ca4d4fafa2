"""docs/training.md does what it says: its blocks run in their order beside a service, Spark's and deepctr's apart.

Its rule for reading the tables is also held against the reference of tests/joining, where there are many snapshots.
"""

import contextlib
import datetime as dt
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from das_service.client import Client
from das_service.folder import Folder
from das_service.settings import load_settings
from das_service.snapshot_publish import publish_snapshot
from das_service.up.embedded import free_port
from das_service.up.supervisor import RunningService, running_service
from schemas.codecs import CODECS, Codec, decode, encode
from schemas.dataset import DatasetSpec
from schemas.snapshot import OutputColumns
from tests.fakes import expected_supervision, export_closed_form
from tests.joining import BASE_US, DAY_US, SECOND_US, Failed, Fm, Said, caller_table, judge_row, logit_of, write_tables
from tests.training_doc import LEFT_OUT, Block, blocks, blocks_with

SPEC = DatasetSpec.model_validate(
    {
        "features": [{"name": "price", "type": "float"}],
        "tasks": [{"name": "click", "label_window_seconds": 3600}],
        "partitions": 2,
    }
)
NOON = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
ROWS, LEAKY, POISON = 900, 20, 500
GAP = dt.timedelta(days=1)
WAIT_SECONDS = 90.0
CLOSED = ROWS - 50  # at least: the windows of the last 20 are open, and the partitions' latest rows lie a bit apart


# ---- beside a service


@dataclass(frozen=True)
class Ran:
    """What the document's code assigned, printed and wrote."""

    names: dict[str, Any]
    folder: Path
    printed: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    def run(self, block: Block) -> None:
        if block.language != "sh":
            block.run(self.names)
            return
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            ["sh", "-ec", block.code],
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        self.printed.append(done.stdout)


def examples() -> pa.Table:
    """Rows every three minutes; the first LEAKY before noon."""
    times = [NOON + dt.timedelta(minutes=3 * (i - LEAKY)) for i in range(ROWS)]
    return pa.table(
        {
            "example_id": [f"c{i}" for i in range(ROWS)],
            "event_time": pa.array(times, pa.timestamp("us", "UTC")),
            "price": [2e6 if i == POISON else i / 100 for i in range(ROWS)],
        }
    )


def clicks() -> pa.Table:
    """A trainer's rows: the examples backwards, one of them twice, and one that nobody posted."""
    posted = examples()
    order = [*reversed(range(ROWS)), 7]
    table = posted.take(order).append_column("label", pa.array([i % 2 for i in order]))
    ghost = {"example_id": "ghost", "event_time": NOON, "price": 1.0, "label": 1}
    return pa.concat_tables([table, pa.Table.from_pylist([ghost], schema=table.schema)])


def serve_examples(service: RunningService, exported: Path) -> None:
    """Let an FM score the examples, and wait until the tables have everything."""
    export_closed_form(exported, SPEC, fm="teacher", trained_through=NOON, poison="nan")
    settings = load_settings({}, redis_url=service.redis_url, snapshots_uri=str(service.folder.snapshots))
    with Client(service.url) as client:
        client.put_dataset("ads", SPEC.model_dump(mode="json"))
        publish_snapshot(client, settings, "ads", exported, activate=True)
        assert client.ingest("ads", examples()).accepted == ROWS
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            state = client.status()["datasets"]["ads"]
            outcomes = (state["fms"]["teacher"]["scored"], state["fms"]["teacher"]["failed"])
            if state["in_log"] == 0 and outcomes == (ROWS - 1, 1) and state["closed"] >= CLOSED:
                return
            assert time.monotonic() < deadline, state
            time.sleep(0.2)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The whole document, run once."""
    folder = tmp_path_factory.mktemp("trainer")
    ran = Ran({"__name__": "training"}, folder)
    pq.write_table(clicks(), folder / "clicks.parquet")
    with (
        running_service(folder=folder / "das-data", env_overrides={"DAS_COMMIT_SECONDS": "0.3"}) as service,
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(folder),
    ):
        serve_examples(service, folder / "exported")
        for name in [name for name in os.environ if name.startswith("DAS_")]:
            patch.delenv(name)
        patch.setenv("DAS_API_URL", service.url)
        for block in blocks():
            if block.section not in LEFT_OUT:
                ran.run(block)
    return ran


def expected_statuses(*, gap: dt.timedelta = dt.timedelta.max) -> list[str]:
    """The status of each of clicks()."""

    def status(example_id: str, event_time: dt.datetime) -> str:
        if example_id == "ghost":
            return "missing"
        if example_id == f"c{POISON}":
            return "failed"
        return "leaky" if event_time < NOON else "stale" if event_time - NOON > gap else "present"

    rows = clicks()
    return [status(*row) for row in zip(rows["example_id"].to_pylist(), rows["event_time"].to_pylist(), strict=True)]


def is_present() -> Any:
    return np.array(expected_statuses()) == "present"


def expected_logits() -> Any:
    """The logit of each of clicks(), NaN where it is not present."""
    return np.where(is_present(), expected_supervision(clicks(), SPEC)[0]["click"], np.float32(np.nan))


def expected_hidden() -> Any:
    """The embedding of each of clicks() as it was stored."""
    return decode(expected_supervision(clicks(), SPEC)[1]["hidden"], 8, "float16")


def test_every_block_but_two_is_code_that_ran(ran: Ran) -> None:
    assert {block.language for block in blocks()} == {"python", "sh", "diff"}
    left_out = [block.code for block in blocks() if block.section in LEFT_OUT]
    assert len(left_out) == len(LEFT_OUT)
    others = "".join(block.code for block in blocks() if block.section not in LEFT_OUT)
    for library in ("pyspark", "deepctr_torch"):
        assert sum(library in code for code in left_out) == 1
        assert library not in others


def test_augment_gives_the_frame_back_with_supervision(ran: Ran) -> None:
    rows = ran["rows"]
    pd.testing.assert_frame_equal(rows[["example_id", "event_time", "price", "label"]], clicks().to_pandas())
    assert rows["teacher__status"].tolist() == expected_statuses()
    np.testing.assert_array_equal(rows["teacher__click__logit"], expected_logits())
    stacked = np.stack(rows["teacher__hidden"][is_present()])
    np.testing.assert_array_equal(stacked, expected_hidden()[is_present()].astype(np.float16))


def test_pandas_columns_have_the_types_of_the_table(ran: Ran) -> None:
    types = ran["rows"].dtypes.astype(str)
    assert types["teacher__status"] == types["teacher__snapshot_id"] == "category"
    assert types["teacher__trained_through"] == types["teacher__scored_at"] == "datetime64[us, UTC]"
    assert (types["teacher__click__logit"], types["teacher__hidden"]) == ("float32", "object")
    assert ran["rows"].loc[~is_present(), list(types.index[5:])].isna().all(axis=None)


def test_a_request_for_less_gives_less_and_calls_old_supervision_stale(ran: Ran) -> None:
    recent = ran["recent"]
    assert recent.columns[-1] == "teacher__click__logit"
    assert (recent.schema["teacher__status"], recent.schema["teacher__click__logit"]) == (pl.Categorical, pl.Float32)
    assert recent["teacher__status"].to_list() == expected_statuses(gap=GAP)
    assert "stale" in recent["teacher__status"].to_list()


def test_a_lookup_says_the_same_as_augment(ran: Ran) -> None:
    now = ran["now"]
    assert now["teacher__status"].to_pylist() == expected_statuses()
    assert now.schema.field("teacher__hidden").type == pa.list_(pa.float16(), 8)
    hidden = now["teacher__hidden"].combine_chunks()
    assert len(hidden.values) == 8 * len(hidden)
    assert len(hidden.flatten()) == 8 * is_present().sum()


def test_coverage_is_the_share_of_rows_present(ran: Ran) -> None:
    assert ran["coverage"] == is_present().mean()
    counted = {status: number for status, number in ran["by_status"].items() if number}
    assert counted == {
        status: expected_statuses().count(status) for status in ("present", "leaky", "failed", "missing")
    }


def test_files_are_augmented_in_their_order(ran: Ran) -> None:
    written = pq.read_table(ran.folder / "augmented.parquet")
    assert written.select(range(4)).equals(clicks())
    assert written["teacher__status"].to_pylist() == expected_statuses()
    assert f"teacher: {is_present().sum()} present" in ran.printed[0]
    assert ran["account"]["rows"] == written.num_rows
    assert ran["account"]["statuses"]["teacher"]["present"] == is_present().sum()


def test_files_are_augmented_while_the_service_is_down_and_it_says_so(
    ran: Ran, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAS_REDIS_URL", f"redis://127.0.0.1:{free_port()}")
    with Client("http://127.0.0.1:9") as client:
        account = client.augment_files(
            "ads",
            ran.folder / "clicks.parquet",
            ran.folder / "later.parquet",
            fms="teacher",
            folder=ran.folder / "das-data",
        )
    assert "rows that are on their way are called missing" in capsys.readouterr().err
    assert account["statuses"] == ran["account"]["statuses"]


def test_the_mask_is_the_status_and_keeps_nan_out_of_the_loss(ran: Ran) -> None:
    written = pq.read_table(ran.folder / "augmented.parquet")
    assert written["teacher__click__logit"].is_valid().to_pylist() == is_present().tolist()
    assert len(ran["losses"]) == -(-written.num_rows // 64)
    assert np.isfinite(ran["losses"]).all()
    assert all(torch.isfinite(weight).all() for weight in ran["student"].parameters())


def test_the_loader_reads_each_closed_row_once_in_every_way(ran: Ran) -> None:
    with ran.folder.joinpath("rows.arrows").open("rb") as file:
        written = pa.ipc.open_stream(file).read_all()
    assert CLOSED <= written.num_rows == ran["num_rows"] == ran["num_rows_beside"] < ROWS
    assert written["teacher__status"].to_pylist().count("leaky") == LEAKY


def test_the_diff_of_ten_lines_trains_before_and_after(ran: Ran) -> None:
    (diff,) = [block for block in blocks_with("+tasks = ") if block.language == "diff"]
    assert sum(line.startswith("+") for line in diff.code.splitlines()) <= 10
    assert math.isfinite(ran["loss"].item())
    trained = [*ran["layers"].parameters(), *ran["adapter"].parameters()]
    assert all(weight.isfinite().all() for weight in trained)
    distilled = [weight for head in (ran["heads"], ran["adapted_heads"]) for weight in head.parameters()]
    assert all(weight.grad is not None for weight in distilled)
    assert ran["progress"].fit().rows > 0


def test_the_student_that_is_served_says_what_it_says_in_training(ran: Ran) -> None:
    served = torch.export.load(ran.folder / "student.pt2").module()
    price_B1 = torch.linspace(0, 9, 5)[:, None]
    torch.testing.assert_close(served(input=price_B1), ran["served"](ran["backbone"](price_B1)))


def test_a_resumed_loader_goes_on_with_the_next_batch(ran: Ran) -> None:
    whole = list(ran["beside"])
    for batch, expected in zip((ran["first"], ran["second"]), whole, strict=False):
        assert torch.equal(batch.dense_BF, expected.dense_BF)
    last_us = max(int(batch.event_time_B.max()) for batch in whole)  # there was a whole epoch before
    assert ran["through"] == dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=last_us + 1)


def test_an_embedding_is_decoded_alike_in_numpy_torch_and_sql(ran: Ran) -> None:
    assert (ran["size"], ran["codec"]) == (8, "float16")
    expected, present = expected_hidden(), is_present()
    np.testing.assert_array_equal(ran["hidden_BD"][present], expected[present])
    np.testing.assert_array_equal(ran["hidden_on_device_BD"][present], expected[present])
    by_id = {example_id: hidden for example_id, hidden in ran["looked_at"] if hidden is not None}
    assert by_id == dict(
        zip(np.array(clicks()["example_id"])[present].tolist(), expected[present].tolist(), strict=True)
    )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [1, 5])
def test_every_codec_is_decoded_alike(ran: Ran, codec: Codec, size: int) -> None:
    values = np.random.default_rng(1).uniform(-1, 1, (50, size)).astype(np.float32)
    values[0], values[1], values[2], values[3] = 0, -65504, 3e-6, 1e-9
    stored = encode(values, codec)
    expected = decode(stored, size, codec)
    np.testing.assert_array_equal(ran["decode_torch"](torch.tensor(stored), size, codec), expected)

    column = pa.array([row.tobytes() for row in stored])
    for kind in (column, column.cast(pa.large_binary()), pa.chunked_array([column[:20], column[20:]])):
        np.testing.assert_array_equal(decode(ran["packed"](kind, size, codec), size, codec), expected)
    for kind in (column, column.cast(pa.binary(stored.shape[1]))):
        np.testing.assert_array_equal(ran["packed"](kind[7:], size, codec), stored[7:])

    (macros,) = blocks_with("CREATE MACRO")
    statement = re.search(r'"""(.*)"""', macros.code, re.DOTALL)
    assert statement is not None
    with duckdb.connect() as db:
        db.execute(statement[1])
        db.register("stored", pa.table({"row": range(50), "b": column}))
        call = "int4s(b, $size)" if codec == "int4" else f"{codec}s(b)"
        given = {"size": size} if codec == "int4" else {}
        found = db.execute(f"SELECT {call} FROM stored ORDER BY row", given).fetchall()
    np.testing.assert_array_equal([row[0] for row in found], expected)


def test_the_tables_read_by_duckdb_say_the_same_as_augment(ran: Ran) -> None:
    packed = expected_hidden().astype("<f2")
    columns = (clicks()["example_id"].to_pylist(), expected_statuses(), expected_logits(), packed, is_present())
    expected = [
        (example_id, status, float(logit) if present else None, row.tobytes() if present else None)
        for example_id, status, logit, row, present in zip(*columns, strict=True)
    ]
    joined = ran["joined"].select(["example_id", "teacher__status", "teacher__click__logit", "teacher__hidden"])
    assert sorted(tuple(row.values()) for row in joined.to_pylist()) == sorted(expected)


def test_the_tables_read_by_polars_keep_the_order(ran: Ran) -> None:
    joined = ran["joined_pl"]
    assert joined["example_id"].to_list() == clicks()["example_id"].to_pylist()
    np.testing.assert_array_equal(joined["teacher__click__logit"].to_numpy(), expected_logits())


# ---- on tables with many snapshots


def teacher(*, dead_letters: bool) -> Fm:
    """An FM of three snapshots that scored examples of three days at few moments, so that all kinds of ties occur."""
    random = np.random.default_rng(7)
    through = {"s2": BASE_US, "s10": BASE_US + DAY_US, "s1": BASE_US + 2 * DAY_US + 5 * SECOND_US}
    said, failed = [], []
    for number in range(400):
        day, moment = (int(n) for n in random.integers(0, (3, 10)))
        example = f"e{number // 2}", BASE_US + day * DAY_US + moment * SECOND_US
        for snapshot in through:
            if random.random() < 0.4:
                scored_at = BASE_US + 9 * DAY_US + int(random.integers(0, 3))
                said.append(Said(*example, snapshot, scored_at, len(said)))
        if random.random() < 0.3:
            failed += [Failed(*example)] * 2
    unique = {(row.example_id, row.event_time // DAY_US): row.event_time for row in [*said, *failed]}
    said = [row for row in said if unique[row.example_id, row.event_time // DAY_US] == row.event_time]
    return Fm(
        "teacher",
        OutputColumns(tasks=("click",), embeddings={"hidden": (2, "float16")}),
        through,
        said=[said[::2], said[1::2]],
        failed=[failed] if dead_letters else [[]],
    )


@pytest.mark.parametrize("dead_letters", [True, False])
def test_the_rule_as_sql_is_the_rule(tmp_path: Path, dead_letters: bool) -> None:
    fm = teacher(dead_letters=dead_letters)
    write_tables(Folder(str(tmp_path / "das-data" / "tables")), SPEC, fm)
    asked = [
        (f"e{i}", BASE_US + day * DAY_US + moment * SECOND_US)
        for i in range(201) for day in range(3) for moment in (0, 86_399)
    ]  # fmt: skip
    judged = [judge_row(fm, SPEC, row, None) for row in asked]
    pq.write_table(caller_table(asked), tmp_path / "clicks.parquet")

    names: dict[str, Any] = {}
    with contextlib.chdir(tmp_path):
        for block in blocks_with("JOIN = ", "SET TimeZone", "pl.scan_delta"):
            block.run(names)

    statuses = [status for status, _ in judged]
    assert set(statuses) == {"present", "leaky", "missing"} | ({"failed"} if dead_letters else set())
    logits = [np.nan if said is None else logit_of(fm, "click", said.number) for _, said in judged]
    joined = names["joined"].sort_by("mine")
    assert joined["teacher__status"].to_pylist() == statuses
    np.testing.assert_array_equal(joined["teacher__click__logit"].to_numpy(), logits)
    np.testing.assert_array_equal(names["joined_pl"]["teacher__click__logit"].to_numpy(), logits)
