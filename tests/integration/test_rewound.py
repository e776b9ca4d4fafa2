"""A server that comes back from an older copy of its disk, under a connected worker and sink."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from das_service.logs import streams
from das_service.logs.records import read_mark
from das_service.recover import recover
from tests.conftest import Server, make_settings
from tests.declared import SPEC, Declared, examples
from tests.fakes import expected_supervision
from tests.roles import Roles, beats, publish, wait_for

CHUNKS, CHUNK_ROWS = 8, 100


@pytest.fixture
def declared(own_server: Server, tmp_path: Path) -> Iterator[Declared]:
    with contextlib.closing(own_server.client()) as client:
        yield Declared(make_settings(own_server, tmp_path), client)


@pytest.fixture
def roles(declared: Declared, tmp_path: Path) -> Iterator[Roles]:
    with contextlib.closing(Roles(declared.settings, tmp_path)) as roles:
        yield roles


def post(declared: Declared, times: int) -> None:
    """Log the times-th lot of examples, in both partitions."""
    for i in range(times * CHUNKS, (times + 1) * CHUNKS):
        declared.append(i % 2, examples(i * CHUNK_ROWS, CHUNK_ROWS))


def committed(declared: Declared, table: str) -> int:
    mark = read_mark(declared.folder, "ads", table)
    return 0 if mark is None else mark.rows


def wait_until_worked_off(declared: Declared, lots: int) -> None:
    num_rows = lots * CHUNKS * CHUNK_ROWS
    wait_for(lambda: committed(declared, "examples") == committed(declared, "supervision/f") == num_rows)
    wait_for(lambda: declared.pending("f") == 0)


def table(declared: Declared, name: str) -> pa.Table:
    """Give a table as Delta says it is, in the order in which its examples were made."""
    found = pa.table(DeltaTable(declared.folder.uri_of(f"ads/{name}")).to_pyarrow_table())
    return found.take(np.argsort([int(text[1:]) for text in found["example_id"].to_pylist()]))


def test_nothing_is_scored_into_a_rewound_log_and_after_recovery_no_row_is_doubled_or_altered(
    declared: Declared, roles: Roles, own_server: Server, tmp_path: Path
) -> None:
    declared.declare_fm("f")
    worker = roles.start("worker")
    sink = roles.start("sink")
    publish(declared)
    post(declared, 0)
    wait_until_worked_off(declared, 1)
    worker.terminate()
    assert worker.wait(timeout=60) == 0
    post(declared, 1)  # lies unscored in the copy
    wait_for(lambda: committed(declared, "examples") == 2 * CHUNKS * CHUNK_ROWS)
    own_server.kill()
    shutil.copytree(own_server.folder, tmp_path / "copy")
    own_server.start()
    worker = roles.start("worker")
    post(declared, 2)
    wait_until_worked_off(declared, 3)

    own_server.kill()
    shutil.rmtree(own_server.folder)
    shutil.copytree(tmp_path / "copy", own_server.folder)
    own_server.start()
    before = declared.pending("f")
    wait_for(lambda: "das recover" in str(beats(declared)))
    heard = {beat["count"] for beat in beats(declared)}
    wait_for(lambda: all(beat["count"] > max(heard) + 3 for beat in beats(declared)))
    assert (declared.scored("f"), declared.pending("f")) == ([], before)
    assert before == CHUNKS

    recover(declared.settings)
    wait_for(lambda: "das recover" not in str(beats(declared)))
    post(declared, 3)
    wait_until_worked_off(declared, 4)

    expected = pa.Table.from_pylist(examples(0, 4 * CHUNKS * CHUNK_ROWS))
    kept, supervision = table(declared, "examples"), table(declared, "supervision/f")
    assert kept.select(expected.column_names).to_pylist() == expected.to_pylist()
    assert supervision["example_id"].to_pylist() == expected["example_id"].to_pylist()
    logits, embeddings = expected_supervision(expected, SPEC)
    np.testing.assert_allclose(supervision["click__logit"], logits["click"], rtol=1e-6)
    assert supervision["hidden"].to_pylist() == [bytes(value) for value in embeddings["hidden"]]
    assert (committed(declared, "dead_letters/f"), declared.dead("f")) == (0, [])
    assert (worker.poll(), sink.poll()) == (None, None)
    assert streams.check_logs(declared.client, declared.folder, "ads") == []
