"""I1, I2, I5 under SIGKILL: twenty kills, at least four of each role, each with requests in flight."""

from pathlib import Path

from tests.faults.kills import run


def test_twenty_kills_lose_double_and_alter_nothing(tmp_path: Path) -> None:
    record = run(seed=7, kills=20, folder=tmp_path)
    found = {key: record[key] for key in ("lost", "duplicated", "altered", "unaccounted", "dead_letters")}
    assert found == {"lost": 0, "duplicated": 0, "altered": 0, "unaccounted": 0, "dead_letters": 0}
    assert record["kills_by_role"] == {"api": 5, "worker": 5, "sink": 5, "valkey": 5}
    assert record["acked_rows"] > 50_000
