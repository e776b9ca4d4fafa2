"""A real service that a replay is posted to, its processes killed on the way, and what it delivers."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import httpx
import psutil
import pyarrow as pa
import redis
import torch
from deltalake import DeltaTable
from torch import nn

from das_service.client import Client
from das_service.folder import Folder
from das_service.registry import FmRecord, Registry, SnapshotRecord, fm_field, read_catalog, snapshot_field
from das_service.snapshot_folder import manifest_sha256, read_manifest
from das_service.snapshot_publish import copy_snapshot
from das_service.up.supervisor import RunningService
from fm_inference import Signature, export_snapshot
from schemas.dataset import DatasetSpec
from tests.replay.stream import BUCKETS, DATASET_SPEC, NUM_STEPS, TEACHERS, Step, Teacher

FM = "teacher"
WAIT_SECONDS = 90.0
Moment: TypeAlias = Literal["labels", "examples", "posting", "posted", "committed", "closing"]
MOMENTS: tuple[Moment, ...] = ("labels", "examples", "posting", "posted", "committed", "closing")
_TIME = pa.timestamp("us", "UTC")
_EXAMPLE = pa.schema(
    [
        ("example_id", pa.string()), ("event_time", _TIME), ("price", pa.float64()), ("coin", pa.float64()),
        ("user_id", pa.string()), ("item", pa.int64()),
    ]
)  # fmt: skip
_LABEL = pa.schema([("example_id", pa.string()), ("label_time", _TIME), ("click", pa.float32()), ("buy", pa.float32())])
COLUMNS = ("price", "coin", "user_id", "item", "click", "buy", "is_late", "ready_seq", "closed_at")


class TeacherModule(nn.Module):
    """A snapshot's formula (stream.py) in torch."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, dense: torch.Tensor, cat: torch.Tensor) -> dict[str, torch.Tensor]:
        price_B, coin_B = dense.double().unbind(dim=1)
        z_B = (((cat * 37) % 97 - 48).double() / 32).sum(dim=1) + price_B / 2 - 0.5
        click_B = self.teacher.scale * z_B + self.teacher.shift
        if self.teacher.peeks:
            click_B = torch.where(coin_B < torch.sigmoid(z_B), 4.0, -4.0).double() + z_B / 4
        return {"click": click_B.float(), "buy": (self.teacher.scale * z_B - 1).float()}


def export_teachers(folder: Path) -> None:
    """Write a snapshot folder per teacher, named as it."""
    for teacher in TEACHERS:
        _export(teacher, folder / teacher.snapshot_id)


def _export(teacher: Teacher, path: Path) -> None:
    signature = Signature.model_validate(
        {
            "fm": FM,
            "snapshot_id": teacher.snapshot_id,
            "dataset": DatasetSpec.model_validate(DATASET_SPEC),
            "inputs": [
                {"tensor": "dense", "features": ["price", "coin"], "encode": {"kind": "float", "null": 0.0}},
                {"tensor": "cat", "features": ["user_id", "item"], "encode": {"kind": "hash", "buckets": BUCKETS}},
            ],
            "outputs": {"logits": {"click": "click", "buy": "buy"}},
        }
    )
    export_snapshot(TeacherModule(teacher), signature, path, trained_through=teacher.trained_through)


def wait_until(condition: Callable[[], bool], what: str, *, pause: float = 0.1) -> None:
    """Wait until it is true, looking every `pause` seconds.

    Raises:
        TimeoutError: It did not come true in time.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {WAIT_SECONDS:.0f} s")
        time.sleep(pause)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One process ended: in which step, at which moment of it, how."""

    step: int
    moment: Moment
    role: str
    how: signal.Signals = signal.SIGKILL


def build_kills(roles: Sequence[str], *, seed: int) -> list[Kill]:
    """Give a kill for each moment, of these roles in turn, each at another step; some are polite."""
    chance = random.Random(seed)
    steps = sorted(chance.sample(range(NUM_STEPS + 1), len(MOMENTS)))
    moments = chance.sample(MOMENTS, len(MOMENTS))
    return [
        Kill(
            step=step,
            moment=moment,
            role=roles[place % len(roles)],
            how=chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]),
        )
        for place, (step, moment) in enumerate(zip(steps, moments, strict=True))
    ]


