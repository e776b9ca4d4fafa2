"""The alert rules, by promtool: well-formed; each fires for what it names, and none fires while all is well."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.dockerfile import DOCKERFILE
from tests.docker.programs import PROMTOOL, needs_prometheus

ALERTS = DOCKERFILE.parent / "alerts.yml"
AT_MINUTE = 100
DAS = 'dataset="ads"'
TEACHER = f'{DAS},fm="teacher"'
POSTS = 'route="/v1/datasets/{dataset}/examples"'

WELL = {
    'up{job="api"}': "1+0x100",
    'up{job="sink"}': "1+0x100",
    'up{job="worker"}': "1+0x100",
    'das_ready{job="api"}': "1+0x100",
    'das_log_durability_info{mode="fsync"}': "1+0x100",
    'das_log_durability_info{mode="weaker"}': "0+0x100",
    f'das_request_duration_seconds_count{{{POSTS},code="202"}}': "0+60x100",
    f'das_request_duration_seconds_count{{{POSTS},code="429"}}': "5+0x100",
    f'das_ingest_rows_total{{{DAS},result="accepted",reason=""}}': "0+5000x100",
    f'das_ingest_rows_total{{{DAS},result="rejected",reason="not_finite"}}': "0+10x100",
    f"das_conflicting_examples_total{{{DAS}}}": "3+0x100",
    f'das_log_oldest_age_seconds{{job="api",{DAS},kind="examples"}}': "5+0x100",
    f"das_dead_letters{{{TEACHER}}}": "0+0x100",
    f'das_commit_seconds_bucket{{{DAS},table="examples",le="0.5"}}': "0+10x100",
    f'das_commit_seconds_bucket{{{DAS},table="examples",le="+Inf"}}': "0+10x100",
    f'das_table_files{{{DAS},table="examples"}}': "900+0x100",
    f"das_coverage_ratio{{{TEACHER}}}": "0.98+0x100",
    f"das_freshness_gap_seconds{{{TEACHER}}}": "7200+0x100",
    f'das_snapshot_info{{{TEACHER},snapshot="s1",state="active"}}': "1+0x100",
}
# What differs from WELL when an alert fires; None: the series is not there.
WRONG: dict[str, dict[str, str | None]] = {
    "DasApiDown": {'up{job="api"}': None},
    "DasSinkDown": {'up{job="sink"}': "0+0x100"},
    "DasWorkerDown": {'up{job="worker"}': None},
    "DasNotReady": {'das_ready{job="api"}': "0+0x100"},
    "DasNotDurable": {'das_log_durability_info{mode="weaker"}': "1+0x100"},
    "DasIngestRefused": {f'das_request_duration_seconds_count{{{POSTS},code="507"}}': "_x50 1+2x50"},
    "DasServerErrors": {f'das_request_duration_seconds_count{{{POSTS},code="500"}}': "_x90 1+0x10"},
    "DasRowsRejected": {f'das_ingest_rows_total{{{DAS},result="rejected",reason="not_finite"}}': "0+500x100"},
    "DasConflictingExamples": {f"das_conflicting_examples_total{{{DAS}}}": "3+0x50 4+0x49"},
    "DasLogOld": {f'das_log_oldest_age_seconds{{job="api",{DAS},kind="examples"}}': "0+60x100"},
    "DasDeadLetters": {f"das_dead_letters{{{TEACHER}}}": "0+0x50 1+0x49"},
    "DasDeadChunks": {f'das_dead_chunks_total{{{DAS},kind="examples"}}': "_x90 1+0x10"},
    "DasCommitSlow": {f'das_commit_seconds_bucket{{{DAS},table="examples",le="0.5"}}': "0+1x100",
                      f'das_commit_seconds_bucket{{{DAS},table="examples",le="10.0"}}': "0+10x100"},
    "DasManyFiles": {f'das_table_files{{{DAS},table="examples"}}': "30000+0x100"},
    "DasCoverageLow": {f"das_coverage_ratio{{{TEACHER}}}": "0.5+0x100"},
    "DasSnapshotOld": {f"das_freshness_gap_seconds{{{TEACHER}}}": "90000+0x100"},
    "DasSnapshotStuck": {f'das_snapshot_info{{{TEACHER},snapshot="s2",state="validating"}}': "1+0x100"},
}  # fmt: skip


pytestmark = needs_prometheus


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PROMTOOL), *arguments], capture_output=True, text=True, timeout=60, check=False)


def firing(name: str | None, series: dict[str, str | None]) -> dict[str, Any]:
    """One case for promtool: the series differ so from WELL, and of all alerts this one fires, or none."""
    found = {series: values for series, values in {**WELL, **series}.items() if values is not None}
    expected = [] if name is None else [{"labels": f'{{alertname="{name}"}}', "value": 1}]
    return {
        "name": str(name),
        "interval": "1m",
        "input_series": [{"series": series, "values": values} for series, values in found.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{AT_MINUTE}m",
                "exp_samples": expected,
            }
        ],
    }


def judge(tmp_path: Path, case: dict[str, Any]) -> str:
    """Give what promtool has against a case."""
    file = tmp_path / "case.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": [case]}))
    done = promtool("test", "rules", str(file))
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.parametrize("file", ["prometheus.yml", "alerts.yml"])
def test_promtool_finds_nothing_wrong(file: str) -> None:
    kind = "config" if file == "prometheus.yml" else "rules"
    done = promtool("check", kind, str(DOCKERFILE.parent / file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_alert_fires_while_all_is_well(tmp_path: Path) -> None:
    assert judge(tmp_path, firing(None, {})) == ""


def test_every_alert_is_tried() -> None:
    assert list(WRONG) == [rule["alert"] for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]]


@pytest.mark.parametrize("name", WRONG)
def test_an_alert_fires_for_what_it_names_and_no_other_does(name: str, tmp_path: Path) -> None:
    assert judge(tmp_path, firing(name, WRONG[name])) == ""


def test_a_worker_that_nobody_needs_is_not_missed(tmp_path: Path) -> None:
    nothing_to_score = {'up{job="worker"}': None, next(s for s in WELL if s.startswith("das_snapshot_info")): None}
    assert judge(tmp_path, firing(None, nothing_to_score)) == ""
