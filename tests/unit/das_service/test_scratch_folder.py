"""Scratch folders of processes that end, are killed, or live on."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from das_service.scratch_folder import ScratchFolder
from das_service.tables.duck import Duck
from tests.conftest import ROOT

PROGRAM = """
import sys
from pathlib import Path
from das_service.scratch_folder import ScratchFolder
kept = ScratchFolder(sys.argv[1], parent=Path(sys.argv[2]) if sys.argv[2:] else None)
(kept.path / "data").write_text("something")
print(kept.path, flush=True)
input()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def start(place: Path, *arguments: str) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *(arguments or ("das-try-",))], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(place)},
    )  # fmt: skip
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_killed_process_s_folder_goes_with_the_next_and_a_living_one_s_stays(place: Path) -> None:
    (killed, gone), (living, kept) = start(place), start(place)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert gone.exists()
    stranger = place / "das-other-1"
    stranger.mkdir()
    mine = ScratchFolder("das-try-")
    assert (gone.exists(), (kept / "data").exists(), stranger.exists()) == (False, True, True)
    living.communicate("\n")
    assert not kept.exists()  # its process ended
    mine.close()
    mine.close()
    assert not mine.path.exists()


def test_a_folder_beside_something_is_taken_away_there_whatever_the_name(place: Path) -> None:
    prefix = ".a[b]*.das-"
    (place / "beside").mkdir()
    killed, gone = start(place, prefix, str(place / "beside"))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert gone.parent == place / "beside"
    other = place / "beside" / ".ab.das-12345678"
    other.mkdir()
    (other / ".lock").touch()

    mine = ScratchFolder(prefix, parent=place / "beside")

    assert sorted((place / "beside").iterdir()) == sorted([mine.path, other])
    mine.close()


def test_where_there_are_no_locks_nobody_takes_a_folder_for_abandoned(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first = ScratchFolder("das-try-")
    assert list(first.path.iterdir()) == []
    monkeypatch.undo()

    second = ScratchFolder("das-try-", parent=place)

    assert first.path.exists()
    first.close()
    second.close()
    assert list(place.iterdir()) == []


def test_what_duckdb_spilled_goes_too(place: Path) -> None:
    duck = Duck(memory_bytes=64 << 20, threads=1)
    (folder,) = place.glob("das-duckdb-*")
    with duck.cursor() as cursor:
        cursor.execute("SELECT i, hash(i)::VARCHAR AS word FROM range(3_000_000) AS t(i) ORDER BY word")
        assert cursor.fetchone() is not None
        assert [path.name for path in folder.iterdir() if path.name != ".lock"]
    duck.close()
    assert not list(place.iterdir())
