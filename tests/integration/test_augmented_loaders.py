"""Loaders around the dataset: torch's DataLoader and torchdata's StatefulDataLoader, with and without workers."""

import multiprocessing
from itertools import islice
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.loading import ids_of, latest, loading, ranks_of, read_as_rank, read_some, served
from tests.training import Trained, expected_order
from vm_training import AugmentedDataset, Batch

pytestmark = [
    pytest.mark.parametrize("shared_server", ["valkey"], indirect=True),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 under newer torch
]


def context(workers: int) -> BaseContext | None:
    """Workers that get the dataset as a pickle, from a process that has imported torch already."""
    if not workers:
        return None
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["vm_training"])
    return found


def plain(dataset: AugmentedDataset, workers: int) -> DataLoader[Batch]:
    return DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context(workers))


def stateful(dataset: AugmentedDataset, workers: int) -> StatefulDataLoader:
    return StatefulDataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context(workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_data_loader_gets_every_row_once(trained: Trained, workers: int) -> None:
    trained.close(0, 300)
    with served(trained) as url:
        dataset = loading(url)
        loader = plain(dataset, workers)
        epochs = [ids_of(loader) for _ in range(2)]
        through = dataset.trained_through
    assert [sorted(ids) for ids in epochs] == [sorted(expected_order(trained))] * 2
    assert through == latest(expected_order(trained))


def test_loader_workers_go_on_from_states_of_another_number_once(trained: Trained) -> None:
    trained.close(0, 300)
    with served(trained) as url:
        first = loading(url)
        readers = ranks_of(url, first.start, 3)
        parts, states = read_some(readers, [1, 4, 2])
        first.load_state_dict(states)
        loader = plain(first, 2)
        rest = ids_of(loader)
        whole = ids_of(loader)
    assert sorted([name for part in parts for name in part] + rest) == sorted(expected_order(trained))
    assert sorted(whole) == sorted(expected_order(trained))


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_goes_on_exactly(trained: Trained, workers: int) -> None:
    trained.close(0, 300)
    with served(trained) as url:
        start = loading(url).start
        whole = ids_of(stateful(loading(url, cursor=start), workers))
        loader = stateful(loading(url, cursor=start), workers)
        batches = iter(loader)
        first = ids_of(islice(batches, 5))
        state = loader.state_dict()
        del batches
        loader = stateful(loading(url, cursor=start), workers)
        loader.load_state_dict(state)
        assert first + ids_of(loader) == whole
        assert sorted(ids_of(loader)) == sorted(whole)
        ended = loader.state_dict()
        loader = stateful(loading(url, cursor=start), workers)
        loader.load_state_dict(ended)
        assert sorted(ids_of(loader)) == sorted(whole)
    assert sorted(whole) == sorted(expected_order(trained))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_torchdatas_loader_was_trained_on_before_it_went_on_counts(trained: Trained, workers: int) -> None:
    trained.close(0, 300)
    with served(trained) as url:
        start = loading(url).start
        loader = stateful(loading(url, cursor=start), workers)
        whole = [batch.example_ids.to_pylist() for batch in loader]
        batches = iter(loader)
        assert len(list(islice(batches, len(whole)))) == len(whole)  # and does not know yet that it was the last
        state = loader.state_dict()
        del batches
        dataset = loading(url, cursor=start)
        loader = stateful(dataset, workers)
        loader.load_state_dict(state)
        assert ids_of(loader) == []
    assert dataset.trained_through == latest(name for ids in whole for name in ids)


def test_states_of_torchdatas_loader_are_dealt_out_among_other_readers(trained: Trained) -> None:
    trained.close(0, 300)
    with served(trained) as url:
        loader = stateful(loading(url), 2)
        batches = iter(loader)
        ids = ids_of(islice(batches, 5))
        state = loader.state_dict()
        del batches
        for rank, reader in enumerate(ranks_of(url, loader.dataset.start, 3)):
            reader.load_state_dict([state])
            assert reader.state_dict()["reader"] == rank
            ids += ids_of(reader)
    assert sorted(ids) == sorted(expected_order(trained))


def test_state_is_not_asked_of_a_dataset_whose_workers_have_it(trained: Trained) -> None:
    trained.close(0, 100)
    with served(trained) as url:
        dataset = loading(url)
        ids_of(plain(dataset, 1))
        with pytest.raises(RuntimeError, match="StatefulDataLoader"):
            dataset.state_dict()


def test_ranks_of_torch_distributed_share_the_start_of_the_first(trained: Trained, tmp_path: Path) -> None:
    trained.close(0, 300)
    workers = context(2)
    assert workers is not None
    with served(trained) as url:
        pipes = [workers.Pipe(duplex=False) for _ in range(2)]
        ranks = [
            workers.Process(target=read_as_rank, args=(url, rank, str(tmp_path / "meet"), theirs))
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        assert all(ours.poll(60) for ours, _ in pipes)
        (start, some), (other_start, others) = (ours.recv() for ours, _ in pipes)
        for rank in ranks:
            rank.join(30)
    assert start == other_start
    assert some
    assert sorted(some + others) == sorted(expected_order(trained))
