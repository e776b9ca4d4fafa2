"""A shadow beside the active snapshot in a running worker: its share, and that nothing it does is in anybody's way."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from das_service.logs import records, streams
from das_service.metrics import Metrics
from das_service.registry import FmRecord, fm_field
from das_service.role import RoleContext
from fm_inference.publishing import Publisher
from fm_inference.shadow import WAITING_BYTES, Shadow, Shadower, in_share
from schemas import keys
from schemas.snapshot import OutputColumns, scored_schema
from tests.conftest import Server, make_settings
from tests.declared import Declared, examples
from tests.roles import Roles, beats, metric, publish, state, wait_for

ONE_SERVER = pytest.mark.parametrize("own_server", ["valkey"], indirect=True)
IDS = [f"e{i}" for i in range(2000)]


@pytest.fixture
def declared(own_server: Server, tmp_path: Path) -> Iterator[Declared]:
    """FM f, nothing published yet."""
    with contextlib.closing(own_server.client()) as client:
        declared = Declared(make_settings(own_server, tmp_path), client)
        declared.declare_fm("f")
        yield declared


@pytest.fixture
def workers(declared: Declared, tmp_path: Path) -> Iterator[Roles]:
    with contextlib.closing(Roles(declared.settings, tmp_path)) as roles:
        yield roles


def said(declared: Declared, *, is_shadow: bool) -> list[dict[str, Any]]:
    """Every row of the scored log that is a shadow's, or that is not."""
    schema = scored_schema(declared.catalog.fm("ads", "f").outputs)
    after = dict.fromkeys(range(declared.spec.partitions))
    entries = streams.read_after(declared.client, "ads", records.scored_log("f"), after, count=10_000)
    return [
        {**row, "snapshot_id": entry.meta["snapshot_id"]}
        for partition in sorted(entries)
        for entry in entries[partition]
        if entry.is_shadow == is_shadow
        for row in entry.batch(schema).to_pylist()
    ]


def stand_beside(declared: Declared, snapshot_id: str | None, *, share: float = 0.25, **options: object) -> None:
    """Let a closed-form snapshot be the shadow, and wait until the worker has it; None: let none be."""
    if snapshot_id is not None:
        declared.register("f", snapshot_id, **options)
        wait_for(lambda: state(declared, "f", snapshot_id).state == "validated")
    change = {"shadow": snapshot_id, "shadow_share": share if snapshot_id else 0.0}
    declared.registry.change(fm_field("ads", "f"), FmRecord, lambda old: old.model_copy(update=change))
    wait_for(lambda: [beat["lanes"]["ads/f"]["shadow"] for beat in beats(declared)] == [snapshot_id])


def in_quarter(example_id: str) -> bool:
    word = int.from_bytes(keys.digests([example_id.encode()])[:8], "little")
    return word / 2**64 < 0.25


