"""Laws of the whole path, for any rows: twice is once, and how rows are cut into chunks changes no score."""

import contextlib
import itertools
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest
import redis
from deltalake import DeltaTable
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from das_service.metrics import Metrics
from das_service.role import RoleContext
from das_service.settings import Settings
from das_service.sink.sink import Sink
from fm_inference.engine import TorchEngine
from schemas import keys
from tests import declared
from tests.fakes import expected_supervision
from tests.lanes import at_work, closed_form_engine, declare_scored
from tests.served import NOON, Api, serve

few_examples = hypothesis_settings(
    max_examples=10,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example takes a second: no time to look for smaller ones
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
TIMES = st.sampled_from([NOON, NOON + timedelta(microseconds=1), NOON - timedelta(days=1)])
PRICES = st.floats(-1000, 1000, width=32)


# ---- ingesting twice equals once


ROW = st.fixed_dictionaries(
    {
        "example_id": st.text(st.characters(codec="utf-8"), min_size=1, max_size=4),
        "event_time": TIMES,
        "price": PRICES,
        "user_id": st.sampled_from(["", "u", "é"]),
        "item": st.none() | st.integers(-(2**63), 2**63 - 1),
        "tags": st.none() | st.lists(st.sampled_from(["a", "b"]), max_size=3),
        "image": st.none() | st.lists(PRICES, min_size=4, max_size=4),
    }
)
ROWS = st.lists(ROW, min_size=1, max_size=12, unique_by=lambda row: row["example_id"])
SCHEMA = pa.schema(
    {
        "example_id": pa.string(), "event_time": pa.timestamp("us", "UTC"), "price": pa.float64(),
        "user_id": pa.string(), "item": pa.int64(), "tags": pa.list_(pa.string()), "image": pa.list_(pa.float32(), 4),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """Some rows, sent in one of the two forms; the sink may commit what there is before the next."""

    rows: list[dict[str, Any]]
    as_arrow: bool
    then_commit: bool


@st.composite
def ingests(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[Request]]:
    """Rows, and requests that hold each of them at least once and none of them twice in one request."""
    rows = draw(ROWS)
    some = st.lists(st.integers(0, len(rows) - 1), min_size=1, unique=True)
    parts = draw(st.lists(some, max_size=5))
    order = draw(st.permutations(range(len(rows))))
    cut = draw(st.integers(0, len(rows)))
    parts += [part for part in (order[:cut], order[cut:]) if part]
    requests = [
        Request([rows[place] for place in part], draw(st.booleans()), draw(st.booleans()))
        for part in draw(st.permutations(parts))
    ]
    return rows, requests


@dataclass
class Way:
    """The API and the sink, on a dataset of its own for each ingest."""

    api: Api
    sink: Sink
    now: float = 1000.0
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def ingest(self, requests: Sequence[Request]) -> str:
        """Send the requests one after the other, let the sink commit all; give the dataset."""
        dataset = f"ads{next(self.numbers)}"
        self.api.declare(dataset)
        for request in requests:
            answer = self.api.post(spelled(request), dataset=dataset)
            assert (answer.status_code, answer.json()["accepted"]) == (202, len(request.rows)), answer.text
            if request.then_commit:
                self.commit()
        self.commit()
        return dataset

    def commit(self) -> None:
        for _ in range(4):
            self.now += 1.0
            self.sink.step(now=self.now)

    def counts(self, dataset: str) -> dict[str, int]:
        status = self.api.http.get(f"/v1/datasets/{dataset}/status").json()
        return {name: status[name] for name in ("accepted", "distinct", "duplicates", "conflicting", "in_log")}

    def rows(self, dataset: str) -> list[dict[str, Any]]:
        """Give the table, without what tells when and where a row came in."""
        table = pa.table(DeltaTable(f"{self.api.settings.tables_uri}/{dataset}/examples").to_pyarrow_table())
        of_the_way = ["received_at", "log_position", "is_late"]  # when it came, and after what: not of the example
        return table.drop_columns(of_the_way).sort_by("example_id").to_pylist()


def spelled(request: Request) -> pa.Table | list[dict[str, Any]]:
    if request.as_arrow:
        return pa.Table.from_pylist(request.rows, schema=SCHEMA)
    return [{**row, "event_time": row["event_time"].isoformat()} for row in request.rows]


@pytest.fixture
def whole_path(settings: Settings, store: redis.Redis) -> Iterator[Way]:
    with serve(settings) as api:
        sink = Sink(RoleContext(settings, role="sink", instance="s", client=store, metrics=Metrics("sink")))
        with contextlib.closing(sink):
            yield Way(api, sink)


@few_examples
@given(ingests())
def test_ingesting_twice_equals_once(whole_path: Way, ingest: tuple[list[dict[str, Any]], list[Request]]) -> None:
    rows, requests = ingest
    once = whole_path.ingest([Request(rows, as_arrow=True, then_commit=False)])
    more = whole_path.ingest(requests)

    assert whole_path.rows(more) == whole_path.rows(once)
    distinct, sent = len(rows), sum(len(request.rows) for request in requests)
    settled = {"distinct": distinct, "conflicting": 0, "in_log": 0}
    assert whole_path.counts(once) == {"accepted": distinct, "duplicates": 0, **settled}
    assert whole_path.counts(more) == {"accepted": sent, "duplicates": sent - distinct, **settled}


# ---- any chunking gives the same supervision


EXAMPLE = st.fixed_dictionaries(
    {
        "event_time": TIMES,
        "price": PRICES,
        "user_id": st.sampled_from(["u", "v", "é"]),
        "item": st.none() | st.integers(-(2**63), 2**63 - 1),
    }
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    """The closed form, which takes at most five rows at a time."""
    return closed_form_engine(tmp_path_factory.mktemp("snapshots"), max_batch=5)


def partition_of(example_id: str) -> int:
    return int(keys.partitions_of(keys.digest_array(pa.array([example_id])), declared.SPEC.partitions)[0])


@few_examples
@given(
    st.lists(EXAMPLE, min_size=1, max_size=30),
    st.randoms(use_true_random=False),
    st.lists(st.integers(1, 29), max_size=6),
    st.sampled_from([1, 7, 20_000]),
)
def test_any_chunking_gives_the_same_supervision(
    settings: Settings,
    store: redis.Redis,
    engine: TorchEngine,
    values: list[Mapping[str, Any]],
    random: Any,
    cuts: list[int],
    batch_rows: int,
) -> None:
    rows = [{"example_id": f"e{number}", **value} for number, value in enumerate(values)]
    shuffled = random.sample(rows, len(rows))
    bounds = sorted({0, *[cut for cut in cuts if cut < len(rows)], len(rows)})
    dataset = f"ads{uuid.uuid4().hex}"
    made = declare_scored(settings.model_copy(update={"batch_rows": batch_rows}), store, dataset, engine)

    with at_work(made, engine):
        for first, last in itertools.pairwise(bounds):
            for partition in range(declared.SPEC.partitions):
                part = [row for row in shuffled[first:last] if partition_of(row["example_id"]) == partition]
                if part:
                    made.append(partition, part)

    logits, embeddings = expected_supervision(rows, declared.SPEC)
    expected = {
        row["example_id"]: (row["event_time"], logits["click"][place], bytes(embeddings["hidden"][place]))
        for place, row in enumerate(rows)
    }
    scored = made.scored("f")
    assert len(scored) == len(rows)
    assert {row["example_id"]: (row["event_time"], row["click__logit"], row["hidden"]) for row in scored} == expected
    for example_id, (_, logit, hidden) in expected.items():
        online = made.online(partition_of(example_id), "f", example_id)
        assert online is not None
        assert (online["click__logit"], bytes(online["hidden"])) == (logit, hidden)
