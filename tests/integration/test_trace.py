"""A caller's trace from the request to the tables."""

import contextlib
import logging
from pathlib import Path

import pytest
import redis

from das_service.logs import records, streams
from das_service.metrics import Metrics
from das_service.role import RoleContext
from das_service.settings import Settings
from das_service.sink.sink import Sink
from tests.lanes import at_work, closed_form_engine, declare_scored
from tests.served import examples, serve

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


def test_worker_and_sink_tell_which_trace_they_work_on_and_the_scored_chunk_carries_it(
    settings: Settings, store: redis.Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = closed_form_engine(tmp_path, max_batch=64)
    declared = declare_scored(settings, store, "ads", engine)
    partitions = range(declared.spec.partitions)
    sink = Sink(RoleContext(settings, role="sink", instance="s", client=store, metrics=Metrics("sink")))
    caplog.set_level(logging.DEBUG, "das")

    with serve(settings) as api, contextlib.closing(sink):
        path, headers = "/v1/datasets/ads/examples", {"traceparent": TRACEPARENT}
        assert api.http.post(path, json=examples(0, 50), headers=headers).status_code == 202
        with at_work(declared, engine):
            pass
        scored = streams.read_after(store, "ads", records.scored_log("f"), dict.fromkeys(partitions), count=10)
        for second in range(4):
            sink.step(now=1000.0 + second)

    assert {entry.trace_id for entries in scored.values() for entry in entries} == {TRACE_ID}
    told = [record.name for record in caplog.records if TRACE_ID in record.getMessage()]
    assert {name: told.count(name) for name in told} == {"das.worker": 2, "das.sink": 4}