def test_a_shadow_scores_its_share_by_id_and_the_active_one_everything(declared: Declared, workers: Roles) -> None:
    workers.start()
    publish(declared)
    stand_beside(declared, "s2", shift=8.0)
    for first in range(0, 2000, 200):
        declared.append(first // 200 % 2, examples(first, 200))
    expected = sorted(filter(in_quarter, IDS))
    wait_for(lambda: len(said(declared, is_shadow=True)) >= len(expected))

    shadows, outcomes = said(declared, is_shadow=True), said(declared, is_shadow=False)
    assert sorted(row["example_id"] for row in shadows) == expected
    assert {row["snapshot_id"] for row in shadows} == {"s2"}
    assert sorted(row["example_id"] for row in outcomes) == sorted(IDS)
    assert {row["snapshot_id"] for row in outcomes} == {"s1"}
    logit = {row["example_id"]: row["click__logit"] for row in outcomes}
    assert {row["click__logit"] - logit[row["example_id"]] for row in shadows} == {1.0}  # its shift / 8
    assert declared.online(0, "f", "e0")["_snapshot"] == 0
    assert metric(declared, "das_shadow_rows_total") == len(expected)

    stand_beside(declared, None)
    declared.append(0, examples(2000, 200))
    wait_for(lambda: declared.pending("f") == 0)
    assert len(said(declared, is_shadow=True)) == len(expected)


@ONE_SERVER
def test_a_shadow_that_fails_is_said_and_loses_dead_letters_and_delays_nothing(
    declared: Declared, workers: Roles
) -> None:
    workers.start()
    publish(declared)
    stand_beside(declared, "s2", share=1.0, poison="raise", poison_above=1e6)

    declared.append(0, examples(0, 100, price=2e6))
    wait_for(lambda: declared.pending("f") == 0)
    wait_for(lambda: bool(beats(declared)[0]["notices"]))

    (beat,) = beats(declared)
    assert (beat["problems"], len(beat["notices"])) == ([], 1)
    assert beat["notices"][0].startswith("ads/f: snapshot s2 failed in the shadow: IndexError")
    assert (len(said(declared, is_shadow=False)), declared.dead("f")) == (100, [])
    declared.append(0, examples(100, 100))
    wait_for(lambda: len(said(declared, is_shadow=True)) == 100)
    wait_for(lambda: beats(declared)[0]["notices"] == [])


@ONE_SERVER
def test_a_shadow_that_ends_the_process_costs_no_row_of_the_active_one(declared: Declared, workers: Roles) -> None:
    first = workers.start()
    publish(declared)
    stand_beside(declared, "s2", share=1.0, poison="kill", poison_above=1e6)

    for number in range(20):
        declared.append(number % 2, examples(number * 50, 50, price=2e6 if number == 10 else 1.0))
    assert first.wait(timeout=60) != 0
    declared.registry.change(
        fm_field("ads", "f"), FmRecord, lambda old: old.model_copy(update={"shadow": None, "shadow_share": 0.0})
    )
    workers.start()
    wait_for(lambda: declared.pending("f") == 0)

    outcomes = [row["example_id"] for row in said(declared, is_shadow=False)]
    assert (sorted(outcomes), declared.dead("f")) == (sorted(IDS[:1000]), [])


@ONE_SERVER
def test_a_shadow_that_is_activated_goes_on_without_being_loaded_again(declared: Declared, workers: Roles) -> None:
    workers.start()
    publish(declared)
    stand_beside(declared, "s2", share=1.0, shift=8.0)
    folder = Path(state(declared, "f", "s2").uri)
    (folder / "model.pt2").unlink()

    declared.registry.change(
        fm_field("ads", "f"),
        FmRecord,
        lambda old: old.model_copy(update={"active": "s2", "shadow": None, "shadow_share": 0.0}),
    )
    wait_for(lambda: [beat["lanes"]["ads/f"]["snapshot"] for beat in beats(declared)] == ["s2"])
    declared.append(0, examples(0, 10))
    wait_for(lambda: declared.pending("f") == 0)

    assert {row["snapshot_id"] for row in said(declared, is_shadow=False)} == {"s2"}


@given(st.lists(st.text(max_size=20), min_size=1, max_size=50), st.floats(0, 1), st.floats(0, 1))
def test_a_wider_share_has_all_of_a_narrower_one_and_a_whole_one_everything(
    ids: list[str], first: float, second: float
) -> None:
    digests = keys.digest_array(pa.array(ids, pa.string()))
    narrow, wide = (in_share(digests, share) for share in sorted([first, second]))

    assert not (narrow & ~wide).any()
    assert in_share(digests, 1.0).all()
    assert not in_share(digests, 0.0).any()


@ONE_SERVER
def test_what_waits_for_a_slow_shadow_is_bounded_and_the_rest_left_out(declared: Declared) -> None:
    context = RoleContext(
        declared.settings, role="worker", instance="w", client=declared.client, metrics=Metrics("worker")
    )
    shadower = Shadower(context, declared.client, dataset="ads", fm="f", partitions=2)
    publisher = Publisher(
        dataset="ads", fm="f", consumer="w", snapshot_id="s2", snapshot_number=0, trained_through_us=0, generation=0,
        epoch=1, ttl_seconds=60, outputs=OutputColumns(tasks=("click",), embeddings={}), has_msetex=False,
    )  # fmt: skip
    shadower.shadow = Shadow(engine=None, publisher=publisher, share=1.0)  # type: ignore[arg-type] # it never runs
    payload = pa.array([b"x" * (WAITING_BYTES // 10)])
    rows = pa.table({"example_digest": keys.digest_array(pa.array(["a"])), "payload": payload})

    for _ in range(15):
        shadower.offer(0, rows, pa.array([0]).to_numpy())

    labels = {"dataset": "ads", "fm": "f", "result": "skipped"}
    assert context.metrics.registry.get_sample_value("das_shadow_rows_total", labels) == 6
