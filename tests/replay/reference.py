"""The replay by hand: which rows a trainer must get, and which labels are late. Lists and loops.

States anew what docs/contract.md (sections 4, 5 and 12) and docs/adr/0008-closing.md say. Shares no code with the
service.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, TypeAlias

import xxhash

from tests.replay.stream import (
    BUY_WINDOW,
    CLICK_WINDOW,
    EARLY,
    LATENESS,
    MINUTE,
    PARTITIONS,
    Example,
    Label,
    Step,
    Teacher,
)

WINDOWS = {"click": CLICK_WINDOW, "buy": BUY_WINDOW}
SILENT = {"click": 0.0, "buy": None}
LONGEST = max(WINDOWS.values())
CREEP = 15 * MINUTE  # watermarks run on with the clock while nothing comes: a test may take so long
LateLabel: TypeAlias = "tuple[str, datetime, float | None, float | None]"


@dataclass(slots=True, kw_only=True)
class Known:
    """A distinct example. closed_in: the step in which it was closed; labels_seen: how many had been said by then."""

    example: Example
    teacher: Teacher
    is_late: bool
    posted_in: int
    closed_in: int | None = None
    labels_seen: int = 0
    click: float | None = None
    buy: float | None = None


class Reference:
    """Takes the steps one by one."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, date], Known] = {}
        self.said: list[Label] = []
        self.closed: list[Known] = []
        self.step = -1
        self._latest: dict[int, datetime] = {}

    def take(self, step: Step) -> list[Known]:
        """Give what is closed in a step, by event_time and example_id."""
        self.step += 1
        self._hear([label for request in step.labels for label in request])
        for request in step.examples:
            self._post(request, step.teacher)
        return self._close()

    def _hear(self, labels: Sequence[Label]) -> None:
        self.said = list(dict.fromkeys([*self.said, *labels]))  # what says the same again is dropped

    def _post(self, examples: Sequence[Example], teacher: Teacher) -> None:
        before = dict(self._latest)
        for example in examples:
            partition = partition_of(example.example_id)
            latest = before.get(partition)
            identity = (example.example_id, example.event_time.date())
            if identity not in self.known:
                is_late = latest is not None and example.event_time < latest - LATENESS
                self.known[identity] = Known(example=example, teacher=teacher, is_late=is_late, posted_in=self.step)
            self._latest[partition] = max(example.event_time, self._latest.get(partition, example.event_time))

    def _close(self) -> list[Known]:
        watermarks = {partition: latest - LATENESS for partition, latest in self._latest.items()}
        last = max(watermarks.values()) + CREEP
        due = []
        for known in self.known.values():
            over_at = known.example.event_time + LONGEST
            if known.closed_in is None and over_at < watermarks[partition_of(known.example.example_id)]:
                due.append(known)
            else:
                assert known.closed_in is not None or over_at >= last, "the clock would decide: mend the stream"
        due.sort(key=lambda known: (known.example.event_time, known.example.example_id))
        for known in due:
            known.closed_in, known.labels_seen = self.step, len(self.said)
            known.click, known.buy = self._label(known, "click"), self._label(known, "buy")
        self.closed += due
        return due

    def _label(self, known: Known, task: str) -> float | None:
        """Give the value with the latest label_time in the window, of those the last in the log."""
        found, found_at = SILENT[task], datetime.min.replace(tzinfo=UTC)
        for label in self.said:
            if label.example_id != known.example.example_id or not _counts(known, label, task):
                continue
            if getattr(label, task) is not None and label.label_time >= found_at:
                found, found_at = getattr(label, task), label.label_time
        return found

    def late_labels(self) -> list[LateLabel]:
        """Give every label that a closed example was closed without."""
        late = []
        for known in self.closed:
            for place, label in enumerate(self.said):
                if label.example_id != known.example.example_id:
                    continue
                unused = {
                    task: getattr(label, task)
                    for task in WINDOWS
                    if place >= known.labels_seen or not _counts(known, label, task)
                }
                if any(value is not None for value in unused.values()):
                    late.append((label.example_id, label.label_time, unused.get("click"), unused.get("buy")))
        return sorted(late, key=repr)


def _counts(known: Known, label: Label, task: str) -> bool:
    after = label.label_time - known.example.event_time
    return -EARLY <= after <= WINDOWS[task]


def partition_of(example_id: str) -> int:
    """Give the partition of an id (docs/contract.md, section 12)."""
    return int.from_bytes(xxhash.xxh3_128_digest(example_id.encode())[8:], "little") % PARTITIONS


def is_leaky(known: Known) -> bool:
    return known.teacher.trained_through > known.example.event_time


def delivered(known: Known) -> dict[str, Any]:
    """Give a closed row as a trainer must get it."""
    example, teacher = known.example, known.teacher
    logits = dict.fromkeys(WINDOWS) if is_leaky(known) else teacher.logits(example)
    return {
        "example_id": example.example_id,
        "event_time": example.event_time,
        "price": example.price,
        "coin": example.coin,
        "user_id": example.user_id,
        "item": example.item,
        "click": known.click,
        "buy": known.buy,
        "is_late": known.is_late,
        "teacher__status": "leaky" if is_leaky(known) else "present",
        "teacher__snapshot_id": None if is_leaky(known) else teacher.snapshot_id,
        "teacher__trained_through": None if is_leaky(known) else teacher.trained_through,
        "teacher__click__logit": logits["click"],
        "teacher__buy__logit": logits["buy"],
    }


def expected_steps(steps: Sequence[Step]) -> tuple[Reference, list[list[Known]]]:
    """Give the reference after all steps, and what each closes."""
    reference = Reference()
    return reference, [reference.take(step) for step in steps]
