"""What is written down, fsynced, beside the tables about the logs: which there are, and how far each table has them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from das_service.folder import Folder
from schemas.entries import Position, parse_position

EXAMPLES = "examples"
LABELS = "labels"
DATASET_LOGS = (EXAMPLES, LABELS)
LOGS_FORMAT = 1
MARK_FORMAT = 1
SHADOW_ROWS = "shadow_rows"
BACKFILL_ROWS = "backfill_rows"


def scored_log(fm: str) -> str:
    """Kind of the log that an FM's workers publish to."""
    return f"scored:{fm}"


def dead_log(fm: str) -> str:
    """Kind of the log of an FM's dead letters."""
    return f"dead:{fm}"


def rescore_log(fm: str) -> str:
    """Kind of the log of examples that an FM shall score again or late."""
    return f"rescore:{fm}"


def fm_logs(fm: str) -> tuple[str, ...]:
    """Kinds of the logs that an FM needs."""
    return (rescore_log(fm), scored_log(fm), dead_log(fm))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogsFile:
    """`<dataset>/_das/logs.json`: which logs exist, and in which epoch. Written after they are made."""

    epoch: int
    partitions: int
    logs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """`<dataset>/_das/<table>.durable`: what of a table is on disk. Written last in a commit, before the log is freed.

    positions: per partition the last committed position of the table's log, None before the first. mended: rows of
    supervision whose example had been a dead letter, or dead letters of scored examples (a repeat that raced).
    diverted: rows that the table would not take, in `dead_chunks`. numbers: what the table remembers by name besides,
    such as the latest event_time of a partition.
    """

    version: int
    positions: dict[int, Position | None]
    rows: int = 0
    duplicates: int = 0
    conflicting: int = 0
    mended: int = 0
    diverted: int = 0
    numbers: Mapping[str, int] = field(default_factory=dict)

    @property
    def outcome_rows(self) -> int:
        """Rows less those of shadows and of backfills, which are nobody's outcome."""
        return self.rows - self.numbers.get(SHADOW_ROWS, 0) - self.numbers.get(BACKFILL_ROWS, 0)

    @property
    def epoch(self) -> int:
        """The latest epoch that a position is of, 0 if there is none."""
        return max((at.epoch for at in self.positions.values() if at is not None), default=0)


def read_logs_file(folder: Folder, dataset: str) -> LogsFile | None:
    """Give what is recorded of a dataset's logs, None before they are made."""
    data = folder.read(f"{dataset}/_das/logs.json")
    if data is None:
        return None
    record = json.loads(data)
    return LogsFile(epoch=record["epoch"], partitions=record["partitions"], logs=tuple(record["logs"]))


def write_logs_file(folder: Folder, dataset: str, logs: LogsFile) -> None:
    """Record a dataset's logs durably."""
    record = {"format": LOGS_FORMAT, "epoch": logs.epoch, "partitions": logs.partitions, "logs": list(logs.logs)}
    folder.write(f"{dataset}/_das/logs.json", json.dumps(record, indent=1).encode())


def mark_name(dataset: str, table: str) -> str:
    """Give the name of a table's durable mark."""
    return f"{dataset}/_das/{table.replace('/', '.')}.durable"


def read_mark(folder: Folder, dataset: str, table: str) -> Mark | None:
    """Give a table's durable mark, None before its first commit."""
    data = folder.read(mark_name(dataset, table))
    if data is None:
        return None
    record = json.loads(data)
    positions = {int(p): None if entry is None else parse_position(entry) for p, entry in record["positions"].items()}
    return Mark(
        version=record["version"],
        positions=positions,
        rows=record["rows"],
        duplicates=record["duplicates"],
        conflicting=record["conflicting"],
        mended=record.get("mended", 0),
        diverted=record.get("diverted", 0),
        numbers=record.get("numbers", {}),
    )


def write_mark(folder: Folder, dataset: str, table: str, mark: Mark) -> None:
    """Record durably that a table's version and positions are on disk."""
    record = {
        "format": MARK_FORMAT,
        "version": mark.version,
        "positions": {str(p): None if at is None else at.entry_id for p, at in mark.positions.items()},
        "rows": mark.rows,
        "duplicates": mark.duplicates,
        "conflicting": mark.conflicting,
        "mended": mark.mended,
        "diverted": mark.diverted,
        "numbers": dict(mark.numbers),
    }
    folder.write(mark_name(dataset, table), json.dumps(record).encode())


def table_of_log(kind: str) -> str | None:
    """Give the table that the sink writes a log to; a rescore log has none."""
    name, _, fm = kind.partition(":")
    return {EXAMPLES: EXAMPLES, LABELS: LABELS, "scored": f"supervision/{fm}", "dead": f"dead_letters/{fm}"}.get(name)


def ready_name(partition: int) -> str:
    """Name under which a table remembers the next ready_seq of a partition; `late_labels`: the next to look at."""
    return f"ready_seq/{partition}"


def watermark_name(partition: int) -> str:
    """Name under which `closed` remembers up to which watermark a partition is closed, in microseconds."""
    return f"watermark/{partition}"
