"""Labels: what the door takes and refuses, that they are durable and once, and what `labels` holds of them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis
from deltalake import DeltaTable

from das_service.logs.records import LABELS, LogsFile, read_logs_file, write_logs_file
from das_service.metrics import Metrics
from das_service.role import RoleContext
from das_service.sink.sink import Sink
from schemas import keys
from schemas.wire import ARROW_STREAM
from tests.served import SPEC, Api, arrow_body

AT = datetime(2026, 3, 1, 12, 20, tzinfo=UTC)
TWO_TASKS = {
    **SPEC,
    "tasks": [
        {"name": "click", "label_window_seconds": 3600},
        {"name": "buy", "label_window_seconds": 86_400, "negative_if_silent": False},
    ],
}


def label(example_id: str, at: datetime = AT, **labels: Any) -> dict[str, Any]:
    return {"example_id": example_id, "label_time": at.isoformat(), **labels}


def post(api: Api, rows: list[dict[str, Any]] | pa.Table, **params: Any) -> Any:
    path = "/v1/datasets/events/labels"
    if isinstance(rows, list):
        return api.http.post(path, json={"labels": rows}, params=params)
    return api.http.post(path, content=arrow_body(rows), params=params, headers={"Content-Type": ARROW_STREAM})


def labels_table(**columns: Any) -> pa.Table:
    made: dict[str, Any] = {
        "example_id": ["a", "b"],
        "label_time": pa.array([AT, AT], pa.timestamp("us", "UTC")),
        "click": pa.array([1.0, 0.0], pa.float32()),
    }
    return pa.table({**made, **columns})


def commit(api: Api) -> list[dict[str, Any]]:
    """Let a sink commit what is logged; give the rows of `labels` in log order."""
    with redis.Redis.from_url(api.settings.redis_url.get_secret_value(), protocol=2) as client:
        sink = Sink(RoleContext(api.settings, role="sink", instance="s", client=client, metrics=Metrics("sink")))
        sink.step(now=0.0)
        sink.drain(deadline=float("inf"))
        sink.close()
    place = Path(api.settings.tables_uri) / "events" / "labels"
    rows = DeltaTable(str(place)).to_pyarrow_table().to_pylist() if place.exists() else []
    return sorted(rows, key=lambda row: (row["log_position"], row["example_id"], row["label_time"]))


@pytest.fixture
def ads(api: Api) -> Api:
    api.declare("events", {**TWO_TASKS, "partitions": 1})
    return api


def test_labels_of_json_and_arrow_reach_their_table_as_sent(ads: Api) -> None:
    answer = post(ads, [label("a", click=1), label("b", click=True, buy=0.25)])
    assert (answer.status_code, answer.json()["accepted"], answer.json()["positions"]) == (202, 2, {"0": 0})
    assert post(ads, labels_table(example_id=["c", "d"])).json()["accepted"] == 2

    rows = commit(ads)

    assert [(r["example_id"], r["label_time"], r["click"], r["buy"]) for r in rows] == [
        ("a", AT, 1.0, None), ("b", AT, 1.0, 0.25), ("c", AT, 1.0, None), ("d", AT, 0.0, None),
    ]  # fmt: skip
    assert list(rows[0]) == [
        "example_id", "label_time", "received_at", "log_position", "event_day", "click", "buy",
        "_log_row", "_label_hash", "_example_hash",
    ]  # fmt: skip


def test_a_label_may_come_before_its_example(ads: Api) -> None:
    assert post(ads, [label("nobody-yet", click=1)]).status_code == 202
    assert [row["example_id"] for row in commit(ads)] == ["nobody-yet"]


def test_repeats_in_any_cut_change_nothing_and_other_labels_of_an_example_are_kept(ads: Api) -> None:
    later = AT + timedelta(minutes=1)
    rows = [label("a", click=1), label("a", click=0), label("a", later, click=1), label("b", click=1)]
    for cut in ([rows], [rows], [rows[:1], rows[1:]], [[row] for row in rows], [rows[::-1]]):
        for part in cut:
            assert post(ads, part).json()["accepted"] == len(part)
    commit(ads)
    for row in rows:  # the table has them, the marks of the door do not
        post(ads, [row, label("c", later, buy=1)])

    found = [(r["example_id"], r["label_time"], r["click"]) for r in commit(ads)]

    assert sorted(found, key=str) == sorted(
        [("a", AT, 1.0), ("a", AT, 0.0), ("a", later, 1.0), ("b", AT, 1.0), ("c", later, None)], key=str
    )


def test_bad_labels_are_refused_by_row_and_the_good_ones_are_kept(ads: Api) -> None:
    rows = [
        label("good", click=1),
        label("high", click=1.5),
        label("low", buy=-0.1),
        {**label("x", click=1), "example_id": None},
        label("", click=1),
        label("silent"),
        label("silent", click=None, buy=None),
        label("unknown", purchase=1),
        label("known-too", click=1, purchase=None),
        label("future", datetime.now(UTC) + timedelta(days=2), click=1),
        {"example_id": "timeless", "label_time": None, "click": 1},
        label("i" * 257, click=1),
    ]

    answer = post(ads, rows).json()

    assert (answer["accepted"], answer["rejected"]) == (2, 10)
    assert [(e["row"], e["column"], e["code"]) for e in answer["errors"]] == [
        (1, "click", "out_of_range"), (2, "buy", "out_of_range"), (3, "example_id", "null"),
        (4, "example_id", "empty_id"), (5, "", "no_label"), (6, "", "no_label"), (7, "purchase", "unknown_task"),
        (9, "label_time", "time_in_future"), (10, "label_time", "null"), (11, "example_id", "too_long"),
    ]  # fmt: skip
    assert [row["example_id"] for row in commit(ads)] == ["good", "known-too"]


def test_arrow_values_are_refused_by_row_like_those_of_json(ads: Api) -> None:
    table = labels_table(
        example_id=["a", "b", "c", "d"],
        label_time=pa.array([AT] * 4, pa.timestamp("ns", "Europe/Paris")),
        click=pa.array([float("nan"), 1.0, None, 2.0], pa.float64()),
        purchase=pa.array([None, None, "yes", None]),
    )

    answer = post(ads, table).json()

    assert [(e["row"], e["column"], e["code"]) for e in answer["errors"]] == [
        (0, "click", "out_of_range"), (2, "purchase", "unknown_task"), (3, "click", "out_of_range"),
    ]  # fmt: skip
    assert [(row["example_id"], row["click"]) for row in commit(ads)] == [("b", 1.0)]


@pytest.mark.parametrize(
    ("table", "column"),
    [
        (labels_table().drop_columns(["label_time"]), "label_time"),
        (labels_table().drop_columns(["example_id"]), "example_id"),
        (labels_table(label_time=pa.array([1, 2])), "label_time"),
        (labels_table(label_time=pa.array([AT.replace(tzinfo=None)] * 2, pa.timestamp("us"))), "label_time"),
        (labels_table(example_id=pa.array([1, 2])), "example_id"),
        (labels_table(click=pa.array(["1", "0"])), "click"),
    ],
    ids=["no time", "no id", "time as integers", "time without zone", "id as integers", "label as text"],
)
def test_columns_that_do_not_fit_refuse_the_request(ads: Api, table: pa.Table, column: str) -> None:
    answer = post(ads, table)

    assert (answer.status_code, answer.json()["code"]) == (422, "schema_mismatch")
    assert [item["column"] for item in answer.json()["columns"]] == [column]
    assert commit(ads) == []


def test_names_that_are_no_task_cost_as_much_as_their_values(ads: Api) -> None:
    rows = [label(f"e{i}", **{f"n{i}": 1}) for i in range(150)] + [label("good", click=1)]

    answer = post(ads, rows).json()

    assert (answer["accepted"], answer["rejected"]) == (1, 150)
    assert {error["code"] for error in answer["errors"]} == {"unknown_task"}
    assert [error["column"] for error in answer["errors"]][98:102] == ["n98", "n99", "", ""]


def test_abort_stores_all_or_none(ads: Api) -> None:
    rows = [label("a", click=1), label("b", click=7)]

    answer = post(ads, rows, on_error="abort")

    assert (answer.status_code, answer.json()["accepted"]) == (422, 0)
    assert commit(ads) == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"labels": []}, 422, "empty"),
        ({"examples": []}, 422, "schema_mismatch"),
        ({"labels": [1]}, 422, "schema_mismatch"),
        ({"labels": [{"example_id": "a", "label_time": "2026-03-01T12:20:00Z", "click": "1"}]}, 422, "schema_mismatch"),
    ],
)
def test_json_of_another_shape_is_refused(ads: Api, body: Any, status: int, code: str) -> None:
    answer = ads.http.post("/v1/datasets/events/labels", json=body)

    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_dataset_without_tasks_takes_no_labels(api: Api) -> None:
    api.declare("events", {**SPEC, "tasks": []})

    answer = post(api, [label("a", click=1)])

    assert (answer.status_code, answer.json()["code"]) == (422, "no_tasks")
    assert api.http.post("/v1/datasets/none/labels", json={"labels": []}).status_code == 404


def test_a_task_can_not_have_the_name_of_a_feature(api: Api) -> None:
    answer = api.http.put("/v1/datasets/events", json={**SPEC, "tasks": [{"name": "price", "label_window_seconds": 1}]})

    assert answer.status_code == 422
    assert "price" in answer.json()["detail"]


def test_a_dataset_of_an_older_version_gets_its_labels_log_with_the_first_label(ads: Api) -> None:
    service = ads.http.app_state["service"]  # type: ignore[attr-defined]
    logs = read_logs_file(service.tables, "events")
    assert logs is not None
    write_logs_file(service.tables, "events", LogsFile(epoch=1, partitions=1, logs=("examples",)))
    with redis.Redis.from_url(ads.settings.redis_url.get_secret_value(), protocol=2) as client:
        client.delete(keys.log("events", 0, LABELS))
        client.hdel(keys.counters("events", 0), *[f"labels/{name}" for name in ("last", "rows", "bytes", "first_rows",
                    "first_bytes", "repeated_rows")])  # fmt: skip
    service.guard.look()

    assert post(ads, [label("a", click=1)]).status_code == 202
    assert [row["example_id"] for row in commit(ads)] == ["a"]
