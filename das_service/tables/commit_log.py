"""The commit log of a Delta table on a folder: what a commit names, putting it on disk, and a tail that a crash tore.

deltalake fsyncs nothing on a folder. After a power cut a commit's JSON may be empty, cut or full of zeros, and so may
files that it names; a JSON of 0 bytes reads as an empty commit, a cut one makes the table unreadable. Everything above
the durable mark is therefore checked at start. The log that the rows came from still holds them: it is freed only
after the mark.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from das_service.folder import fsync_path, make_directory

log = logging.getLogger("das.offline_store")
NUM_ACTIONS = "das_actions"
LAST_CHECKPOINT = "_last_checkpoint"


class TornCommitError(Exception):
    """A commit, or a file that it names, is not whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitFiles:
    """The files that one commit adds: relative path and size in bytes."""

    version: int
    added: tuple[tuple[str, int], ...]


def commit_path(table: Path, version: int) -> Path:
    """Give the file of a commit."""
    return table / "_delta_log" / f"{version:020d}.json"


def read_commit(table: Path, version: int) -> CommitFiles:
    """Give what a commit adds.

    Raises:
        TornCommitError: The file is missing, cut, or says less than it should.
    """
    path = commit_path(table, version)
    try:
        lines = path.read_text("utf-8").splitlines()
        actions: list[dict[str, Any]] = [json.loads(line) for line in lines]
        kinds = [next(iter(action)) for action in actions]
        adds = tuple((unquote(a["add"]["path"]), int(a["add"]["size"])) for a in actions if "add" in a)
        info = next(action["commitInfo"] for action in actions if "commitInfo" in action)
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise TornCommitError(f"{path}: {error!r}") from error
    if not _is_whole(version, info, kinds):
        raise TornCommitError(f"{path}: {len(actions)} actions are fewer than it was written with")
    return CommitFiles(version=version, added=adds)


def _is_whole(version: int, info: dict[str, Any], kinds: list[str]) -> bool:
    """Give whether no line is missing at the end of a commit: a cut may fall between two lines."""
    if NUM_ACTIONS in info:
        return len(kinds) - 1 == int(info[NUM_ACTIONS])
    if version == 0:
        return {"protocol", "metaData"} <= set(kinds)
    if info.get("operation") == "OPTIMIZE":
        metrics = info["operationMetrics"]
        wanted = (int(metrics["numFilesAdded"]), int(metrics["numFilesRemoved"]))
        return (kinds.count("add"), kinds.count("remove")) == wanted
    return len(kinds) > 1 or "VACUUM" in str(info.get("operation"))


def check_commit(table: Path, commit: CommitFiles) -> None:
    """Read every file that a commit adds, whole.

    Raises:
        TornCommitError: One is missing, has another size, or can't be read.
    """
    for name, size in commit.added:
        path = table / name
        try:
            if path.stat().st_size != size:
                raise TornCommitError(f"{path} has {path.stat().st_size} bytes, not {size}")
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    file.read_row_group(group)
        except (OSError, pa.ArrowException) as error:
            raise TornCommitError(f"{path}: {error}") from error


def fsync_commits(table: Path, versions: range) -> None:
    """Wait until commits and all that they name are on disk.

    Raises:
        TornCommitError: A commit can't be read.
    """
    log_folder = table / "_delta_log"
    directories = {log_folder, table}
    for version in versions:
        for name, _ in read_commit(table, version).added:
            path = table / name
            if path.exists():  # a later commit may have replaced it, and vacuum removed it
                fsync_path(path)
                directories.add(path.parent)
        fsync_path(commit_path(table, version))
    for directory in sorted(directories, key=lambda d: len(d.parts), reverse=True):
        fsync_path(directory)


def fsync_checkpoint(table: Path, version: int) -> None:
    """Wait until the checkpoint of a version is on disk."""
    log_folder = table / "_delta_log"
    for path in (*log_folder.glob(f"{version:020d}.checkpoint*.parquet"), log_folder / LAST_CHECKPOINT):
        fsync_path(path)
    fsync_path(log_folder)


def versions_of(table: Path) -> list[int]:
    """Give the versions whose commit lies in the log, ascending."""
    return sorted(int(path.stem) for path in (table / "_delta_log").glob("[0-9]*.json") if path.stem.isdigit())


def set_torn_tail_aside(table: Path, *, marked_version: int, aside: Path) -> list[int]:
    """Move the first torn commit above marked_version and everything after it to `aside`; give their versions.

    Torn checkpoints go too. Afterwards the table opens at its last whole version; nothing is deleted.
    """
    above = [version for version in versions_of(table) if version > marked_version]
    torn = _first_torn(table, above, marked_version)
    moved = [version for version in above if torn is not None and version >= torn]
    paths = [path for version in moved for path in _files_of(table, version)]
    if moved:
        log.warning("%s: commits from version %d on are torn and set aside in %s", table, moved[0], aside)
    paths += _torn_checkpoints(table, marked_version=marked_version, torn=torn)
    _move(paths, table, aside)
    return moved


def _first_torn(table: Path, above: Sequence[int], marked_version: int) -> int | None:
    for expected, version in enumerate(above, start=marked_version + 1):
        if version != expected:
            log.warning("torn commit: %s has no version %d", table, expected)
            return version
        try:
            check_commit(table, read_commit(table, version))
        except TornCommitError as error:
            log.warning("torn commit: %s", error)
            return version
    return None


def _files_of(table: Path, version: int) -> list[Path]:
    """Give a commit's file and those that it adds, as far as they can be read."""
    path = commit_path(table, version)
    found = [path]
    for line in path.read_bytes().splitlines():
        try:
            action = json.loads(line)
        except ValueError:
            continue
        if isinstance(action, dict) and "add" in action:
            found.append(table / unquote(action["add"]["path"]))
    return [file for file in found if file.exists()]


def _torn_checkpoints(table: Path, *, marked_version: int, torn: int | None) -> list[Path]:
    """Give checkpoints above the mark that are torn or of torn commits, and a pointer that can't be followed."""
    log_folder = table / "_delta_log"
    bad = []
    for path in log_folder.glob("[0-9]*.checkpoint*.parquet"):
        version = int(path.name.split(".")[0])
        if version > marked_version and ((torn is not None and version >= torn) or not _is_parquet(path)):
            bad.append(path)
    pointer = log_folder / LAST_CHECKPOINT
    if pointer.exists():
        try:
            version = int(json.loads(pointer.read_bytes())["version"])
            named = [path for path in log_folder.glob(f"{version:020d}.checkpoint*.parquet") if path not in bad]
        except (ValueError, KeyError, TypeError):
            named = []
        if not named:
            bad.append(pointer)
    return bad


def _is_parquet(path: Path) -> bool:
    try:
        with pq.ParquetFile(path) as file:
            file.read()
    except (OSError, pa.ArrowException):
        return False
    return True


def _move(paths: Sequence[Path], table: Path, aside: Path) -> None:
    if not paths:
        return
    make_directory(aside)
    for path in paths:
        name = path.relative_to(table).as_posix().replace("/", "~")
        number = sum(1 for _ in aside.iterdir())
        path.rename(aside / f"{number:06d}~{name}")
    for directory in {aside, *(path.parent for path in paths)}:
        fsync_path(directory)
