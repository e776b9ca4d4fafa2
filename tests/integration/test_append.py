"""A request's chunks on their way into the logs of its partitions: one wait for the disk, one refusal for all."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from das_service.errors import OverloadedError
from das_service.logs import streams
from das_service.redis_client import script
from schemas import keys
from tests.conftest import STRACE, Server, make_settings
from tests.declared import SPEC, Declared, examples

LIMITS = streams.AppendLimits(epoch=1, floors={}, max_bytes=1 << 30, dedup_seconds=3600)
LONG = "x" * 200_000  # a server reads an argument as long as this apart from what follows it


@pytest.fixture
def declared(own_server: Server, tmp_path: Path) -> Iterator[Declared]:
    with contextlib.closing(own_server.client()) as client:
        yield Declared(make_settings(own_server, tmp_path), client)


def long_chunks(declared: Declared, number: int = 0) -> list[streams.Chunk]:
    """The number-th request: one chunk for each partition."""
    return [
        declared.chunk(partition, [{**row, "user_id": LONG} for row in examples(100 * number + 10 * partition, 2)])
        for partition in range(SPEC.partitions)
    ]


def lengths(declared: Declared) -> list[int]:
    return [declared.client.xlen(keys.log("ads", partition, "examples")) for partition in range(SPEC.partitions)]


def test_the_chunks_of_a_request_are_appended_once_each_by_a_server_that_knows_no_script(declared: Declared) -> None:
    chunks = long_chunks(declared)
    declared.client.script_flush()
    first = streams.append_chunks(declared.client, chunks, LIMITS)
    declared.client.script_flush()
    again = streams.append_chunks(declared.client, chunks, LIMITS)
    assert [at.repeated for at in first] == [False] * SPEC.partitions
    assert [at.repeated for at in again] == [True] * SPEC.partitions
    assert [at.position for at in again] == [at.position for at in first]
    assert lengths(declared) == [1] * SPEC.partitions


def test_a_server_short_of_memory_takes_all_of_a_request_or_none(declared: Declared) -> None:
    declared.client.script_load(script("append").text)
    taken = set()
    for number, room in enumerate(range(0, 3_000_000, 200_000)):
        used = int(declared.client.info("memory")["used_memory"])
        declared.client.config_set("maxmemory", used + room)
        with contextlib.suppress(OverloadedError):
            streams.append_chunks(declared.client, long_chunks(declared, number), LIMITS)
        found = lengths(declared)
        assert found == [found[0]] * SPEC.partitions
        taken.add(found[0])
    assert min(taken) == 0 < max(taken)


def test_the_server_syncs_once_for_a_request_of_several_partitions(tmp_path: Path, own_server: Server) -> None:
    own_server.stop()
    wrapper = tmp_path / "traced-server"
    trace = f"{STRACE} -D -ff -e trace=fdatasync,fsync -o {tmp_path}/trace"
    wrapper.write_text(f'#!/bin/sh\nexec {trace} {own_server.program} "$@"\n')
    wrapper.chmod(0o755)
    server = Server(program=wrapper, folder=tmp_path / "traced", port=own_server.port)
    server.start()
    try:
        with contextlib.closing(server.client()) as client:
            declared = Declared(make_settings(server, tmp_path / "tables"), client)
            client.script_load(script("append").text)
            before = count_syncs(tmp_path)
            streams.append_chunks(client, long_chunks(declared), LIMITS)
            assert count_syncs(tmp_path) - before == 1
    finally:
        server.stop()


def count_syncs(folder: Path) -> int:
    lines = [line for path in folder.glob("trace.*") for line in path.read_text().splitlines()]
    return sum(bool(re.search(r"\bf(data)?sync\(\d+\)\s+= 0", line)) for line in lines)
