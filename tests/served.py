"""The API under test, in process or behind a real socket, and supervision written as a worker would, without one."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import redis
import uvicorn
from starlette.testclient import TestClient

from das_service.app import create_app, server_config
from das_service.beats import beat
from das_service.folder import Folder
from das_service.logs.records import EXAMPLES, dead_log, scored_log
from das_service.redis_client import has_msetex, run_script
from das_service.registry import FmRecord, Registry, SnapshotRecord, fm_field, read_catalog, snapshot_field
from das_service.settings import Settings
from das_service.up.embedded import free_port
from schemas import keys
from schemas.dataset import example_schema
from schemas.entries import encode_batch, head_fields, parse_entry
from schemas.snapshot import OutputColumns, scored_schema
from schemas.supervision import FAILED, SCORED, online_layout, pack_values
from schemas.tables import dead_schema
from schemas.wire import ARROW_STREAM

SPEC: dict[str, Any] = {
    "entity_key": ["user_id"],
    "features": [
        {"name": "price", "type": "float"},
        {"name": "user_id", "type": "category", "value_type": "string"},
        {"name": "item", "type": "category", "value_type": "int64", "nullable": True},
        {"name": "tags", "type": "category_list", "value_type": "string", "max_length": 3, "nullable": True},
        {"name": "image", "type": "vector", "size": 4, "nullable": True},
    ],
    "tasks": [{"name": "click", "label_window_seconds": 3600}],
    "partitions": 2,
}
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
NOON_US = 1_772_366_400_000_000
OUTPUTS = OutputColumns(tasks=("click",), embeddings={"hidden": (2, "float16")})


def examples(first: int, count: int, **changes: object) -> list[dict[str, Any]]:
    """JSON rows of SPEC with ids e<first>, e<first + 1>, ..."""
    return [
        {"example_id": f"e{i}", "event_time": "2026-03-01T12:00:00Z", "price": float(i), "user_id": f"u{i}", **changes}
        for i in range(first, first + count)
    ]


def examples_table(first: int, count: int, **columns: object) -> pa.Table:
    """The same rows as an Arrow table; columns replaces or adds some."""
    made: dict[str, Any] = {
        "example_id": [f"e{i}" for i in range(first, first + count)],
        "event_time": pa.array([NOON] * count, pa.timestamp("us", "UTC")),
        "price": [float(i) for i in range(first, first + count)],
        "user_id": [f"u{i}" for i in range(first, first + count)],
    }
    return pa.table({name: column for name, column in {**made, **columns}.items() if column is not None})


def arrow_body(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@dataclass
class Api:
    """A served API. `http` has httpx's methods."""

    settings: Settings
    http: TestClient

    def declare(self, dataset: str = "ads", spec: Mapping[str, Any] = SPEC) -> None:
        answer = self.http.put(f"/v1/datasets/{dataset}", json=spec)
        assert answer.is_success, answer.text

    def declare_fm(self, fm: str = "f", dataset: str = "ads", *, required: bool = True) -> None:
        assert self.http.put(f"/v1/datasets/{dataset}/fms/{fm}", json={"required": required}).is_success

    def post(self, rows: Sequence[Mapping[str, Any]] | pa.Table | bytes, dataset: str = "ads", **params: Any) -> Any:
        """POST examples: a list as JSON, a table or bytes as Arrow."""
        path = f"/v1/datasets/{dataset}/examples"
        if isinstance(rows, list):
            return self.http.post(path, json={"examples": rows}, params=params)
        body = rows if isinstance(rows, bytes) else arrow_body(rows)
        return self.http.post(path, content=body, params=params, headers={"Content-Type": ARROW_STREAM})

    def lookup(self, ids: Sequence[str], **body: Any) -> list[dict[str, Any]]:
        asked = {"fms": ["f"], "example_ids": list(ids), **body}
        answer = self.http.post("/v1/datasets/ads/supervision/lookup", json=asked)
        assert answer.status_code == 200, answer.text
        return answer.json()["rows"]

    def logged_rows(self, dataset: str = "ads") -> list[dict[str, Any]]:
        """Every row in the examples log, in log order by partition."""
        client = redis.Redis.from_url(self.settings.redis_url.get_secret_value(), protocol=2)
        with client:
            catalog = read_catalog(client)
            rows: list[dict[str, Any]] = []
            for partition in range(catalog.spec(dataset).partitions if dataset in catalog.datasets else 0):
                for entry_id, fields in client.xrange(keys.log(dataset, partition, EXAMPLES)):
                    entry = parse_entry(entry_id, fields)
                    schema = example_schema(catalog.spec(dataset), num_features=entry.num_features)
                    rows += entry.batch(schema).to_pylist()
            return rows

    def look(self) -> None:
        """Let the monitor look now, instead of within a second."""
        self.http.app_state["service"].monitor.look()  # type: ignore[attr-defined]


@contextlib.contextmanager
def serve(settings: Settings) -> Iterator[Api]:
    """The app in process."""
    with TestClient(create_app(settings)) as http:
        yield Api(settings, http)


