"""The loader on the dataset of tests/training.py: over HTTP or on the tables, and what its batches hold."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed

from das_service.client import Client, TableSource
from tests.served import serve_over_tcp
from tests.training import Trained, example
from vm_training import AugmentedDataset, Batch


@contextmanager
def served(trained: Trained) -> Iterator[str]:
    with serve_over_tcp(trained.api.settings) as port:
        yield f"http://127.0.0.1:{port}"


def loading(source: Client | TableSource | str, **options: Any) -> AugmentedDataset:
    return AugmentedDataset(source, "stream", **{"fms": ["f"], "batch_rows": 16, "with_ids": True, **options})


def ids_of(batches: Iterable[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.example_ids.to_pylist()]


def latest(ids: Iterable[str]) -> datetime:
    return max(example(int(name[1:]))["event_time"] for name in ids) + timedelta(microseconds=1)


def read_some(readers: list[AugmentedDataset], cuts: list[int]) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Let each reader hand out so many batches; give their ids and their states."""
    with ExitStack() as stack:
        ids = []
        for reader, cut in zip(readers, cuts, strict=True):
            batches = iter(reader)
            stack.callback(batches.close)
            ids.append(ids_of(islice(batches, cut)))
        return ids, [reader.state_dict() for reader in readers]


def ranks_of(source: Client | TableSource | str, start: str, world_size: int) -> list[AugmentedDataset]:
    return [loading(source, cursor=start, rank=rank, world_size=world_size) for rank in range(world_size)]


def read_as_rank(url: str, rank: int, meeting_place: str, pipe: Connection) -> None:
    """Read what one of two ranks of torch.distributed reads; send its start and its ids."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=2)
    dataset = loading(url)
    pipe.send((dataset.start, ids_of(dataset)))
    torch.distributed.destroy_process_group()
