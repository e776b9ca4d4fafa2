"""Client.augment against a real API: a trainer's table of any kind in, the same kind with supervision out."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from das_service.client import Client, DasClientError, NotFoundError, RowsRefusedError, TruncatedStreamError
from das_service.client import client as client_module
from das_service.settings import Settings
from das_service.up.embedded import find_server, free_port
from tests.conftest import Server
from tests.served import NOON, SPEC, Stand, examples_table, serve_over_tcp

IDS = ["e3", "nobody", "e0", "e3", "e9"]
LOGITS = [3.0, None, 0.0, 3.0, 9.0]
STATUSES = ["present", "missing", "present", "present", "present"]
ADDED = ["f__status", "f__snapshot_id", "f__trained_through", "f__scored_at", "f__click__logit", "f__hidden"]


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(program=find_server(), folder=tmp_path_factory.mktemp("server"), port=free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def url(settings: Settings, server: Server) -> Iterator[str]:
    """An API whose FM `f` has scored e0..e9: logit = i, hidden = [i, -i]."""
    with serve_over_tcp(settings) as port, server.client() as store, Client(f"http://127.0.0.1:{port}") as client:
        client.put_dataset("ads", SPEC)
        client.put_fm("ads", "f")
        stand = Stand(settings, store)
        stand.validate()
        client.ingest("ads", examples_table(0, 10))
        assert stand.work() == 10
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def mine(ids: list[str]) -> pa.Table:
    times = pa.array([NOON] * len(ids), pa.timestamp("us", "UTC"))
    labels, names = pa.array([len(name) for name in ids], pa.int64()), pa.array(ids, pa.string())
    return pa.table({"label": labels, "event_time": times, "example_id": names})


def test_an_arrow_table_gets_columns_appended(client: Client) -> None:
    found = client.augment("ads", mine(IDS), fms=["f"])

    assert found.column_names == ["label", "event_time", "example_id", *ADDED]
    assert found.select(["label", "event_time", "example_id"]).equals(mine(IDS))
    assert (found["f__status"].to_pylist(), found["f__click__logit"].to_pylist()) == (STATUSES, LOGITS)


def test_a_pandas_frame_keeps_its_index_and_types(client: Client) -> None:
    frame = mine(IDS).to_pandas().set_index(pd.Index([7, 7, 1, 2, 3], name="mine"))

    found = client.augment("ads", frame, fms=["f"], outputs=["click"])

    pd.testing.assert_frame_equal(found[["label", "event_time", "example_id"]], frame)
    assert list(found.columns) == ["label", "event_time", "example_id", *ADDED[:-1]]
    assert found["f__status"].tolist() == STATUSES
    assert found["f__click__logit"].fillna(-1).tolist() == [3.0, -1.0, 0.0, 3.0, 9.0]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_a_polars_frame_of_any_unit_stays_one(client: Client, unit: Any) -> None:
    frame = pl.from_arrow(mine(IDS))
    assert isinstance(frame, pl.DataFrame)
    frame = frame.with_columns(pl.col("event_time").dt.cast_time_unit(unit), pl.col("example_id").cast(pl.Categorical))

    found = client.augment("ads", frame, fms=["f"], embedding_format="float32")

    assert isinstance(found, pl.DataFrame)
    assert found.select(frame.columns).equals(frame)
    assert found["f__click__logit"].to_list() == LOGITS
    assert found["f__hidden"].to_list() == [None if x is None else [x, -x] for x in LOGITS]


def test_rows_as_dictionaries_become_an_arrow_table(client: Client) -> None:
    rows = [{"example_id": name, "event_time": NOON, "n": 1} for name in IDS]

    assert client.augment("ads", rows, fms=["f"])["f__click__logit"].to_pylist() == LOGITS


@pytest.mark.parametrize("kind", [pa.table, pd.DataFrame, pl.DataFrame], ids=["arrow", "pandas", "polars"])
def test_a_table_without_rows_gets_the_columns(client: Client, kind: Any) -> None:
    empty = mine([])
    frame = {pd.DataFrame: empty.to_pandas(), pl.DataFrame: pl.from_arrow(empty)}.get(kind, empty)

    found = client.augment("ads", frame, fms=["f"])

    assert (len(found), [*map(str, getattr(found, "column_names", getattr(found, "columns", [])))][3:]) == (0, ADDED)


def test_a_long_table_is_sent_in_pieces_and_comes_back_whole(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "ROWS_PER_AUGMENT", 7)
    ids = [f"e{i % 12}" for i in range(40)]
    told: list[int] = []

    found = client.augment("ads", mine(ids), fms=["f"], on_progress=told.append)

    assert found["f__click__logit"].to_pylist() == [float(i % 12) if i % 12 < 10 else None for i in range(40)]
    assert found["example_id"].to_pylist() == ids
    assert told == [7, 14, 21, 28, 35, 40]


def test_rows_that_can_not_be_joined_are_numbered_as_in_the_callers_table(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "ROWS_PER_AUGMENT", 7)
    times = pa.array([None if i in {16, 18} else NOON for i in range(40)], pa.timestamp("us", "UTC"))
    table = pa.table({"example_id": [None if i == 15 else "e1" for i in range(40)], "event_time": times})

    with pytest.raises(RowsRefusedError) as refused:
        client.augment("ads", table, fms=["f"])

    assert [(error.row, error.column, error.code) for error in refused.value.errors] == [
        (15, "example_id", "null"),
        (16, "event_time", "null"),
    ]
    assert refused.value.detail == (
        "example_id: it is null: 1 rows, the first is row 15; event_time: it is null: 2 rows, the first is row 16"
    )


def test_a_table_of_many_small_chunks_is_served(client: Client) -> None:
    table = pa.concat_tables([mine([f"e{i % 10}"]) for i in range(5000)])

    found = client.augment("ads", table, fms=["f"])

    assert found["f__click__logit"].to_pylist() == [float(i % 10) for i in range(5000)]


class Cutting(httpx.HTTPTransport):
    """A way to the API on which the end of every answer is lost."""

    def __init__(self, lost: int) -> None:
        super().__init__()
        self._lost = lost

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        whole = super().handle_request(request)
        content = whole.read()
        kept = content[: -self._lost]
        return httpx.Response(whole.status_code, headers={"Content-Type": whole.headers["Content-Type"]}, content=kept)


@pytest.mark.parametrize("lost", [1, 8, 200])
def test_an_answer_that_lost_its_end_is_an_error(url: str, lost: int) -> None:
    with Client(url, transport=Cutting(lost)) as client, pytest.raises(TruncatedStreamError):
        client.augment("ads", mine(IDS), fms=["f"])


def test_what_is_wrong_with_the_table_is_told(client: Client) -> None:
    naive = mine(IDS).set_column(1, "event_time", mine(IDS)["event_time"].cast(pa.timestamp("us")))
    colliding = mine(IDS).append_column("f__status", pa.nulls(5))
    shifted = mine(IDS).to_pandas().assign(event_time=NOON - timedelta(days=1)).drop(columns="example_id")

    with pytest.raises(DasClientError, match="without a time zone"):
        client.augment("ads", naive, fms=["f"])
    with pytest.raises(ValueError, match="f__status"):
        client.augment("ads", colliding, fms=["f"])
    with pytest.raises(ValueError, match="example_id"):
        client.augment("ads", shifted, fms=["f"])
    with pytest.raises(NotFoundError, match="nope"):
        client.augment("ads", mine(IDS), fms=["nope"])
    with pytest.raises(NotFoundError, match="nope"):
        client.augment("nope", mine(IDS), fms=["f"])
