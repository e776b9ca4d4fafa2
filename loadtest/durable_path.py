"""Measures the durable path on one machine: `python -m loadtest.durable_path` prints one JSON record.

    ingest      POSTs of 5,000-row Arrow chunks before any FM is declared, against XADD of the same entries
    end_to_end  first POST to the last row both in lookup and committed, all roles running, a nearly free FM
    lookup      4,096 random ids (5 % unknown) over HTTP against MGET of the same keys, interleaved

Server with `appendfsync always`. Bodies and keys are made before the clock starts; generator, roles and server share
the machine. Everything is measured in one run; rates are of rows, ratios are to the floor of the same run.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import redis
import torch
from torch import nn

from das_service.client import Client
from das_service.settings import load_settings
from das_service.snapshot_publish import publish_snapshot
from das_service.up.supervisor import running_service
from fm_inference import Signature, export_snapshot
from loadtest.workload import CHUNK_ROWS, SPEC, chunk, example_ids
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.wire import ARROW_STREAM, write_table

DATASET, FM = "load", "free"
LOOKUP_IDS = 4096


class NearlyFreeFM(nn.Module):
    """Two logits and a 64-d embedding from sums: next to no work, so that the path around the model is measured."""

    def forward(self, *, cat: torch.Tensor, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take cat (B, 26) int64 and dense (B, 13) float32."""
        signal_B = dense.sum(1) + (cat % 97).sum(1) / 1024
        z_BD = torch.tanh(signal_B[:, None] * torch.arange(1, 65, device=signal_B.device) / 64)
        return {"click": signal_B / 8, "buy": signal_B / 16, "z": z_BD}


def signature() -> Signature:
    """Give what the nearly free FM takes and gives."""
    categories = [f["name"] for f in SPEC["features"] if f["type"] == "category"]
    floats = [f["name"] for f in SPEC["features"] if f["type"] == "float"]
    return Signature.model_validate(
        {
            "fm": FM, "snapshot_id": "s1", "max_batch": 32_768, "dataset": DatasetSpec.model_validate(SPEC),
            "inputs": [
                {"tensor": "cat", "features": categories, "encode": {"kind": "hash", "buckets": 100_000}},
                {"tensor": "dense", "features": floats, "encode": {"kind": "float"}},
            ],
            "outputs": {
                "logits": {"click": "click", "buy": "buy"},
                "embeddings": {"hidden": {"tensor": "z", "size": 64, "codec": "float16"}},
            },
        }
    )  # fmt: skip


def post_all(url: str, bodies: Sequence[bytes], *, clients: int) -> float:
    """Post the bodies from a few threads; give the seconds it took."""
    waiting, lock = iter(bodies), threading.Lock()

    def post() -> None:
        with httpx.Client(base_url=url, timeout=60, headers={"Content-Type": ARROW_STREAM}) as client:
            while True:
                with lock:
                    body = next(waiting, None)
                if body is None:
                    return
                post_one(client, body)

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        for posted in [pool.submit(post) for _ in range(clients)]:
            posted.result()
    return time.perf_counter() - start


