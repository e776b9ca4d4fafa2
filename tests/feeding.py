"""A dataset on a real server whose logs are fed by hand, and the sink that empties them. Without torch or HTTP."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import redis
from deltalake import DeltaTable

from das_service.folder import Folder
from das_service.logs import records, streams
from das_service.metrics import Metrics
from das_service.redis_client import run_script
from das_service.registry import (
    FmRecord,
    Registry,
    SnapshotRecord,
    dataset_field,
    fm_field,
    read_catalog,
    snapshot_field,
)
from das_service.role import RoleContext
from das_service.settings import Settings
from das_service.sink.sink import Sink
from das_service.supervision.answer import LookupQuery
from das_service.supervision.join import OfflineJoin
from das_service.supervision.windows import BatchRows, iter_windows
from das_service.tables.duck import Duck
from das_service.watch.status import dataset_status
from schemas import keys
from schemas.dataset import TIMESTAMP, DatasetSpec, example_schema
from schemas.entries import SHADOW, encode_batch, head_fields, parse_entry
from schemas.snapshot import OutputColumns, scored_schema
from schemas.supervision import SCORED, online_layout, pack_values
from schemas.tables import dead_schema

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
NOON_US = int(NOON.timestamp()) * 1_000_000
DAY_US = 86_400_000_000
OUTPUTS = OutputColumns(tasks=("click",), embeddings={"hidden": (2, "float16")})
SPEC = DatasetSpec.model_validate(
    {
        "features": [
            {"name": "price", "type": "float", "nullable": True},
            {"name": "user_id", "type": "category", "value_type": "string"},
            {"name": "tags", "type": "category_list", "value_type": "string", "max_length": 4, "nullable": True},
            {"name": "image", "type": "vector", "size": 2, "nullable": True},
        ],
        "partitions": 2,
    }
)


@dataclass
class Feeding:
    """The dataset `ads`: chunks go in by hand, tables come out."""

    settings: Settings
    client: redis.Redis
    spec: DatasetSpec = SPEC
    dataset: str = "ads"
    now: float = 1000.0
    folder: Folder = field(init=False)
    registry: Registry = field(init=False)
    sinks: list[Sink] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = Folder(self.settings.tables_uri)
        self.registry = Registry(self.client, self.folder)
        self.declare(self.spec)
        self.create_logs(records.DATASET_LOGS)

    @property
    def epoch(self) -> int:
        recorded = records.read_logs_file(self.folder, self.dataset)
        assert recorded is not None
        return recorded.epoch

    def declare(self, spec: DatasetSpec) -> None:
        self.spec = spec
        self.registry.change(dataset_field(self.dataset), DatasetSpec, lambda _: spec)

    def create_logs(self, kinds: Sequence[str]) -> None:
        streams.create_logs(self.client, self.folder, self.dataset, partitions=self.spec.partitions, kinds=kinds)

    def declare_fm(self, fm: str, *, required: bool = True, outputs: OutputColumns | None = OUTPUTS) -> None:
        record = FmRecord(fm=fm, required=required, outputs=outputs)
        self.registry.change(fm_field(self.dataset, fm), FmRecord, lambda _: record)
        self.create_logs(records.fm_logs(fm))
        streams.create_groups(self.client, self.dataset, partitions=self.spec.partitions, fm=fm)

    def post(self, rows: Iterable[Mapping[str, Any]], *, chunk_rows: int = 5000) -> list[streams.Appended]:
        """Log examples as the door does: split by partition, cut into chunks."""
        schema = example_schema(self.spec)
        given = [{"price": 1.0, "user_id": "u", **row} for row in rows]
        table = pa.table(
            {
                field.name: pa.array([row.get(field.name) for row in given], field.type)
                for field in schema
                if field.name not in {"example_digest", "event_time"}
            }
        )
        times = pa.array([row.get("event_time", NOON_US) for row in given], pa.int64()).cast(TIMESTAMP)
        ids = table["example_id"].combine_chunks()
        arrays = {"example_digest": keys.digest_array(ids), "event_time": times}
        batch = pa.RecordBatch.from_arrays(
            [arrays[f.name] if f.name in arrays else table[f.name].combine_chunks() for f in schema], schema=schema
        )
        partitions = keys.partitions_of(batch.column("example_digest"), self.spec.partitions)
        chunks = []
        for partition in range(self.spec.partitions):
            part = batch.filter(pa.array(partitions == partition))
            chunks += [
                self._chunk(partition, "examples", part.slice(first, chunk_rows), len(self.spec.features), {})
                for first in range(0, part.num_rows, chunk_rows)
            ]
        return self.append(chunks)

    def post_ids(self, first: int, last: int, **values: Any) -> list[streams.Appended]:
        """Log examples named by numbers in [first, last)."""
        chunk_rows = values.pop("chunk_rows", 5000)
        return self.post(({"example_id": f"e{i}", **values} for i in range(first, last)), chunk_rows=chunk_rows)

    def score(self, fm: str, example_ids: Sequence[str], *, event_time: int = NOON_US, logit: float = 0.5) -> None:
        """Log supervision of examples as a worker does."""
        schema = scored_schema(OUTPUTS)
        meta = {"fm": fm, "snapshot_id": "s1", "trained_through": NOON_US - DAY_US, "scored_at": NOON_US}
        ids = pa.array(example_ids, pa.string())
        columns = [
            ids,
            keys.digest_array(ids),
            pa.array([event_time] * len(ids), pa.int64()).cast(TIMESTAMP),
            pa.array([logit] * len(ids), pa.float32()),
            pa.array([b"abcd"] * len(ids), pa.binary(4)),
        ]
        self._append_outcome(records.scored_log(fm), pa.RecordBatch.from_arrays(columns, schema=schema), meta)

    def say_aside(
        self,
        fm: str,
        example_ids: Sequence[str],
        *,
        mark: str = SHADOW,
        snapshot_id: str = "s2",
        logit: float = 9.0,
        generation: int | str = 0,
        max_bytes: int = 1 << 30,
    ) -> list[int]:
        """Log what a shadow, or a backfill, said of examples; give what the script answers."""
        ids = pa.array(example_ids, pa.string())
        columns = [
            ids,
            keys.digest_array(ids),
            pa.array([NOON_US] * len(ids), pa.int64()).cast(TIMESTAMP),
            pa.array([logit] * len(ids), pa.float32()),
            pa.array([b"wxyz"] * len(ids), pa.binary(4)),
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=scored_schema(OUTPUTS))
        partitions = keys.partitions_of(batch.column("example_digest"), self.spec.partitions)
        meta = {"fm": fm, "snapshot_id": snapshot_id, "trained_through": NOON_US - DAY_US, "scored_at": NOON_US + 1}
        replies, kind = [], records.scored_log(fm)
        for partition in np.unique(partitions).tolist():
            part = batch.filter(pa.array(partitions == partition))
            names = [
                keys.log(self.dataset, partition, kind),
                keys.counters(self.dataset, partition),
                keys.generation(self.dataset, partition, fm),
            ]
            head = head_fields(part.schema, num_rows=part.num_rows, num_features=0, meta=meta)
            arguments = [generation, self.epoch, kind, max_bytes, encode_batch(part), mark, *head]
            replies.append(run_script(self.client, "append_aside", names, arguments))
        return replies

    def fail(self, fm: str, example_ids: Sequence[str], *, event_time: int = NOON_US) -> None:
        """Log dead letters as a worker does."""
        ids = pa.array(example_ids, pa.string())
        columns = [
            ids,
            keys.digest_array(ids),
            pa.array([event_time] * len(ids), pa.int64()).cast(TIMESTAMP),
            pa.array(["boom"] * len(ids), pa.string()),
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=dead_schema())
        self._append_outcome(records.dead_log(fm), batch, {"fm": fm, "snapshot_id": "s1", "failed_at": NOON_US})

    def put_online(
        self,
        fm: str,
        example_ids: Sequence[str],
        *,
        logit: float,
        snapshot: int = 0,
        scored_at: int = NOON_US,
        state: int = SCORED,
    ) -> None:
        """Put values into the online store as the publish script does; snapshot: its number in the FM's record."""
        digests = keys.digest_array(pa.array(example_ids, pa.string()))
        values = pack_values(
            online_layout(OUTPUTS),
            snapshot=snapshot,
            event_time_us=np.full(len(digests), NOON_US),
            scored_at_us=scored_at,
            state=state,
            outputs={
                "click__logit": np.full(len(digests), logit, np.float32),
                "hidden": np.frombuffer(b"wxyz" * len(digests), np.uint8).reshape(-1, 4),
            },
        )
        width = online_layout(OUTPUTS).width
        partitions = keys.partitions_of(digests, self.spec.partitions)
        for i, digest in enumerate(digests.to_pylist()):
            prefix = keys.online_prefix(self.dataset, int(partitions[i]), fm)
            self.client.set(prefix + digest, values[i * width : (i + 1) * width])

    def register(self, fm: str, *snapshot_ids: str) -> None:
        """Let an FM have snapshots that were validated."""
        for snapshot_id in snapshot_ids:
            record = SnapshotRecord(
                snapshot_id=snapshot_id, uri="/nowhere", sha256="0" * 64, state="validated",
                trained_through=NOON - timedelta(days=1), registered_at=NOON,
            )  # fmt: skip
            self.registry.change(
                fm_field(self.dataset, fm),
                FmRecord,
                lambda old, name=snapshot_id: old.model_copy(update={"snapshots": (*old.snapshots, name)}),
            )
            self.registry.change(
                snapshot_field(self.dataset, fm, snapshot_id), SnapshotRecord, lambda _, made=record: made
            )

    def status(self) -> dict[str, Any]:
        """Give the dataset's status as the API does."""
        return dataset_status(self.client, self.folder, read_catalog(self.client), self.dataset, now_us=NOON_US)

    def append(self, chunks: Sequence[streams.Chunk]) -> list[streams.Appended]:
        limits = streams.AppendLimits(epoch=self.epoch, floors={}, max_bytes=1 << 30, dedup_seconds=1)
        return streams.append_chunks(self.client, chunks, limits)

    def read_group(self, fm: str, kind: str = "examples", *, acknowledge: bool = True) -> list[dict[str, Any]]:
        """Read what an FM's group has not been given yet, as a worker does; give its rows."""
        rows = []
        for partition in range(self.spec.partitions):
            name = keys.log(self.dataset, partition, kind)
            for _, entries in self.client.xreadgroup(keys.group(fm), "w", {name: ">"}, count=1000) or []:
                for entry_id, fields in entries:
                    entry = parse_entry(entry_id, fields)
                    batch = entry.batch(example_schema(self.spec, num_features=entry.num_features))
                    rows += batch.to_pylist()
                    if acknowledge:
                        self.client.xack(name, keys.group(fm), entry_id)
        return rows

    def sink(self, instance: str = "sink-1") -> Sink:
        context = RoleContext(
            self.settings, role="sink", instance=instance, client=self.client, metrics=Metrics("sink")
        )
        self.sinks.append(Sink(context))
        return self.sinks[-1]

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def run(self, sink: Sink, *, steps: int = 6) -> None:
        """Let the sink do what is due, a second of its clock at a time."""
        for _ in range(steps):
            self.now += 1.0
            sink.step(now=self.now)

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Give all rows of a table as Delta says they are."""
        found = DeltaTable(self.folder.uri_of(f"{self.dataset}/{table}"))
        return pa.table(found.to_pyarrow_table()).to_pylist()

    def ids(self, table: str) -> list[str]:
        return sorted(row["example_id"] for row in self.rows(table))

    def kept_rows(self, kind: str = "examples") -> int:
        """Give how many rows lie in a log."""
        counters = streams.read_counters(self.client, self.dataset, range(self.spec.partitions), [kind])
        return sum(found.kept_rows for found in counters.values())

    def _chunk(
        self, partition: int, kind: str, batch: pa.RecordBatch, num_features: int, meta: Mapping[str, Any]
    ) -> streams.Chunk:
        return streams.Chunk(
            dataset=self.dataset,
            partition=partition,
            kind=kind,
            data=encode_batch(batch),
            head=head_fields(batch.schema, num_rows=batch.num_rows, num_features=num_features, meta=meta),
            num_rows=batch.num_rows,
        )

    def _append_outcome(self, kind: str, batch: pa.RecordBatch, meta: Mapping[str, Any]) -> None:
        partitions = keys.partitions_of(batch.column("example_digest"), self.spec.partitions)
        chunks = [
            self._chunk(int(partition), kind, batch.filter(pa.array(partitions == partition)), 0, meta)
            for partition in np.unique(partitions)
        ]
        self.append(chunks)


def names(first: int, last: int) -> list[str]:
    """Give the ids that post_ids makes, sorted as text."""
    return sorted(f"e{i}" for i in range(first, last))


def metric(sink: Sink, name: str, **labels: str) -> float | None:
    """Give a metric of the dataset as the sink counts it."""
    return sink._work.metrics.registry.get_sample_value(name, {"dataset": "ads", **labels})


def joined(feeding: Feeding, example_ids: list[str]) -> list[dict[str, Any]]:
    """What a default join gives, from the tables alone."""
    duck = Duck(memory_bytes=256 * 1024 * 1024, joins_as_written=True)
    query = LookupQuery(fms=("f",), embedding_format="encoded")
    join = OfflineJoin(duck, feeding.folder, read_catalog(feeding.client), "ads", query, client=None)
    batch = pa.RecordBatch.from_pydict({"example_id": pa.array(example_ids, pa.string())})
    rows = BatchRows(batch=batch, event_time=np.full(len(example_ids), NOON_US))
    try:
        windows = iter_windows([rows], most_rows=1000, granularity="day")
        return [row for window in windows for row in join.join(window).columns.to_pylist()]
    finally:
        duck.close()
