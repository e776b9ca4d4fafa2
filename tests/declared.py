"""A declared dataset with FMs and chunks in its log, made with the service's own parts and without its HTTP API."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import redis
from torch import nn

from das_service.folder import Folder
from das_service.logs import records, streams
from das_service.registry import (
    Catalog,
    FmRecord,
    Registry,
    SnapshotRecord,
    dataset_field,
    fm_field,
    read_catalog,
    snapshot_field,
)
from das_service.settings import Settings
from das_service.snapshot_folder import manifest_sha256
from fm_inference import Signature, export_snapshot
from schemas import keys
from schemas.dataset import DatasetSpec, example_schema
from schemas.entries import encode_batch, head_fields
from schemas.supervision import online_layout, unpack_values
from tests.fakes import export_closed_form

SPEC = DatasetSpec.model_validate(
    {
        "entity_key": ["user_id"],
        "features": [
            {"name": "price", "type": "float"},
            {"name": "user_id", "type": "category", "value_type": "string"},
            {"name": "item", "type": "category", "value_type": "int64", "nullable": True},
        ],
        "tasks": [{"name": "click", "label_window_seconds": 3600}],
        "partitions": 2,
    }
)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
TRAINED_THROUGH = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Declared:
    """One dataset on a real server."""

    settings: Settings
    client: redis.Redis
    spec: DatasetSpec = SPEC
    dataset: str = "ads"
    folder: Folder = field(init=False)
    registry: Registry = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Folder(self.settings.tables_uri)
        self.registry = Registry(self.client, self.folder)
        self.registry.change(dataset_field(self.dataset), DatasetSpec, lambda _: self.spec)
        self.create_logs(["examples"])

    @property
    def catalog(self) -> Catalog:
        return read_catalog(self.client)

    def create_logs(self, kinds: Sequence[str]) -> None:
        streams.create_logs(self.client, self.folder, self.dataset, partitions=self.spec.partitions, kinds=kinds)

    def declare_fm(self, fm: str, *, required: bool = True) -> None:
        self.registry.change(
            fm_field(self.dataset, fm), FmRecord, lambda old: old or FmRecord(fm=fm, required=required)
        )
        self.create_logs(records.fm_logs(fm))
        streams.create_groups(self.client, self.dataset, partitions=self.spec.partitions, fm=fm)

    def register(self, fm: str, snapshot_id: str, **options: Any) -> Path:
        """Export a closed-form snapshot and register it; a worker validates it."""
        folder = self._snapshot_folder(fm, snapshot_id)
        options.setdefault("trained_through", TRAINED_THROUGH)
        export_closed_form(folder, self.spec, fm=fm, snapshot_id=snapshot_id, **options)
        return self._register_folder(fm, snapshot_id, folder)

    def register_module(self, fm: str, signature: Signature, module: nn.Module) -> Path:
        """Export any module and register it."""
        folder = self._snapshot_folder(fm, signature.snapshot_id)
        export_snapshot(module, signature, folder, trained_through=TRAINED_THROUGH)
        return self._register_folder(fm, signature.snapshot_id, folder)

    def _snapshot_folder(self, fm: str, snapshot_id: str) -> Path:
        folder = Path(self.settings.snapshots_uri) / self.dataset / fm / snapshot_id
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder

    def _register_folder(self, fm: str, snapshot_id: str, folder: Path) -> Path:
        record = SnapshotRecord(
            snapshot_id=snapshot_id, uri=str(folder), sha256=manifest_sha256(folder), registered_at=datetime.now(UTC)
        )
        self.registry.change(
            fm_field(self.dataset, fm),
            FmRecord,
            lambda old: old.model_copy(update={"snapshots": (*old.snapshots, snapshot_id)}),
        )
        self.registry.change(snapshot_field(self.dataset, fm, snapshot_id), SnapshotRecord, lambda _: record)
        return folder

    def activate(self, fm: str, snapshot_id: str, *, withdraw: bool = False) -> None:
        """Make a snapshot the active one; withdraw: the one before may not publish any more."""
        record = self.registry.change(
            fm_field(self.dataset, fm),
            FmRecord,
            lambda old: old.model_copy(
                update={"active": snapshot_id, "generation": old.generation + (1 if withdraw else 0)}
            ),
        )
        for partition in range(self.spec.partitions):
            self.client.set(keys.generation(self.dataset, partition, fm), record.generation)

    def chunk(self, partition: int, rows: Sequence[Mapping[str, Any]]) -> streams.Chunk:
        """Give rows as a chunk, in that partition whatever their ids say."""
        schema = example_schema(self.spec)
        table = pa.Table.from_pylist([{"example_digest": b"\0" * 16, **row} for row in rows], schema=schema)
        digest = keys.digest_array(table["example_id"].combine_chunks())
        table = table.set_column(1, schema.field(1), digest)
        batch = table.combine_chunks().to_batches()[0]
        return streams.Chunk(
            dataset=self.dataset,
            partition=partition,
            kind="examples",
            data=encode_batch(batch),
            head=head_fields(schema, num_rows=batch.num_rows, num_features=len(self.spec.features), meta={}),
            num_rows=batch.num_rows,
        )

    def append(self, partition: int, rows: Sequence[Mapping[str, Any]]) -> streams.Appended:
        """Log rows as one chunk."""
        recorded = records.read_logs_file(self.folder, self.dataset)
        epoch = 1 if recorded is None else recorded.epoch
        limits = streams.AppendLimits(epoch=epoch, floors={}, max_bytes=1 << 30, dedup_seconds=3600)
        return streams.append_chunks(self.client, [self.chunk(partition, rows)], limits)[0]

    def online(self, partition: int, fm: str, example_id: str) -> np.void | None:
        """Give an example's online value."""
        prefix = keys.online_prefix(self.dataset, partition, fm)
        value = self.client.get(prefix + keys.digests([example_id.encode()]))
        if value is None:
            return None
        return unpack_values(online_layout(self.catalog.fm(self.dataset, fm).outputs), value)[0]

    def scored(self, fm: str) -> list[dict[str, Any]]:
        """Give every row of the FM's scored log with its entry's snapshot, in log order per partition."""
        return self._rows(records.scored_log(fm), fm)

    def dead(self, fm: str) -> list[dict[str, Any]]:
        """Give every row of the FM's dead letters."""
        return self._rows(records.dead_log(fm), fm)

    def _rows(self, kind: str, fm: str) -> list[dict[str, Any]]:
        from schemas.snapshot import scored_schema
        from schemas.tables import dead_schema

        is_dead = kind.startswith("dead")
        schema = dead_schema() if is_dead else scored_schema(self.catalog.fm(self.dataset, fm).outputs)
        after = dict.fromkeys(range(self.spec.partitions))
        entries = streams.read_after(self.client, self.dataset, kind, after, count=10_000)
        return [
            {**row, "snapshot_id": entry.meta["snapshot_id"]}
            for partition in sorted(entries)
            for entry in entries[partition]
            for row in entry.batch(schema).to_pylist()
        ]

    def pending(self, fm: str) -> int:
        """Give how many entries the FM has not finished."""
        groups = streams.read_groups(self.client, self.dataset, range(self.spec.partitions), "examples")
        counters = streams.read_counters(self.client, self.dataset, range(self.spec.partitions), ["examples"])
        total = 0
        for partition, group in groups.items():
            state = group[keys.group(fm)]
            delivered = state.last_delivered.seq if state.last_delivered.epoch else -1
            total += state.pending + counters[partition, "examples"].last - delivered
        return total


def examples(first: int, count: int, *, price: float = 1.0, time: datetime = NOON) -> list[dict[str, Any]]:
    """Give rows of SPEC with ids e<first>, e<first + 1>, ..."""
    return [
        {"example_id": f"e{i}", "event_time": time, "price": price + i % 7, "user_id": f"u{i % 5}", "item": i % 11}
        for i in range(first, first + count)
    ]
