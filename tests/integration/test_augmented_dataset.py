"""The loader over a real service: every row once, in every way of going on, as the tensors of the rows themselves."""

import json
import pickle
import threading
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from das_service.client import Client, DasClientError, TableSource
from das_service.up.embedded import free_port
from tests.loading import ids_of, latest, loading, ranks_of, read_some, served
from tests.served import serve_over_tcp
from tests.training import Trained, at, click_of, example, expected_order
from vm_training import AugmentedDataset

# One kind of server is enough: the rows come from tables.
pytestmark = pytest.mark.parametrize("shared_server", ["valkey"], indirect=True)

ROWS = 600


# ---- what a batch holds


def test_batches_are_the_rows_as_tensors_in_ready_order(trained: Trained) -> None:
    trained.close(0, 200)
    with served(trained) as url:
        dataset = loading(url, buckets=50)
        batches = list(dataset)
    assert ids_of(batches) == expected_order(trained)
    for batch in batches:
        numbers = [int(name[1:]) for name in batch.example_ids.to_pylist()]
        wanted = [example(number) for number in numbers]
        assert batch.event_time_B.tolist() == [int(row["event_time"].timestamp() * 1e6) for row in wanted]
        assert batch.dense_BF.tolist() == [[row["price"]] for row in wanted]
        assert batch.categories_present_BC.tolist() == [[True, row["item"] is not None] for row in wanted]
        assert batch.lists["tags"].present_B.tolist() == [row["tags"] is not None for row in wanted]
        assert batch.lists["tags"].offsets.diff().tolist() == [len(row["tags"] or []) for row in wanted]
        assert batch.vectors["image"].values_BD.tolist() == [row["image"] or [0.0] * 4 for row in wanted]
        assert batch.labels["click"].tolist() == [click_of(number) for number in numbers]
        assert batch.labeled["click"].all()
        assert not batch.labeled["buy"].any()
        said = batch.fms["f"]
        assert said.present_B.all()
        assert said.logits["click"].tolist() == [float(number) for number in numbers]
        assert said.embedding("hidden").tolist() == [[float(number), -float(number)] for number in numbers]
    assert dataset.layout.dense == ("price",)
    assert dataset.layout.categories == ("user_id", "item")


def test_a_trainer_asks_for_what_it_needs(trained: Trained) -> None:
    trained.close(0, 100)
    with served(trained) as url:
        dataset = loading(url, fms=[], columns=["price", "click", "ready_seq"], filter=[["price", "<", 40]])
        batches = list(dataset)
    assert ids_of(batches) == [name for name in expected_order(trained) if int(name[1:]) < 40]
    assert (dataset.layout.dense, dataset.layout.categories, dict(dataset.layout.fms)) == (("price",), (), {})
    assert batches[0].of_service["ready_seq"].dtype == torch.int64


def test_an_epoch_ends_where_it_was_bounded_and_the_next_is_the_same(trained: Trained) -> None:
    trained.close(0, 100)
    with served(trained) as url:
        dataset = loading(url)
        first = ids_of(dataset)
        trained.close(100, 100)
        assert ids_of(dataset) == first
        assert sorted(ids_of(loading(url))) == sorted(expected_order(trained))


def test_extend_goes_on_with_what_has_closed_since(trained: Trained) -> None:
    trained.close(0, 100)
    with served(trained) as url:
        dataset = loading(url, extend=True)
        first = ids_of(dataset)
        assert ids_of(dataset) == []
        state = dataset.state_dict()
        trained.close(100, 100)
        tomorrow = loading(url, extend=True)
        tomorrow.load_state_dict(state)
        assert sorted(first + ids_of(tomorrow)) == sorted(expected_order(trained))
        again = ids_of(dataset)
    assert sorted(first + again) == sorted(expected_order(trained))


def test_a_follower_gets_what_closes_later_and_can_be_left(trained: Trained) -> None:
    trained.close(0, 100)
    with served(trained) as url:
        batches = iter(loading(url, follow=True))
        ids = ids_of([next(batches)])
        trained.close(100, 100)
        wanted = expected_order(trained)
        while len(ids) < len(wanted):
            ids += ids_of([next(batches)])
        batches.close()
    assert sorted(ids) == sorted(wanted)
    assert not [thread for thread in threading.enumerate() if thread.name == "das loader"]


# ---- going on


def test_state_is_json_behind_the_last_batch_that_was_handed_out(trained: Trained) -> None:
    trained.close(0, 200)
    with served(trained) as url:
        dataset = loading(url, prefetch=4)
        batches = iter(dataset)
        first = ids_of(islice(batches, 3))
        state = json.loads(json.dumps(dataset.state_dict()))
        batches.close()
        other = loading(url)
        other.load_state_dict(state)
        assert first + ids_of(other) == expected_order(trained)
        assert ids_of(other) == expected_order(trained)  # and then the next epoch


