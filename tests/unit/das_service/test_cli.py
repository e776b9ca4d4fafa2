"""The command line against prepared answers: what it prints, what it sends, how it fails."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from das_service import client as client_module
from das_service.cli.app import build_app
from das_service.cli.status_view import build_view
from das_service.up.service_folder import ServiceFolder, owned
from das_service.up.service_status import look
from schemas.wire import read_table, write_table

SPEC = {
    "dataset": "ads", "partitions": 4, "tasks": [{"name": "click"}],
    "features": [{"name": "price", "type": "float"}],
}  # fmt: skip


def commands_of(group: Any, *names: str) -> list[tuple[str, ...]]:
    """Give every command below a group, by the words that call it."""
    below = getattr(group, "commands", None)
    return [names] if below is None else [c for name in below for c in commands_of(below[name], *names, name)]


COMMANDS = commands_of(get_command(build_app()))
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Api:
    """Answers by method and path; remembers what it was asked."""

    answers: dict[str, Any] = field(default_factory=dict)
    requests: list[httpx.Request] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.get(f"{request.method} {request.url.path}")
        if answer is None:
            return httpx.Response(404, json={"code": "unknown_dataset", "detail": "there is no such thing"})
        return answer(request) if callable(answer) else answer

    def asked(self, method: str) -> list[Any]:
        return [json.loads(request.content) for request in self.requests if request.method == method]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    """The service that every command talks to."""
    service = Api({"GET /v1/datasets/ads": ok(SPEC)})
    real = client_module.Client

    def connect(url: str | None = None, **options: Any) -> client_module.Client:
        return real(url or "http://das", transport=httpx.MockTransport(service), **{"timeout_seconds": 0.5, **options})

    monkeypatch.setattr(client_module, "Client", connect)
    monkeypatch.setattr("das_service.up.service_status.Client", connect)
    return service


def ok(body: Any, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers=headers)


def das(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(build_app(), list(arguments), input=stdin)


def plain(text: str) -> str:
    return " ".join(_COLOURS.sub("", text).split())


# ---- help


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_teaches_with_an_example_of_itself(command: tuple[str, ...]) -> None:
    result = das(*command, "--help")
    assert result.exit_code == 0
    _, _, example = plain(result.stdout).partition("Example: ")
    assert f"das {' '.join(command)}" in example


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_breaks_lines_where_the_terminal_ends_and_nowhere_else(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    head, _, _ = _COLOURS.sub("", das(*command, "--help").stdout).partition("╭")
    blank = [not line.strip() for line in head.splitlines()]
    assert [a or b for a, b in pairwise(blank)] == [True] * (len(blank) - 1)


def test_the_command_line_starts_without_the_service() -> None:
    program = (
        "import sys\nfrom das_service.cli.app import build_app\nbuild_app()\n"
        "heavy = {'pydantic', 'pyarrow', 'httpx', 'redis', 'duckdb', 'deltalake', 'numpy', 'torch', 'fastapi'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("up", "--port", "65536"), ("up", "--port", "-1"), ("augment", "a", "b", "--max-freshness-gap-seconds", "inf"),
        ("augment", "a", "b", "--max-freshness-gap-seconds", "nan"),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused_with_the_option(arguments: tuple[str, ...]) -> None:
    result = das(*arguments)
    assert result.exit_code == 2
    assert f"Invalid value for '{arguments[-2]}'" in plain(result.stderr)


# ---- datasets, FMs, snapshots


def test_dataset_put_sends_the_file(api: Api, tmp_path: Path) -> None:
    api.answers["PUT /v1/datasets/ads"] = ok(SPEC, 201)
    (tmp_path / "ads.json").write_text(json.dumps(SPEC))
    result = das("dataset", "put", "ads", str(tmp_path / "ads.json"))
    assert (result.exit_code, result.stdout) == (0, "dataset ads is declared with 1 features\n")
    assert api.asked("PUT") == [SPEC]


def test_dataset_put_takes_stdin(api: Api) -> None:
    api.answers["PUT /v1/datasets/ads"] = ok(SPEC)
    assert das("dataset", "put", "ads", "-", stdin=json.dumps(SPEC)).exit_code == 0


def test_a_conflict_shows_the_differences(api: Api) -> None:
    differences = [{"field": "partitions", "stored": 4, "declared": 8}]
    body = {"code": "dataset_conflict", "detail": "it is declared differently", "differences": differences}
    api.answers["PUT /v1/datasets/ads"] = ok(body, 409)
    result = das("dataset", "put", "ads", "-", stdin="{}")
    assert (result.exit_code, result.stderr) == (
        1, "das: it is declared differently\n  partitions: stored 4, declared 8\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("dataset", "put", "ads", "-"), "{", "- is not JSON"),
        (("dataset", "put", "ads", "-"), "[]", "- holds no JSON object"),
        (("dataset", "put", "ads", "/nowhere/ads.json"), None, "/nowhere/ads.json: No such file or directory"),
        (("dataset", "put", "ads", sys.executable), None, "is no text in UTF-8"),
        (("lookup", "ads", "--ids-file", sys.executable), None, "is no text in UTF-8"),
        (("ingest", "ads", "/nowhere/rows.parquet"), None, "/nowhere/rows.parquet: No such file or directory"),
        (("ingest", "ads", "-", "--format", "csv"), "", "--format csv is not one of parquet, arrow, ndjson"),
        (("ingest", "ads", "-"), '{"price": "x"}', '-, line 1: price is "x", not a number'),
        (("lookup", "ads", "--fm", "f"), None, "name example ids"),
        (("lookup", "ads", "a", "--fm", "f", "--embedding-format", "int3"), None, "is not encoded, float16 or float32"),
        (("recover", "--folder", "/nowhere"), None, "`das up` does not run on /nowhere"),
    ],
)
def test_misuse_is_one_sentence_and_exit_code_2(
    api: Api, arguments: tuple[str, ...], stdin: str | None, message: str
) -> None:
    result = das(*arguments, stdin=stdin)
    assert result.exit_code == 2
    assert result.stderr.startswith("das: ")
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_an_unreachable_service_is_said_with_what_to_do(api: Api) -> None:
    def refuse(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("Connection refused")

    api.answers["GET /v1/datasets"] = refuse
    result = das("dataset", "list")
    assert result.exit_code == 1
    assert "no answer from http://das: Connection refused" in result.stderr
    assert "`das up` starts it" in result.stderr


def test_a_bug_of_ours_is_not_hidden(api: Api) -> None:
    api.answers["GET /v1/datasets"] = ok({"unexpected": True})
    assert isinstance(das("dataset", "list").exception, KeyError)


def test_fm_and_snapshot_lists_are_tables(api: Api) -> None:
    api.answers["GET /v1/datasets/ads/fms"] = ok({"fms": [{"fm": "f", "required": True, "active": "s1"}]})
    snapshot = {"snapshot_id": "s1", "state": "rejected", "reasons": ["bad sum"], "trained_through": None}
    api.answers["GET /v1/datasets/ads/fms/f/snapshots"] = ok({"snapshots": [snapshot]})
    assert plain(das("fm", "list", "ads").stdout) == "fm required active snapshot f yes s1"
    assert "s1 rejected bad sum" in plain(das("snapshot", "list", "ads", "f").stdout)
    assert json.loads(das("snapshot", "list", "ads", "f", "--json").stdout) == [snapshot]


def test_rollback_is_one_call_that_the_service_decides(api: Api) -> None:
    api.answers["GET /v1/datasets/ads/fms/f/active"] = ok({"snapshot_id": "s3"}, ETag='"9"')
    api.answers["POST /v1/datasets/ads/fms/f/rollback"] = ok({"snapshot_id": "s2", "generation": 1})
    result = das("snapshot", "rollback", "ads", "f")
    assert (result.exit_code, result.stdout) == (0, "snapshot s2 of FM f is active again (before: s3)\n")
    assert api.requests[-1].headers["If-Match"] == '"9"'
    as_json = das("snapshot", "rollback", "ads", "f", "--json", "--if-match", '"7"')
    assert json.loads(as_json.stdout) == {"snapshot_id": "s2", "generation": 1}
    assert api.requests[-1].headers["If-Match"] == '"7"'


def test_rollback_to_a_named_snapshot_activates_it(api: Api) -> None:
    api.answers["GET /v1/datasets/ads/fms/f/active"] = ok({"snapshot_id": "s3"}, ETag='"9"')
    api.answers["PUT /v1/datasets/ads/fms/f/active"] = ok({"snapshot_id": "s1"})
    result = das("snapshot", "rollback", "ads", "f", "--to", "s1")
    assert (result.exit_code, result.stdout) == (0, "snapshot s1 of FM f is active again (before: s3)\n")
    assert (api.requests[-1].headers["If-Match"], json.loads(api.requests[-1].content)) == (
        '"9"', {"snapshot_id": "s1"},
    )  # fmt: skip


def test_rollback_without_a_former_snapshot_says_why(api: Api) -> None:
    refusal = {"code": "nothing_to_roll_back_to", "detail": "FM 'f' can't be rolled back", "title": "Conflict"}
    api.answers["GET /v1/datasets/ads/fms/f/active"] = ok({"snapshot_id": "s1"}, ETag='"9"')
    api.answers["POST /v1/datasets/ads/fms/f/rollback"] = ok(refusal, 409)
    result = das("snapshot", "rollback", "ads", "f")
    assert (result.exit_code, "FM 'f' can't be rolled back" in result.stderr) == (1, True)


def test_a_shadow_is_set_shown_and_ended(api: Api) -> None:
    path = "/v1/datasets/ads/fms/f/shadow"
    api.answers[f"PUT {path}"] = api.answers[f"GET {path}"] = ok({"snapshot_id": "s2", "share": 0.05})
    api.answers[f"DELETE {path}"] = ok({"snapshot_id": None, "share": 0.0})
    assert das("snapshot", "shadow", "ads", "f", "s2", "--share", "0.05").stdout == "snapshot s2 of FM f scores 5.00%\n"
    assert json.loads(api.requests[-1].content) == {"snapshot_id": "s2", "share": 0.05}
    assert json.loads(das("snapshot", "shadow", "ads", "f", "--json").stdout) == {"snapshot_id": "s2", "share": 0.05}
    assert das("snapshot", "shadow", "ads", "f", "--end").stdout == "FM f has no shadow\n"
    assert das("snapshot", "shadow", "ads", "f", "s2", "--end").exit_code == 2


def test_retire_says_the_state(api: Api) -> None:
    path = "/v1/datasets/ads/fms/f/snapshots/s1/retire"
    api.answers[f"POST {path}"] = ok({"snapshot_id": "s1", "state": "retired"})
    assert das("snapshot", "retire", "ads", "f", "s1").stdout == "snapshot s1 is retired\n"


def test_the_audit_log_is_a_table_or_json(api: Api) -> None:
    entry = {"at": "2026-03-01T12:00:00Z", "who": "fm-team", "what": "activate", "snapshot_id": "s2",
             "before": {"active": "s1"}, "after": {"active": "s2"}}  # fmt: skip
    api.answers["GET /v1/datasets/ads/fms/f/audit"] = ok({"entries": [entry]})
    assert json.loads(das("snapshot", "audit", "ads", "f", "--json").stdout) == [entry]
    text = das("snapshot", "audit", "ads", "f").stdout
    for part in ("fm-team", "activate", "s2"):
        assert part in text


# ---- ingest and lookup


def take(rejected: int = 0) -> Any:
    def answer(request: httpx.Request) -> httpx.Response:
        errors = [
            {"row": i, "example_id": f"e{i}", "column": "price", "code": "not_finite", "message": "it is NaN"}
            for i in range(rejected)
        ]
        rows = read_table(request.content).num_rows
        return ok({"accepted": rows - rejected, "rejected": rejected, "errors": errors, "positions": {"0": 1}}, 202)

    return answer


def lines(number: int) -> str:
    return "".join(
        json.dumps({"example_id": f"e{i}", "event_time": "2026-01-31T12:00:00Z", "price": i}) + "\n"
        for i in range(number)
    )


def test_ingest_sends_chunks_and_adds_up(api: Api) -> None:
    api.answers["POST /v1/datasets/ads/examples"] = take()
    result = das("ingest", "ads", "-", "--rows-per-request", "4", stdin=lines(10))
    assert result.exit_code == 0
    assert result.stdout.startswith("10 rows accepted, 0 rejected, ")
    posted = [read_table(request.content) for request in api.requests if request.method == "POST"]
    assert sorted(table.num_rows for table in posted) == [2, 4, 4]
    assert posted[0].schema.field("price").type == pa.float64()


def test_ingest_of_bad_rows_shows_reasons_and_fails(api: Api, tmp_path: Path) -> None:
    api.answers["POST /v1/datasets/ads/examples"] = take(rejected=2)
    pq.write_table(pa.table({"example_id": ["a", "b", "c"], "price": [1.0, 2.0, 3.0]}), tmp_path / "rows.parquet")
    result = das("ingest", "ads", str(tmp_path / "rows.parquet"))
    assert result.exit_code == 1
    assert result.stdout.startswith("1 rows accepted, 2 rejected")
    assert "row 1 (e1), price: it is NaN" in result.stderr


def test_ingest_prints_json_for_machines(api: Api) -> None:
    api.answers["POST /v1/datasets/ads/examples"] = take(rejected=1)
    result = das("ingest", "ads", "-", "--json", stdin=lines(3))
    record = json.loads(result.stdout)
    assert (record["accepted"], record["rejected"], record["errors"][0]["code"]) == (2, 1, "not_finite")


def found(request: httpx.Request) -> httpx.Response:
    ids = read_table(request.content)["example_id"]
    columns = {
        "example_id": ids,
        "f__status": pa.array(["present"] * len(ids)).dictionary_encode(),
        "f__click__logit": pa.array([0.25] * len(ids), pa.float32()),
        "f__hidden": pa.array([[0.5] * 8] * len(ids), pa.list_(pa.float32(), 8)),
    }
    return httpx.Response(200, content=write_table(pa.table(columns)))


def test_lookup_prints_a_row_per_id(api: Api, tmp_path: Path) -> None:
    api.answers["POST /v1/datasets/ads/supervision/lookup"] = found
    (tmp_path / "ids").write_text("b\n\nc\n")
    result = das("lookup", "ads", "a", "--fm", "f", "--ids-file", str(tmp_path / "ids"), "--json")
    assert [row["example_id"] for row in json.loads(result.stdout)] == ["a", "b", "c"]
    assert "present" in plain(das("lookup", "ads", "a", "--fm", "f").stdout)


def test_lookup_writes_parquet(api: Api, tmp_path: Path) -> None:
    api.answers["POST /v1/datasets/ads/supervision/lookup"] = found
    result = das("lookup", "ads", "a", "b", "--fm", "f", "--out", str(tmp_path / "out.parquet"))
    assert (result.exit_code, result.stdout) == (0, "")
    assert pq.read_table(tmp_path / "out.parquet")["example_id"].to_pylist() == ["a", "b"]


def test_lookup_prints_bytes_and_times_as_the_api_does(api: Api) -> None:
    scored_at = pa.array([datetime(2026, 3, 1, 12, tzinfo=UTC)], pa.timestamp("us", "UTC"))
    table = pa.table({"example_id": ["a"], "f__scored_at": scored_at, "f__hidden": pa.array([b"\x00\xff"])})
    api.answers["POST /v1/datasets/ads/supervision/lookup"] = httpx.Response(200, content=write_table(table))
    result = das("lookup", "ads", "a", "--fm", "f", "--embedding-format", "encoded", "--json")
    (row,) = json.loads(result.stdout)
    assert row == {"example_id": "a", "f__scored_at": "2026-03-01T12:00:00Z", "f__hidden": "AP8="}


def test_an_output_file_that_can_not_be_written_is_named(api: Api) -> None:
    api.answers["POST /v1/datasets/ads/supervision/lookup"] = found
    result = das("lookup", "ads", "a", "--fm", "f", "--out", "/nowhere/out.parquet")
    assert (result.exit_code, result.stderr[:5], "/nowhere/out.parquet" in result.stderr) == (2, "das: ", True)


def test_lookup_takes_the_only_fm_there_is(api: Api) -> None:
    api.answers["POST /v1/datasets/ads/supervision/lookup"] = found
    api.answers["GET /v1/datasets/ads/fms"] = ok({"fms": [{"fm": "f"}]})
    assert das("lookup", "ads", "a").exit_code == 0
    api.answers["GET /v1/datasets/ads/fms"] = ok({"fms": [{"fm": "f"}, {"fm": "g"}]})
    assert "say which FM with --fm; dataset ads has f, g" in das("lookup", "ads", "a").stderr


def test_dead_letters_are_listed_and_replayed(api: Api) -> None:
    letter = {"example_id": "a", "event_time": None, "snapshot_id": "s1", "failed_at": None, "reason": "it raised"}
    api.answers["GET /v1/datasets/ads/dead-letters"] = ok({"dead_letters": [letter]})
    api.answers["POST /v1/datasets/ads/dead-letters/replay"] = ok({"replayed": 1})
    assert "a s1 it raised" in plain(das("dead-letters", "list", "ads", "f").stdout)
    assert "1 examples are tried again" in das("dead-letters", "replay", "ads", "f").stdout
    assert api.asked("POST") == [{"fm": "f"}]


# ---- status


def state(**changes: Any) -> dict[str, Any]:
    fm = {
        "required": True, "active": "s1", "scored": 90, "pending": 10, "failed": 0, "coverage": 0.9,
        "trained_through": "2020-01-01T00:00:00Z", "oldest_age_seconds": 1.5,
    }  # fmt: skip
    dataset = {
        "accepted": 105, "distinct": 100, "duplicates": 5, "conflicting": 0, "in_log": 0, "backlog_bytes": 12_345,
        "fms": {"teacher": fm},
    }  # fmt: skip
    roles = [
        {"role": "api", "pid": 11, "restarts": 0, "alive": True, "instance": "a"},
        {"role": "sink", "pid": 12, "restarts": 3, "alive": False, "instance": "old"},
        {"role": "sink", "pid": 13, "restarts": 0, "alive": True, "instance": "new"},
    ]
    return {"ready": True, "problems": [], "roles": roles, "datasets": {"ads": dataset}, "url": "http://das", **changes}


def shown(now: dict[str, Any], before: dict[str, Any], seconds: float = 2.0) -> str:
    from rich.console import Console

    console = Console(width=140, no_color=True)
    with console.capture() as capture:
        console.print(build_view(now, before, seconds=seconds))
    return plain(capture.get())


def test_the_screen_shows_counts_and_rates() -> None:
    now, before = state(), state()
    before["datasets"]["ads"] = {**before["datasets"]["ads"], "accepted": 5}
    text = shown(now, before)
    assert (
        "dataset ads accepted 105 (50/s) · distinct 100 · duplicates 5 · conflicting 0 · in the log 0 · logs 12 kB"
        in text
    )
    assert "FM teacher snapshot s1 · scored 90 (0/s) · pending 10, the oldest 1.5 s · failed 0 · coverage 90.0%" in text
    assert "sink 12 3 down" in text


def test_the_screen_says_what_no_table_takes() -> None:
    now = state()
    now["datasets"]["ads"] |= {"diverted": 1200}
    now["datasets"]["ads"]["fms"]["teacher"] |= {"diverted": 7}
    text = shown(now, state())
    assert "conflicting 0 · diverted 1,200 · in the log 0" in text
    assert "failed 0 · diverted 7 · coverage" in text


def test_the_screen_of_an_empty_service_has_no_dataset() -> None:
    assert shown(state(datasets={}, roles=[]), state(datasets={}), 0.0) == "ready http://das"


def test_the_screen_says_what_is_wrong() -> None:
    text = shown(state(ready=False, problems=["no sink is alive"]), state())
    assert text.startswith("not ready http://das ! no sink is alive")


def test_status_is_the_api_s_own_account_with_the_living_first(api: Api) -> None:
    api.answers["GET /v1/status"] = ok(state())
    result = das("status", "--json")
    assert result.exit_code == 0
    assert [(role["role"], role["pid"]) for role in json.loads(result.stdout)["roles"]] == [
        ("api", 11), ("sink", 13), ("sink", 12),
    ]  # fmt: skip


def test_status_of_a_service_that_is_not_ready_says_why(api: Api) -> None:
    api.answers["GET /v1/status"] = ok(state(ready=False, problems=["no sink is alive"], datasets={}))
    result = das("status")
    assert (result.exit_code, "no sink is alive" in result.stdout) == (0, True)


def test_status_falls_back_to_what_the_supervisor_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("das_service.up.service_status.TIMEOUT_SECONDS", 0.1)
    monkeypatch.delenv("DAS_API_URL", raising=False)
    folder = ServiceFolder(tmp_path)
    roles = [{"role": "api", "pid": os.getpid(), "restarts": 2}]
    with owned(folder):
        folder.write_roles({"url": "http://127.0.0.1:9", "roles": roles})
        stated = look(None, tmp_path)
    assert (stated["source"], stated["ready"], stated["roles"]) == ("folder", False, roles)
    assert stated["problems"][0].startswith("the API can't be asked: no answer from http://127.0.0.1:9")


def test_status_where_nothing_runs_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("das_service.up.service_status.TIMEOUT_SECONDS", 0.1)
    stated = look("http://127.0.0.1:9", tmp_path)
    assert (stated["source"], stated["ready"], stated["roles"]) == ("nobody", False, [])
    assert stated["problems"][1] == f"no `das up` runs on {tmp_path} either"


def test_status_of_nothing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("das_service.up.service_status.TIMEOUT_SECONDS", 0.1)
    result = das("status", "--url", "http://127.0.0.1:9", "--folder", str(tmp_path), "--json")
    assert (result.exit_code, json.loads(result.stdout)["ready"]) == (1, False)


def test_the_worker_without_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = das("worker")
    assert result.exit_code == 2
    assert "torch is not installed: pip install 'das-service[worker]'" in result.stderr