def post_one(client: httpx.Client, body: bytes) -> None:
    """Post a body, again while the service asks to wait."""
    while True:
        answer = client.post(f"/v1/datasets/{DATASET}/examples", content=body)
        if answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
            answer.raise_for_status()
            return
        time.sleep(float(answer.headers.get("Retry-After", "1")))


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    """Wait for the condition.

    Raises:
        TimeoutError: It did not come true.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def measure_ingest(url: str, server: redis.Redis, bodies: Sequence[bytes], clients: int) -> dict[str, float]:
    """Ingest over HTTP, then XADD of as many entries of the same bytes."""
    seconds = post_all(url, bodies, clients=clients)
    entries = [fields[b"d"] for _, fields in server.xrange(keys.log(DATASET, 0, "examples"), count=16)]
    start, rows = time.perf_counter(), 0
    for i in range(len(bodies)):
        pipeline = server.pipeline(transaction=False)
        for p in range(SPEC["partitions"]):
            pipeline.xadd(f"floor:{p}", {"d": entries[(i + p) % len(entries)]})
        pipeline.execute()
        rows += CHUNK_ROWS
    floor = time.perf_counter() - start
    server.delete(*[f"floor:{p}" for p in range(SPEC["partitions"])])
    return compare(len(bodies) * CHUNK_ROWS / seconds, rows / floor)


def compare(rate: float, floor: float) -> dict[str, float]:
    """Give a line of the record."""
    return {"rows_per_s": round(rate), "floor_rows_per_s": round(floor), "ratio": round(rate / floor, 3)}


def measure_lookup(url: str, server: redis.Redis, num_rows: int, rounds: int) -> dict[str, float]:
    """Look up over HTTP and MGET the same keys, in turn; medians."""
    http_seconds, floor_seconds = [], []
    chance = random.Random(1)
    with httpx.Client(timeout=60) as client:
        for _ in range(rounds):
            numbers = [chance.randrange(int(num_rows * 1.05)) for _ in range(LOOKUP_IDS)]
            ids = pa.array([f"{n:032x}" for n in numbers])
            digest = keys.digest_array(ids)
            names = [
                keys.online_prefix(DATASET, int(p), FM) + d.as_py()
                for p, d in zip(keys.partitions_of(digest, SPEC["partitions"]), digest, strict=True)
            ]
            body = write_table(pa.table({"example_id": ids}))
            start = time.perf_counter()
            server.mget(names)
            floor_seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            answer = client.post(
                f"{url}/v1/datasets/{DATASET}/supervision/lookup",
                params={"fms": FM},
                content=body,
                headers={"Content-Type": ARROW_STREAM, "Accept": ARROW_STREAM},
            )
            http_seconds.append(time.perf_counter() - start)
            answer.raise_for_status()
    return compare(LOOKUP_IDS / statistics.median(http_seconds), LOOKUP_IDS / statistics.median(floor_seconds))


def cpu_seconds(roles: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Give the CPU seconds that each role has used (Linux)."""
    ticks = os.sysconf("SC_CLK_TCK")
    used = {}
    for role in roles:
        fields = Path(f"/proc/{role['pid']}/stat").read_text().rpartition(")")[2].split()
        used[role["role"]] = (int(fields[11]) + int(fields[12])) / ticks
    return used


def run(folder: Path, *, num_chunks: int, clients: int, rounds: int) -> dict[str, Any]:
    """Measure; give the record."""
    record: dict[str, Any] = {}
    bodies = [write_table(chunk(i * CHUNK_ROWS)) for i in range(num_chunks)]
    export_snapshot(NearlyFreeFM(), signature(), folder / "export", trained_through=datetime(2026, 1, 1, tzinfo=UTC))
    with running_service(folder=folder / "service") as service, Client(service.url) as client:
        client.put_dataset(DATASET, SPEC)
        server = redis.Redis.from_url(service.redis_url, protocol=2)
        warm = [write_table(chunk(10_000_000 + i * CHUNK_ROWS)) for i in range(num_chunks)]
        post_all(service.url, warm[:4], clients=clients)
        record["ingest"] = measure_ingest(service.url, server, warm[4:], clients)
        wait_until(lambda: client.status()["datasets"][DATASET]["in_log"] == 0, seconds=120)
        client.put_fm(DATASET, FM, required=True)
        settings = load_settings({}, snapshots_uri=str(folder / "service" / "snapshots"))
        publish_snapshot(client, settings, DATASET, folder / "export", activate=True)
        before = cpu_seconds(service.roles())
        start = time.perf_counter()
        post_all(service.url, bodies, clients=clients)
        posted = time.perf_counter() - start
        rows = num_chunks * CHUNK_ROWS

        def is_done() -> bool:
            status = client.status()["datasets"][DATASET]
            return bool(status["in_log"] == 0 and status["fms"][FM]["scored"] >= rows)

        wait_until(is_done, seconds=300)
        seconds = time.perf_counter() - start
        used = {role: used - before[role] for role, used in cpu_seconds(service.roles()).items()}
        last = client.lookup(DATASET, example_ids(rows - 1000, 1000), fms=[FM])
        if set(last[f"{FM}__status"].to_pylist()) != {"present"}:
            raise RuntimeError("the last rows are not in lookup")
        record["end_to_end"] = {
            "examples_per_s": round(rows / seconds),
            "posting_examples_per_s": round(rows / posted),
            "cpu_seconds_per_million": {role: round(s / rows * 1e6, 2) for role, s in used.items()},
        }
        record["lookup"] = measure_lookup(service.url, server, rows, rounds)
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if "model name" in line), "?")
    machine = {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}
    return {
        **record,
        "rows": rows,
        "clients": clients,
        "machine": machine,
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=200, help="5,000 rows each")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60, help="of the lookup")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="das-load-")))
        record = run(folder, num_chunks=options.chunks, clients=options.clients, rounds=options.rounds)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