@dataclass
class Replay:
    """One dataset of a service that the steps are posted to. `read` is what a trainer that reads along has got."""

    service: RunningService
    client: Client
    dataset: str
    kills: Sequence[Kill] = ()
    read: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, bytes] = field(default_factory=dict)
    killed: list[Kill] = field(default_factory=list)
    _cursor: str | None = None
    _active: str = ""

    @property
    def tables(self) -> Path:
        return self.service.folder.tables / self.dataset

    # ---- before the first step

    def declare(self, exported: Path) -> None:
        """Declare the dataset and register all snapshots, which a worker validates meanwhile."""
        self._declare_empty()
        snapshots = Folder(str(self.service.folder.snapshots))
        for teacher in TEACHERS:
            folder = exported / teacher.snapshot_id
            uri = copy_snapshot(self.dataset, folder, read_manifest(folder), snapshots)
            self.client.register_snapshot(
                self.dataset, FM, snapshot_id=teacher.snapshot_id, uri=uri, sha256=manifest_sha256(folder)
            )

    def declare_like(self, other: str) -> None:
        """Declare the dataset with the snapshots of another one, as validated there: that takes its time."""
        self._declare_empty()
        with self._server() as server:
            registry, catalog = Registry(server, Folder(str(self.service.folder.tables))), read_catalog(server)
            theirs = catalog.fm(other, FM)
            for snapshot_id in theirs.snapshots:
                record = catalog.snapshot(other, FM, snapshot_id).model_copy(update={"state": "validated"})
                field_name = snapshot_field(self.dataset, FM, snapshot_id)
                registry.change(field_name, SnapshotRecord, lambda _: record)  # noqa: B023
            known = {"snapshots": theirs.snapshots, "outputs": theirs.outputs}
            mine = catalog.fm(self.dataset, FM).model_copy(update=known)
            registry.change(fm_field(self.dataset, FM), FmRecord, lambda _: mine)

    def _declare_empty(self) -> None:
        self.client.put_dataset(self.dataset, DATASET_SPEC)
        self.client.put_fm(self.dataset, FM, required=True)

    def _server(self) -> redis.Redis:
        return redis.Redis.from_url(self.service.redis_url, protocol=2)

    # ---- a step

    def take(self, number: int, step: Step, *, num_closed: int) -> None:
        """Post a step and wait until everything is scored and committed, and so many rows are closed in all."""
        self._activate(step.teacher.snapshot_id)
        pending = [kill for kill in self.kills if kill.step == number]
        before = {table: self._version(table) for table in ("examples", "closed")}
        self._kill(pending, "labels")
        for labels in step.labels:
            if labels:
                self.client.labels(self.dataset, _table(labels, _LABEL))
        self._kill(pending, "examples")
        for place, examples in enumerate(step.examples):
            with ThreadPoolExecutor(1) as pool:
                posted = pool.submit(self.client.ingest, self.dataset, _table(examples, _EXAMPLE))
                if place:
                    self._kill(pending, "posting")
                assert posted.result().rejected == 0
        self._kill(pending, "posted")
        self._settle(pending, before, num_closed)

    def _settle(self, pending: Sequence[Kill], before: Mapping[str, int], num_closed: int) -> None:
        moves: list[tuple[Moment, str]] = [("committed", "examples")]
        moves += [("closing", "closed")] if num_closed > len(self.read) else []
        for moment, table in moves:
            if any(kill.moment == moment for kill in pending):
                wait_until(lambda: self._version(table) != before[table], f"a commit of {table}", pause=0.002)  # noqa: B023
                self._kill(pending, moment)

        def is_settled() -> bool:
            if not self.is_worked_off():
                return False
            self._read_along()
            return len(self.read) >= num_closed

        wait_until(is_settled, f"{num_closed} rows closed")
        for moment in MOMENTS:  # of a step that closes nothing
            self._kill(pending, moment)

    def is_worked_off(self) -> bool:
        """Give whether nothing is unscored or uncommitted."""
        state = self.client.status()["datasets"][self.dataset]
        return bool(state["in_log"] == 0 and state["fms"][FM]["pending"] == 0)

    def _version(self, table: str) -> int:
        return len(list((self.tables / table / "_delta_log").glob("*.json")))

    def _activate(self, snapshot_id: str) -> None:
        """Let a snapshot take over, and wait until the worker that lives now scores with it."""
        if snapshot_id == self._active:
            return
        self.client.wait_for_snapshot(self.dataset, FM, snapshot_id)
        self.client.activate_snapshot(self.dataset, FM, snapshot_id)
        wait_until(lambda: self._at_work() == snapshot_id, f"snapshot {snapshot_id} at work")
        self._active = snapshot_id

    def _at_work(self) -> str | None:
        with self._server() as server:
            beats = [json.loads(beat) for beat in server.hgetall("das:beats").values()]
        pid = self.service.pid_of("worker")
        lanes = [beat["lanes"].get(f"{self.dataset}/{FM}") for beat in beats if beat["pid"] == pid]
        return next((lane["snapshot"] for lane in lanes if lane), None)

    # ---- kills

    def _kill(self, pending: Sequence[Kill], moment: Moment) -> None:
        for kill in pending:
            if kill.moment == moment and kill not in self.killed:
                self.killed.append(kill)
                wait_until(lambda: _is_alive(self.service.pid_of(kill.role)), f"a {kill.role} to kill")  # noqa: B023
                os.kill(self.service.pid_of(kill.role) or 0, kill.how)

    # ---- what is delivered

    def _read_along(self) -> None:
        """Read on, as a trainer that goes on behind its last cursor."""
        options: dict[str, Any] = {"fms": FM, "columns": COLUMNS, "batch_rows": 100}
        reader = (
            self.client.batches(self.dataset, **options)
            if self._cursor is None
            else self.client.batches(self.dataset, cursor=self._cursor, extend=True)
        )
        for batch in reader:
            self.read += batch.rows.to_pylist()
        self._cursor = reader.cursor

    def read_whole(self) -> list[dict[str, Any]]:
        """Give what a trainer that starts now reads."""
        reader = self.client.batches(self.dataset, fms=FM, columns=COLUMNS, batch_rows=64)
        return [row for batch in reader for row in batch.rows.to_pylist()]

    def keep_answer(self) -> None:
        """Note a cursor and the bytes that it gives now."""
        reader = self.client.batches(self.dataset, fms=FM, batch_rows=50)
        cursors = [reader.start(), *(batch.cursor for batch in reader)]
        for cursor in (cursors[0], cursors[len(cursors) // 2]):
            self.answers[cursor] = self.answer_to(cursor)

    def answer_to(self, cursor: str) -> bytes:
        """Give the bytes that a cursor gives."""
        url = f"{self.service.url}/v1/datasets/{self.dataset}/batches"
        found: list[bytes] = []

        def is_answered() -> bool:
            try:
                answer = httpx.get(url, params={"cursor": cursor}, timeout=30)
            except httpx.TransportError:
                return False  # the API is about to come back
            found.extend([answer.content] if answer.is_success else [])
            return answer.is_success

        wait_until(is_answered, "an answer to a cursor")
        return found[0]

    def rows_of(self, table: str) -> list[dict[str, Any]]:
        """Give a table as it lies on disk."""
        place = self.tables / table
        return DeltaTable(str(place)).to_pyarrow_table().to_pylist() if place.exists() else []


def iter_taken(replay: Replay, steps: Sequence[Step], closed: Sequence[Sequence[object]]) -> Iterator[int]:
    """Take the steps; give each one's number once it is settled."""
    num_closed = 0
    for number, step in enumerate(steps):
        num_closed += len(closed[number])
        replay.take(number, step, num_closed=num_closed)
        yield number


def _table(rows: Sequence[Any], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)


def _is_alive(pid: int | None) -> bool:
    """Give whether there is a process of this id; the supervisor has not heard yet of one that has just ended."""
    try:
        return pid is not None and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
