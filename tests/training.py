"""A dataset whose examples are posted, scored, labelled and closed as a test says, and what its batches are."""

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import redis
from deltalake import DeltaTable

from das_service.metrics import Metrics
from das_service.registry import read_catalog
from das_service.role import RoleContext
from das_service.sink.sink import Sink
from fm_inference.engine import Scored
from fm_inference.publishing import Publisher, append_backfill, microseconds
from schemas import keys
from schemas.wire import CURSOR_KEY, iter_marked
from tests.served import Api, Stand

START = datetime(2026, 3, 1, tzinfo=UTC)
SPEC: dict[str, Any] = {
    "features": [
        {"name": "price", "type": "float"},
        {"name": "user_id", "type": "category", "value_type": "string"},
        {"name": "item", "type": "category", "value_type": "int64", "nullable": True},
        {"name": "tags", "type": "category_list", "value_type": "string", "max_length": 3, "nullable": True},
        {"name": "image", "type": "vector", "size": 4, "nullable": True},
    ],
    "tasks": [
        {"name": "click", "label_window_seconds": 600},
        {"name": "buy", "label_window_seconds": 600, "negative_if_silent": False},
    ],
    "partitions": 3,
    "allowed_lateness_seconds": 60,
}


def at(second: int) -> datetime:
    return START + timedelta(seconds=second)


def example(number: int) -> dict[str, Any]:
    """The example of a number: everything about it follows from that."""
    chance = random.Random(number)
    return {
        "example_id": f"e{number}",
        "event_time": at(40 * number + chance.randrange(60)),
        "price": float(number),
        "user_id": f"u{chance.randrange(5)}",
        "item": None if number % 3 == 0 else number,
        "tags": None if number % 4 == 0 else [f"t{i}" for i in range(number % 3)],
        "image": None if number % 5 == 0 else [float(number), 0.5, -1.0, float(chance.randrange(9))],
    }


def click_of(number: int) -> float:
    return float(number % 7 == 0)


@dataclass
class Trained:
    """A dataset whose examples are posted, scored, labelled and closed as the test says."""

    api: Api
    client: redis.Redis
    now: float = 0.0
    dataset: str = "stream"
    sink: Sink | None = None
    stand: Stand = field(init=False)

    def __post_init__(self) -> None:
        self.api.declare(self.dataset, SPEC)
        self.api.declare_fm("f", self.dataset)
        self.stand = Stand(self.api.settings, self.client, dataset=self.dataset)
        self.stand.validate()

    def post(self, first: int, count: int) -> None:
        rows = [example(number) for number in range(first, first + count)]
        assert self.api.post(pa.table(_columns(rows)), self.dataset).status_code == 202
        labels = [
            {"example_id": row["example_id"], "label_time": (row["event_time"] + timedelta(seconds=9)).isoformat(),
             "click": click_of(first + i)} for i, row in enumerate(rows) if (first + i) % 2 == 1 or click_of(first + i)
        ]  # fmt: skip
        if labels:
            answer = self.api.http.post(f"/v1/datasets/{self.dataset}/labels", json={"labels": labels})
            assert answer.status_code == 202, answer.text
        self.stand.work()

    def backfill(self, snapshot_id: str) -> None:
        """Append what a snapshot says of every stored example: its price."""
        catalog = read_catalog(self.client)
        record, snapshot = catalog.fm(self.dataset, "f"), catalog.snapshot(self.dataset, "f", snapshot_id)
        publisher = Publisher(
            dataset=self.dataset, fm="f", consumer="", snapshot_id=snapshot_id, snapshot_number=0, generation=0,
            trained_through_us=microseconds(snapshot.trained_through), epoch=1, ttl_seconds=1,
            outputs=record.outputs, has_msetex=False,
        )  # fmt: skip
        place = Path(self.api.settings.tables_uri) / self.dataset / "examples"
        rows = DeltaTable(str(place)).to_pyarrow_table(columns=["example_id", "event_time", "price"]).combine_chunks()
        digests = keys.digest_array(rows["example_id"].combine_chunks())
        rows = rows.append_column("example_digest", digests)
        partitions = keys.partitions_of(digests, SPEC["partitions"])
        for partition in range(SPEC["partitions"]):
            some = rows.filter(pa.array(partitions == partition)).combine_chunks()
            scored = Scored(
                logits={"click": some["price"].to_numpy().astype(np.float32)},
                embeddings={"hidden": np.zeros((some.num_rows, 4), np.uint8)},
            )
            assert not append_backfill(self.client, publisher, partition, some, scored, max_bytes=1 << 30)

    def settle(self) -> None:
        if self.sink is None:
            context = RoleContext(
                self.api.settings, role="sink", instance=f"s{self.now}", client=self.client, metrics=Metrics("sink")
            )
            self.sink = Sink(context)
        for _ in range(4):
            self.now += 6.0
            self.sink.step(now=self.now)
        assert self.sink.health() == []

    def close(self, first: int, count: int) -> None:
        """Post examples and close all but the last few of them, whose window is not over."""
        self.post(first, count)
        self.settle()

    def stop(self) -> None:
        if self.sink is not None:
            self.sink.drain(deadline=float("-inf"))
            self.sink.close()

    def ask(self, **params: Any) -> Any:
        renamed = {{"since": "from", "until": "to"}.get(name, name): value for name, value in params.items()}
        return self.api.http.get(f"/v1/datasets/{self.dataset}/batches", params=renamed)

    def read(self, **params: Any) -> "Read":
        answer = self.ask(**params)
        assert answer.status_code == 200, answer.text
        return Read(answer.content)


class Read:
    """An answer: its bytes, batches and cursors."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        marked = list(iter_marked(content))
        self.batches = [batch for batch, _ in marked]
        self.cursors = [marks[CURSOR_KEY].decode() for _, marks in marked if CURSOR_KEY in marks]
        self.schema = pa.ipc.open_stream(content).schema
        self.start = self.schema.metadata[CURSOR_KEY].decode()
        self.table = pa.Table.from_batches(self.batches, schema=self.batches[0].schema)
        self.ids = self.table["example_id"].to_pylist()


def _columns(rows: list[dict[str, Any]]) -> dict[str, pa.Array]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    types = {"event_time": pa.timestamp("us", "UTC"), "image": pa.list_(pa.float32(), 4), "item": pa.int64()}
    return {name: pa.array(values, types.get(name)) for name, values in columns.items()}


def expected_order(trained: Trained) -> list[str]:
    """Ids in the order of (ready_seq, partition), from the table as pyarrow reads it."""
    place = Path(trained.api.settings.tables_uri) / trained.dataset / "closed"
    rows = DeltaTable(str(place)).to_pyarrow_table(columns=["example_id", "ready_seq", "_partition"]).to_pylist()
    return [r["example_id"] for r in sorted(rows, key=lambda row: (row["ready_seq"], row["_partition"]))]