@contextlib.contextmanager
def serve_over_tcp(settings: Settings, *, port: int | None = None) -> Iterator[int]:
    """The app behind a socket of uvicorn; gives the port."""
    port = port or free_port()
    server = uvicorn.Server(server_config(settings.model_copy(update={"bind": f"127.0.0.1:{port}"})))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


class Stand:
    """Stands in for a worker: validates a snapshot, scores or fails what waits, by the real publish script."""

    def __init__(self, settings: Settings, client: redis.Redis, *, dataset: str = "ads", fm: str = "f") -> None:
        self.client = client
        self.dataset = dataset
        self.fm = fm
        self.registry = Registry(client, Folder(settings.tables_uri))

    def validate(
        self,
        snapshot_id: str = "s1",
        *,
        trained_through: datetime = datetime(2026, 1, 1, tzinfo=UTC),
        outputs: OutputColumns = OUTPUTS,
    ) -> None:
        """Register a snapshot as validated, fix the FM's outputs, and make it active."""
        record = SnapshotRecord(
            snapshot_id=snapshot_id, uri="/nowhere", sha256="0" * 64, state="validated",
            trained_through=trained_through, registered_at=NOON,
        )  # fmt: skip
        self.registry.change(
            fm_field(self.dataset, self.fm),
            FmRecord,
            lambda old: old.model_copy(
                update={"snapshots": (*old.snapshots, snapshot_id), "outputs": outputs, "active": snapshot_id}
            ),
        )
        self.registry.change(snapshot_field(self.dataset, self.fm, snapshot_id), SnapshotRecord, lambda _: record)

    def work(self, *, fail: bool = False) -> int:
        """Score everything that waits with the active snapshot (fail: dead-letter it); give how many rows."""
        catalog = read_catalog(self.client)
        spec, record = catalog.spec(self.dataset), catalog.fm(self.dataset, self.fm)
        total = 0
        for partition in range(spec.partitions):
            stream = keys.log(self.dataset, partition, EXAMPLES)
            group = keys.group(self.fm)
            for _, entries in self.client.xreadgroup(group, "stand", {stream: ">"}, count=1000) or []:
                for entry_id, fields in entries:
                    entry = parse_entry(entry_id, fields)
                    batch = entry.batch(example_schema(spec, num_features=entry.num_features))
                    assert self._publish(partition, entry_id, batch, record, fail=fail)[0] == 1
                    total += batch.num_rows
        return total

    def _publish(
        self, partition: int, entry_id: bytes, batch: pa.RecordBatch, record: FmRecord, *, fail: bool
    ) -> list[int]:
        outputs = record.outputs
        layout = online_layout(outputs)
        event_time = batch.column("event_time").cast(pa.int64()).to_numpy()
        price = batch.column("price").to_numpy().astype(np.float32)
        hidden = np.stack([price, -price], axis=1).astype("<f2").view(np.uint8)
        values = pack_values(
            layout,
            snapshot=record.snapshots.index(record.active),
            event_time_us=event_time,
            scored_at_us=NOON_US,
            outputs={} if fail else {"click__logit": price, "hidden": hidden},
            state=FAILED if fail else SCORED,
        )
        head = [batch.column(name) for name in ("example_id", "example_digest", "event_time")]
        scored = pa.RecordBatch.from_arrays(
            [*head, pa.array(price), pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(4), len(price), [None, pa.py_buffer(np.ascontiguousarray(hidden))])],
            schema=scored_schema(outputs),
        )  # fmt: skip
        dead = pa.RecordBatch.from_arrays([*head, pa.array(["poison"] * len(price))], schema=dead_schema())
        data = encode_batch(dead if fail else scored)
        snapshot = read_catalog(self.client).snapshot(self.dataset, self.fm, record.active)
        through = int(snapshot.trained_through.timestamp()) * 1_000_000
        times = {"failed_at": NOON_US} if fail else {"trained_through": through, "scored_at": NOON_US}
        meta = {"fm": self.fm, "snapshot_id": record.active, **times}
        schema = dead_schema() if fail else scored_schema(outputs)
        fields = head_fields(schema, num_rows=len(price), num_features=0, meta=meta)
        names = [
            keys.log(self.dataset, partition, EXAMPLES),
            keys.log(self.dataset, partition, scored_log(self.fm)),
            keys.log(self.dataset, partition, dead_log(self.fm)),
            keys.counters(self.dataset, partition),
            keys.generation(self.dataset, partition, self.fm),
            keys.attempts(self.dataset, partition, self.fm, EXAMPLES),
        ]
        num_scored, num_dead = (0, len(price)) if fail else (len(price), 0)
        arguments: list[Any] = [
            keys.group(self.fm), entry_id, "stand", record.generation, 1, self.fm, 3600,
            keys.online_prefix(self.dataset, partition, self.fm), keys.digest_bytes(batch.column("example_digest")),
            values, layout.width, int(has_msetex(self.client)), num_scored, b"" if fail else data,
            num_dead, data if fail else b"", 0 if fail else len(fields), *fields,
        ]  # fmt: skip
        reply: list[int] = run_script(self.client, "publish", names, arguments)
        return reply


def beat_as(client: redis.Redis, role: str, *, count: int, **info: Any) -> None:
    """Beat once for a process that is not there."""
    beat(client, f"{role}-test", role=role, count=count, info=info)
