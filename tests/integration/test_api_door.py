"""What a request passes before its content counts: permits, limits, media types, tokens."""

import json
import socket
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import redis

from das_service.app import is_loopback, main, parse_bind
from das_service.settings import Settings, SettingsError
from schemas.wire import ARROW_STREAM
from tests.served import SPEC, Api, Stand, arrow_body, examples, examples_table, serve, serve_over_tcp

EXAMPLES = "/v1/datasets/ads/examples"


def assert_problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert answer.headers["Content-Type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), body
    return body


def changed(settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update=changes)


def test_a_data_request_beyond_the_permits_is_told_to_come_back_at_once(api: Api) -> None:
    service = api.http.app_state["service"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.permits, "_free", 0)
        answer = api.post(examples(0, 1))
        lookup = api.http.post("/v1/datasets/ads/supervision/lookup", json={"fms": ["f"], "example_ids": []})
        assert api.http.get("/v1/datasets").status_code == 200

    assert_problem(answer, 429, "busy")
    assert_problem(lookup, 429, "busy")
    assert answer.headers["Retry-After"] == "1"
    assert api.post(examples(0, 1)).status_code == 202


def test_permits_come_back_after_every_kind_of_answer(settings: Settings) -> None:
    with serve(changed(settings, max_concurrent_requests=1)) as api:
        api.declare()
        for body in (b"junk", arrow_body(examples_table(0, 1)), b""):
            api.post(body)
        assert api.post(examples(0, 1)).status_code == 202


def test_a_body_over_the_limit_is_413(settings: Settings) -> None:
    with serve(changed(settings, max_body_bytes=2000)) as api:
        api.declare()
        body = arrow_body(examples_table(0, 1000))
        headers = {"Content-Type": ARROW_STREAM}

        stated = api.http.post(EXAMPLES, content=body, headers=headers)
        streamed = api.http.post(EXAMPLES, content=iter([body[:1000], body[1000:]]), headers=headers)

        assert_problem(stated, 413, "too_large")
        assert_problem(streamed, 413, "too_large")
        assert api.logged_rows() == []


def test_more_rows_than_a_request_may_have_are_413(settings: Settings) -> None:
    with serve(changed(settings, max_rows=10)) as api:
        api.declare()
        assert_problem(api.post(examples_table(0, 11)), 413, "too_large")
        assert_problem(api.post(examples(0, 11)), 413, "too_large")
        assert api.logged_rows() == []


def test_a_declaration_over_the_limit_is_413(api: Api) -> None:
    answer = api.http.put("/v1/datasets/new", content=b" " * 5_000_000, headers={"Content-Type": "application/json"})

    assert_problem(answer, 413, "too_large")


@pytest.fixture
def port(settings: Settings) -> Iterator[int]:
    """A socket of a service that waits 0.2 s for the next piece of a body, and takes 10,000 bytes."""
    with serve(settings) as api:
        api.declare()
    with serve_over_tcp(changed(settings, body_timeout_seconds=0.2, max_body_bytes=10_000)) as port:
        yield port


def talk(port: int, head: str, body: bytes) -> bytes:
    """Send a head and a part of a body, and give all that comes back until the server hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


def test_a_body_that_stops_coming_is_408_and_the_connection_ends(port: int) -> None:
    head = f"POST {EXAMPLES} HTTP/1.1\nHost: x\nContent-Type: {ARROW_STREAM}\nContent-Length: 5000"

    received = talk(port, head, b"x" * 100)

    assert received.startswith(b"HTTP/1.1 408 ")
    assert b"application/problem+json" in received
    assert b'"code": "body_timeout"' in received


def test_a_caller_that_asks_first_is_refused_before_it_sends(port: int) -> None:
    head = (
        f"POST {EXAMPLES} HTTP/1.1\nHost: x\nContent-Type: {ARROW_STREAM}\nContent-Length: 100000\nExpect: 100-continue"
    )

    received = talk(port, head, b"")

    assert received.startswith(b"HTTP/1.1 413 ")


def test_a_caller_that_hangs_up_leaves_no_permit_behind(port: int) -> None:
    head = f"POST {EXAMPLES} HTTP/1.1\r\nHost: x\r\nContent-Type: {ARROW_STREAM}\r\nContent-Length: 5000\r\n\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(head.encode() + b"x")

    received = talk(port, "GET /health/live HTTP/1.1\nHost: x\nConnection: close", b"")
    assert received.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("accept", ["text/csv", "application/json;q=0", ARROW_STREAM])
def test_ingest_answers_json_or_406(api: Api, accept: str) -> None:
    answer = api.http.post(EXAMPLES, json={"examples": examples(0, 1)}, headers={"Accept": accept})

    assert_problem(answer, 406, "not_acceptable")
    assert api.logged_rows() == []


@pytest.mark.parametrize("accept", ["*/*", "application/*", "text/html, application/json;q=0.5", ""])
def test_wide_accepts_are_taken(api: Api, accept: str) -> None:
    answer = api.http.post(EXAMPLES, json={"examples": examples(0, 1)}, headers={"Accept": accept})

    assert answer.status_code == 202


def test_unknown_paths_and_methods_are_problems(api: Api) -> None:
    assert_problem(api.http.get("/v2/nothing"), 404, "not_found")
    for path, allowed in {"/v1/datasets/ads": "GET, PUT", "/v1/datasets": "GET", "/openapi.json": "GET"}.items():
        answer = api.http.delete(path)
        assert_problem(answer, 405, "method_not_allowed")
        assert allowed in answer.headers["Allow"]


def test_a_defect_of_the_service_is_a_500_with_an_id_and_no_trace(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr("das_service.routes.examples.encode_chunks", fail)

    body = assert_problem(api.post(examples(0, 1)), 500, "internal")

    assert body["instance"].startswith("urn:uuid:")
    assert "secret" not in json.dumps(body)
    assert body["instance"] in caplog.text
    assert "a secret detail" in caplog.text


def test_a_full_log_is_429_and_names_who_holds_it_up(settings: Settings, store: redis.Redis) -> None:
    with serve(changed(settings, max_backlog_bytes=1024 * 1024)) as api:
        api.declare()
        api.declare_fm("slow")
        answers = [api.post(examples_table(i * 1000, 1000, user_id=["x" * 200] * 1000)) for i in range(12)]
        api.look()
        answer = api.post(examples_table(20_000, 1000, user_id=["x" * 200] * 1000))

    assert [answers[0].status_code, answers[-1].status_code] == [202, 429]
    body = assert_problem(answer, 429, "backlog")
    assert "FM 'slow'" in body["detail"]
    assert body["retryable"] is True
    assert int(answer.headers["Retry-After"]) >= 1


def test_an_fm_that_is_done_leaves_the_sink_as_the_one_that_holds_things_up(api: Api, stand: Stand) -> None:
    stand.validate()
    api.post(examples(0, 10))
    stand.work()
    api.look()

    backlog = api.http.app_state["service"].monitor.findings.backlogs["ads"]
    assert backlog.holder() == "the sink has 2 entries to finish"


@pytest.fixture
def maxmemory(store: redis.Redis) -> Iterator[Any]:
    """Sets the server's maxmemory in relation to what it uses now, for the test."""
    yield lambda ratio: store.config_set("maxmemory", int(store.info("memory")["used_memory"] * ratio))
    store.config_set("maxmemory", 0)


def test_little_memory_left_is_429_naming_it(api: Api, maxmemory: Any) -> None:
    maxmemory(1.05)
    api.look()

    body = assert_problem(api.post(examples(0, 1)), 429, "memory")

    assert "maxmemory" in body["detail"]


def test_no_memory_at_all_is_429_also_before_the_monitor_saw_it(api: Api, maxmemory: Any) -> None:
    api.http.app_state["service"].monitor.stop()
    maxmemory(0.5)

    assert_problem(api.post(examples(0, 1)), 429, "memory")
    maxmemory(0)
    assert api.post(examples(0, 1)).status_code == 202


def test_little_disk_left_is_507(settings: Settings) -> None:
    with serve(settings) as api:
        api.declare()
    with serve(changed(settings, disk_reserve_bytes=1 << 60)) as api:
        answer = api.post(examples(0, 1))

        assert_problem(answer, 507, "disk_reserve")
        assert answer.headers["Retry-After"] == "30"
        assert api.logged_rows() == []


def tokens_of(folder: Path, **scopes: list[str]) -> Path:
    records = [
        {"name": name, "sha256": sha256(name.encode()).hexdigest(), "scopes": allowed}
        for name, allowed in scopes.items()
    ]
    path = folder / "tokens.json"
    path.write_text(json.dumps(records))
    return path


def test_tokens_open_what_their_scopes_say(settings: Settings, tmp_path: Path) -> None:
    path = tokens_of(tmp_path, product=["ingest"], trainer=["read"], owner=["admin"])
    with serve(changed(settings, tokens_file=path)) as api:
        calls = {
            "admin": lambda token: api.http.put("/v1/datasets/ads", json=SPEC, headers=token),
            "ingest": lambda token: api.http.post(EXAMPLES, json={"examples": examples(0, 1)}, headers=token),
            "read": lambda token: api.http.get("/v1/datasets/ads", headers=token),
        }
        for scope, name in (("admin", "owner"), ("ingest", "product"), ("read", "trainer")):
            token = {"Authorization": f"Bearer {name}"}
            for other, call in calls.items():
                if other == scope:
                    assert call(token).is_success
                else:
                    answer = call(token)
                    assert_problem(answer, 403, "forbidden")
                    assert f'scope="{other}"' in answer.headers["WWW-Authenticate"]


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic cHJvZHVjdDo=", "Bearer ", "product", "Bearer caf\xe9"])
def test_an_unknown_token_is_401(settings: Settings, tmp_path: Path, header: str | None) -> None:
    with serve(changed(settings, tokens_file=tokens_of(tmp_path, product=["ingest"]))) as api:
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        answer = api.http.post(EXAMPLES, content=b"junk", headers=headers)

        assert_problem(answer, 401, "unauthenticated")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_probes_and_metrics_are_open(settings: Settings, tmp_path: Path) -> None:
    with serve(changed(settings, tokens_file=tokens_of(tmp_path, product=["ingest"]))) as api:
        assert [api.http.get(path).status_code for path in ("/health/live", "/health/ready", "/metrics")] == [200] * 3


def test_a_token_of_the_settings_opens_everything(settings: Settings) -> None:
    with serve(Settings(**{**settings.model_dump(), "token": "all"})) as api:
        headers = {"Authorization": "Bearer all"}
        assert api.http.put("/v1/datasets/ads", json=SPEC, headers=headers).status_code == 201
        assert api.http.get("/v1/datasets/ads").status_code == 401


@pytest.mark.parametrize("content", ["", "{}", "[]", '[{"name": "a", "sha256": "x", "scopes": ["read"]}]'])
def test_a_bad_tokens_file_stops_the_start(settings: Settings, tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(content)
    with pytest.raises(SettingsError, match="tokens"), serve(changed(settings, tokens_file=path)):
        pass


def test_without_tokens_only_this_machine_may_reach_it(settings: Settings) -> None:
    with pytest.raises(SettingsError, match="no tokens"):
        main(changed(settings, bind="0.0.0.0:8000"))
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert parse_bind("[::1]:80") == ("::1", 80)
