"""A spill disk that is full or broken is told over HTTP as what it is; once it is mended the next request is served."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from das_service.batches.pages import PageReader
from das_service.errors import DiskReserveError, UnavailableError
from das_service.folder import Folder
from das_service.settings import Settings
from das_service.tables.duck import JOIN_MEMORY, Duck
from das_service.tables.durable_table import DurableTable
from schemas.dataset import DatasetSpec
from schemas.tables import supervision_table, supervision_table_schema
from schemas.wire import ARROW_STREAM, read_table
from tests.conftest import Server, make_settings
from tests.joining import table_rows
from tests.served import NOON, NOON_US, OUTPUTS, SPEC, Api, Stand, arrow_body
from tests.training import Trained, expected_order

MIB = 1024 * 1024
NUM_ROWS, ID_BYTES = 200_000, 240  # more of ids than DuckDB has memory


@pytest.fixture
def settings(server: Server, tmp_path: Path) -> Settings:
    """As little memory for DuckDB as may be set."""
    return make_settings(server, tmp_path, duckdb_memory_bytes=64 * MIB)


def duck_of(api: Api) -> Duck:
    duck: Duck = api.http.app_state["service"].duck
    return duck


@contextlib.contextmanager
def broken_spill(duck: Duck) -> Iterator[Path]:
    """A file stands where the spill folder was."""
    folder = duck._spill.path
    aside = folder.with_name(f"aside-{folder.name}")
    folder.rename(aside)
    folder.touch()
    try:
        yield folder
    finally:
        folder.unlink()
        aside.rename(folder)


def assert_no_room(answer: Any, folder: Path, what: str) -> None:
    body = answer.json()
    assert (answer.status_code, body["code"], body["retryable"]) == (507, "disk_reserve", True), body
    assert answer.headers["Retry-After"] == "30"
    assert body["detail"].startswith(f"{what} finds no room to spill into: ")
    assert str(folder) in body["detail"]


def caller_ids() -> pa.Array:
    return pa.array([f"{number:0{ID_BYTES}}" for number in range(NUM_ROWS)])


def write_supervision(settings: Settings) -> None:
    """Commit supervision of every row that the caller has."""
    spec, schema = DatasetSpec.model_validate(SPEC), supervision_table_schema(OUTPUTS)
    times = np.full(NUM_ROWS, NOON_US)
    columns = {
        "example_id": caller_ids(),
        "event_time": times,
        "snapshot_id": ["s1"] * NUM_ROWS,
        "trained_through": times - 1,
        "scored_at": times,
        "available_at": times,
        "click__logit": np.arange(NUM_ROWS, dtype=np.float32),
        "hidden": pa.array([b"abcd"] * NUM_ROWS, pa.binary()),
    }
    folder = Folder(settings.tables_uri)
    table = DurableTable(
        folder, "ads", supervision_table("f"), schema=schema, partitions=spec.partitions, retention_hours=24
    )
    table.open(epoch=1)
    table.commit(table_rows(columns, schema, spec), {})


def test_a_table_whose_join_can_not_spill_is_507_and_served_once_it_can(api: Api, stand: Stand) -> None:
    stand.validate()
    write_supervision(api.settings)
    times = pa.array([NOON] * NUM_ROWS, pa.timestamp("us", "UTC"))
    body = arrow_body(pa.table({"example_id": caller_ids(), "event_time": times}))

    def post() -> Any:
        return api.http.post(
            "/v1/datasets/ads/supervision/augment",
            content=body,
            params={"fms": "f", "columns": "supervision"},
            headers={"Content-Type": ARROW_STREAM},
        )

    with broken_spill(duck_of(api)) as folder:
        answer = post()
    assert_no_room(answer, folder, "the join")

    found = read_table(post().content)
    assert found["f__click__logit"].to_pylist() == list(range(NUM_ROWS))


def test_a_page_that_can_not_spill_is_507_and_served_once_it_can(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed_rows = PageReader._closed_rows

    def after_a_large_sort(self: PageReader, ranges: Any) -> pa.Table:
        with self._duck.cursor() as cursor:
            cursor.sql("SELECT hash(range) AS h FROM range(10_000_000) ORDER BY h").to_arrow_table()
        return closed_rows(self, ranges)

    monkeypatch.setattr(PageReader, "_closed_rows", after_a_large_sort)
    trained.close(0, 300)

    with broken_spill(duck_of(trained.api)) as folder:
        answer = trained.ask(fms="f")
    assert_no_room(answer, folder, "a page")

    assert trained.read(fms="f").ids == expected_order(trained)


@pytest.fixture
def duck() -> Iterator[Duck]:
    with contextlib.closing(Duck(memory_bytes=64 * MIB, threads=1, joins_as_written=True)) as duck:
        yield duck


FULL = 'IO Error: Could not write file "spill/block": No space left on device'
BROKEN = 'IO Error: Failed to create directory "{spill}": File exists'


@pytest.mark.parametrize("kind", [duckdb.IOException, OSError])
@pytest.mark.parametrize("text", [FULL, BROKEN])
def test_a_spill_disk_that_can_not_be_written_is_disk_reserve(duck: Duck, kind: type[Exception], text: str) -> None:
    line = text.format(spill=duck._spill.path)
    with pytest.raises(DiskReserveError) as caught, duck.room_for("the join"):
        raise kind(f"{line}\nmore of it")
    assert caught.value.detail == f"the join finds no room to spill into: {line}"


@pytest.mark.parametrize("kind", [duckdb.OutOfMemoryException, OSError])
def test_memory_that_is_used_up_is_join_memory(duck: Duck, kind: type[Exception]) -> None:
    with pytest.raises(UnavailableError) as caught, duck.room_for("the join"):
        raise kind("Out of Memory Error: failed to offload data block of size 256.0 KiB")
    wanted = "the join needs more memory or spill disk than it may have (DAS_DUCKDB_MEMORY_BYTES)"
    assert (caught.value.code, caught.value.detail) == (JOIN_MEMORY, wanted)


@pytest.mark.parametrize("kind", [duckdb.IOException, OSError, ValueError])
def test_errors_that_are_not_about_room_pass(duck: Duck, kind: type[Exception]) -> None:
    error = kind('IO Error: No files found that match the pattern "/tables/ads/part-1.parquet"')
    with pytest.raises(kind) as caught, duck.room_for("the join"):
        raise error
    assert caught.value is error