@given(
    runs=st.lists(
        st.integers(1, 4).flatmap(lambda size: st.lists(st.integers(0, 12), min_size=size, max_size=size)),
        min_size=1,
        max_size=3,
    ),
    last=st.integers(1, 4),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def check_resume(url: str, start: str, expected: list[str], runs: list[list[int]], last: int) -> None:
    ids: list[str] = []
    states: list[dict[str, Any]] = []
    for cuts in [*runs, [1000] * last]:
        readers = ranks_of(url, start, len(cuts))
        for reader in readers:
            if states:
                reader.load_state_dict(states)
        parts, states = read_some(readers, cuts)
        ids += [name for part in parts for name in part]
    assert sorted(ids) == sorted(expected)
    assert len(set(ids)) == len(ids)


def test_interrupted_runs_of_any_sizes_read_each_row_once(trained: Trained) -> None:
    trained.close(0, ROWS)
    with served(trained) as url:
        start = loading(url).start
        trained.close(ROWS, 50)
        check_resume(url, start, ids_of(loading(url, cursor=start)))


@given(cuts=st.lists(st.integers(0, 15), min_size=3, max_size=3), times=st.integers(1, 3))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def check_same_size(url: str, start: str, whole: list[list[list[str]]], cuts: list[int], times: int) -> None:
    states: list[dict[str, Any]] = []
    found: list[list[list[str]]] = [[], [], []]
    for run in range(times + 1):
        readers = ranks_of(url, start, 3)
        for rank, reader in enumerate(readers):
            if states:
                reader.load_state_dict(states if run % 2 else states[rank])
            batches = iter(reader)
            found[rank] += [ids_of([batch]) for batch in (islice(batches, cuts[rank]) if run < times else batches)]
            batches.close()
        states = [reader.state_dict() for reader in readers]
    assert found == whole


def test_a_run_of_the_same_size_goes_on_with_the_same_batches(trained: Trained) -> None:
    trained.close(0, ROWS)
    with served(trained) as url:
        start = loading(url).start
        whole = [[ids_of([batch]) for batch in reader] for reader in ranks_of(url, start, 3)]
        check_same_size(url, start, whole)


def test_a_restart_of_the_service_costs_no_row_and_repeats_none(trained: Trained) -> None:
    trained.close(0, 300)
    with serve_over_tcp(trained.api.settings) as port:
        batches = iter(loading(f"http://127.0.0.1:{port}", batch_rows=8))
        ids = ids_of(islice(batches, 4))
    with serve_over_tcp(trained.api.settings, port=port):
        ids += ids_of(batches)
    assert ids == expected_order(trained)


def test_a_state_of_other_rows_is_refused(trained: Trained) -> None:
    trained.close(0, 100)
    with served(trained) as url:
        state = loading(url, columns=["price"]).state_dict()
        dataset = loading(url)
        dataset.load_state_dict(state)
        with pytest.raises(ValueError, match="other columns, FMs or outputs"):
            next(iter(dataset))


def test_a_dataset_pickles_with_its_state(trained: Trained) -> None:
    trained.close(0, 100)
    with served(trained) as url:
        dataset = loading(url)
        _, (state,) = read_some([dataset], [2])
        dataset.load_state_dict(state)
        copy = pickle.loads(pickle.dumps(dataset))
        assert ids_of(copy) == expected_order(trained)[32:]


# ---- beside the tables


def test_the_tables_give_the_same_batches_and_cursors_as_the_service(trained: Trained) -> None:
    trained.close(0, 300)
    folder = Path(trained.api.settings.tables_uri).parent
    with served(trained) as url, Client(url) as client:
        tables = TableSource(folder)
        asked: dict[str, Any] = {
            "fms": "f",
            "filter": [["price", "<", 250]],
            "batch_rows": 32,
            "since": at(90),
            "embedding_format": "encoded",
        }
        start = client.batches("stream", **asked).start()
        assert tables.batches("stream", **asked).start() == start
        for part in ({}, {"split": "1/2"}, {"max_rows": 40}):
            over_http = [(b.cursor, b.rows) for b in client.batches("stream", cursor=start, **part)]
            assert [(b.cursor, b.rows) for b in tables.batches("stream", cursor=start, **part)] == over_http
        sources = (url, tables)
        readers = [
            AugmentedDataset(source, "stream", cursor=start, rank=rank, world_size=2, with_ids=True)
            for rank, source in enumerate(sources)
        ]
        parts, states = read_some(readers, [3, 2])
        rest = loading_tables(tables, start)
        rest.load_state_dict(states)
        ids = [name for part in parts for name in part] + ids_of(rest)
    assert sorted(ids) == sorted(ids_of(loading_tables(tables, start)))


def loading_tables(tables: TableSource, cursor: str) -> AugmentedDataset:
    return AugmentedDataset(tables, "stream", cursor=cursor, with_ids=True)


def test_the_tables_are_read_while_no_service_and_no_server_runs(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.close(0, 100)
    folder = Path(trained.api.settings.tables_uri).parent
    monkeypatch.setenv("DAS_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    assert ids_of(loading(TableSource(folder))) == expected_order(trained)
    with pytest.raises(DasClientError, match="as_of can't be settled: the server of the logs can't be reached"):
        loading(TableSource(folder), as_of=at(0))
    with pytest.raises(DasClientError, match="has no column price2"):
        loading(TableSource(folder), columns=["price2"])


# ---- how far it has seen


def test_trained_through_is_just_behind_the_latest_row_delivered(trained: Trained) -> None:
    trained.close(0, 200)
    with served(trained) as url:
        dataset = loading(url, prefetch=4)
        assert dataset.trained_through is None
        batches, ids = iter(dataset), []
        for _ in range(3):
            ids += ids_of([next(batches)])
            assert dataset.trained_through == latest(ids)
        state = dataset.state_dict()
        batches.close()
        other = loading(url)
        other.load_state_dict(state)
        assert other.trained_through == latest(ids)
    assert dataset.trained_through > at(0) > datetime(2000, 1, 1, tzinfo=UTC)


# ---- refusals


def test_what_the_service_refuses_reaches_the_trainer(trained: Trained) -> None:
    trained.close(0, 100)
    with served(trained) as url:
        with pytest.raises(DasClientError, match="has no column price2"):
            loading(url, columns=["price2"])
        dataset = loading(url)
        state = {**dataset.state_dict(), "streams": [{"cursor": "AQAA", "splits": []}]}
        dataset.load_state_dict(state)
        with pytest.raises(DasClientError, match="cursor can't be read"):
            list(dataset)
    assert not [thread for thread in threading.enumerate() if thread.name == "das loader"]
