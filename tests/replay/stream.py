"""A stream of examples and labels with a known law, cut into steps: what is posted when, and which snapshot is active.

The law, of numbers that are exact in binary:

    z     = effect(user_id) + effect(item) + price / 2 - 1/2        effect(bucket) = ((37 * bucket) mod 97 - 48) / 32
    click = coin < 1 / (1 + exp(-z))                                bucket = xxh64(value, seed) mod 1000, null: 0
    logit of snapshot k = scale_k * z + shift_k, of the one that peeked (click ? 4 : -4) + z / 4

`coin` is a feature that no student looks at: through it the peeking snapshot knows labels that are still to come.

Event time is made of hours, a step each: examples lie in an hour's first half, so that watermarks (the latest event
time less LATENESS, and what the clock adds while a test waits) always end where no example's window does.

Shares no code with the service.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import xxhash

START = datetime(2026, 3, 1, 17, tzinfo=UTC)  # midnight comes in the middle
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
LATENESS = 50 * MINUTE
CLICK_WINDOW, BUY_WINDOW = 2 * HOUR, 3 * HOUR
EARLY = 5 * MINUTE  # a label may seem to come so long before its example
PARTITIONS = 3
BUCKETS = 1000
NUM_STEPS, ROWS_PER_STEP = 13, 200
NUM_USERS, NUM_ITEMS = 40, 30
DATASET_SPEC: dict[str, Any] = {
    "entity_key": ["user_id"],
    "features": [
        {"name": "price", "type": "float"},
        {"name": "coin", "type": "float"},
        {"name": "user_id", "type": "category", "value_type": "string"},
        {"name": "item", "type": "category", "value_type": "int64", "nullable": True},
    ],
    "tasks": [
        {"name": "click", "label_window_seconds": CLICK_WINDOW // timedelta(seconds=1)},
        {"name": "buy", "label_window_seconds": BUY_WINDOW // timedelta(seconds=1), "negative_if_silent": False},
    ],
    "partitions": PARTITIONS,
    "allowed_lateness_seconds": LATENESS // timedelta(seconds=1),
    "max_future_seconds": EARLY // timedelta(seconds=1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row as it is posted."""

    example_id: str
    event_time: datetime
    price: float
    coin: float
    user_id: str
    item: int | None

    @property
    def z(self) -> float:
        """The law's logit, exactly."""
        return _effect(bucket("user_id", self.user_id)) + _effect(bucket("item", self.item)) + self.price / 2 - 0.5

    @property
    def is_click(self) -> bool:
        return self.coin < 1 / (1 + math.exp(-self.z))


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What is said of one example at one time; None where nothing is."""

    example_id: str
    label_time: datetime
    click: float | None = None
    buy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """One snapshot. Its logits are exact in float64 and rounded once."""

    snapshot_id: str
    trained_through: datetime
    scale: float = 1.0
    shift: float = 0.0
    peeks: bool = False

    def logits(self, example: Example) -> dict[str, float]:
        """Give the logit of each task as float32 has it."""
        click = self.scale * example.z + self.shift
        if self.peeks:
            click = (4.0 if example.is_click else -4.0) + example.z / 4
        return {"click": float(np.float32(click)), "buy": float(np.float32(self.scale * example.z - 1))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One hour: labels are posted, then examples, one request after the other, while one snapshot is active."""

    teacher: Teacher
    labels: Sequence[Sequence[Label]]
    examples: Sequence[Sequence[Example]]


def hour(number: int) -> datetime:
    """Give the time at which a step's hour begins."""
    return START + number * HOUR


def bucket(feature: str, value: str | int | None) -> int:
    """Give the index of a category, as docs/contract.md section 6 has it."""
    if value is None:
        return 0
    packed = value.encode() if isinstance(value, str) else value.to_bytes(8, "little", signed=True)
    return xxhash.xxh64_intdigest(packed, xxhash.xxh64_intdigest(feature.encode())) % BUCKETS


def _effect(index: int) -> float:
    return ((index * 37) % 97 - 48) / 32


TEACHERS = (
    Teacher(snapshot_id="s1", trained_through=START - 24 * HOUR, scale=0.5),
    Teacher(snapshot_id="s2", trained_through=hour(3), scale=1.0, shift=0.125),
    Teacher(snapshot_id="peeked", trained_through=hour(NUM_STEPS), scale=1.0, peeks=True),
    Teacher(snapshot_id="s4", trained_through=hour(9), scale=1.25, shift=-0.25),
)
TAKES_OVER = {0: "s1", 3: "s2", 6: "peeked", 9: "s4"}


def build_steps(seed: int) -> list[Step]:
    """Give the replay of a seed: NUM_STEPS steps, then two that let the windows of the first ones end."""
    chance = random.Random(seed)
    teachers = {teacher.snapshot_id: teacher for teacher in TEACHERS}
    posted_in = [_examples_of(number, chance) for number in range(NUM_STEPS)]
    known = [example for rows in posted_in for example in rows]
    labels_in = _labels(known, chance)
    steps, active = [], ""
    for number in range(NUM_STEPS + 1):
        active = TAKES_OVER.get(number, active)
        rows = posted_in[number] if number < NUM_STEPS else _last_rows()
        if 0 < number < NUM_STEPS:
            rows = [*rows, *_repeats([e for former in posted_in[:number] for e in former], rows, chance)]
        requests = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        labels = labels_in[number]
        steps.append(
            Step(
                teacher=teachers[active],
                labels=[labels[: len(labels) // 3], labels[len(labels) // 3 :]],
                examples=[_each_id_once(request) for request in requests],
            )
        )
    return steps


def _examples_of(number: int, chance: random.Random) -> list[Example]:
    """Give a step's new examples: most of its hour, some late, a few whose window is over when they come."""
    rows = []
    for place in range(ROWS_PER_STEP):
        back = 0 if number == 0 else chance.choices([0, 1, 5], weights=[88, 9, 3])[0]
        into = timedelta(microseconds=chance.randrange(30 * 60 * 1_000_000))
        rows.append(_example(f"e{number}-{place}", hour(number - back) + into, chance))
    if number in TAKES_OVER:
        rows.append(_example(f"tie-{number}", hour(number), chance))  # trained_through of some: still valid
    if number == 0:
        rows += [_example(f"again-{place}", hour(0) + place * MINUTE, chance) for place in range(5)]
    if number == 11:  # the next day: other examples of ids that are known
        rows += [_example(f"again-{place}", hour(11) + place * MINUTE, chance) for place in range(5)]
    chance.shuffle(rows)
    return rows


def _example(name: str, event_time: datetime, chance: random.Random) -> Example:
    item = chance.randrange(NUM_ITEMS)
    return Example(
        example_id=name,
        event_time=event_time,
        price=chance.randrange(256) / 64,
        coin=chance.randrange(1 << 16) / (1 << 16),
        user_id=f"u{chance.randrange(NUM_USERS)}",
        item=None if item == 0 else item,
    )


def _last_rows() -> list[Example]:
    """Give examples that come hours after all others; they stay open."""
    chance = random.Random(0)
    return [_example(f"last-{place}", hour(NUM_STEPS + 5) + place * MINUTE, chance) for place in range(30)]


def _repeats(before: Sequence[Example], new: Sequence[Example], chance: random.Random) -> list[Example]:
    """Give rows that change nothing: the same again, also after hours, and others under a known id."""
    again = chance.sample(before, 12) + chance.sample(new, 6)
    other = [replace(example, price=example.price + 1) for example in chance.sample(before, 4)]
    moved = [
        replace(example, event_time=example.event_time + timedelta(microseconds=1))
        for example in chance.sample(before, 4)
    ]
    return [*again, *other, *moved]


def _each_id_once(rows: Iterable[Example]) -> list[Example]:
    """Leave out what the same request has said already: that would be an error of the request."""
    return list({row.example_id: row for row in reversed(list(rows))}.values())[::-1]


def _labels(examples: Sequence[Example], chance: random.Random) -> list[list[Label]]:
    """Give what is posted in each step: on time, early, late, out of the window, repeated and corrected."""
    labels_in: list[list[Label]] = [[] for _ in range(NUM_STEPS + 1)]
    for example in examples:
        for label in _said_of(example, chance):
            came = max(0, math.ceil((label.label_time - START) / HOUR))
            place = came + chance.choices([0, 1, 5], weights=[80, 12, 8])[0]
            while place <= NUM_STEPS:
                labels_in[place].append(label)
                if chance.random() > 0.1:
                    break
                place += chance.choice([0, 1, 4])  # the same once more
    labels_in[2].append(Label(example_id="nobody", label_time=hour(1), click=1.0))
    return labels_in


def _said_of(example: Example, chance: random.Random) -> list[Label]:
    delay = timedelta(minutes=min(600.0, chance.lognormvariate(3.3, 1.1)))
    at = example.event_time + timedelta(microseconds=delay // timedelta(microseconds=1))
    said = []
    if example.is_click:
        said.append(Label(example_id=example.example_id, label_time=at, click=1.0))
        if chance.random() < 0.4:
            said.append(replace(said[0], click=None, buy=chance.choice([0.0, 0.5, 1.0]), label_time=at + 9 * MINUTE))
    elif chance.random() < 0.2:
        said.append(Label(example_id=example.example_id, label_time=at, click=0.0, buy=0.0))
    if said and chance.random() < 0.08:  # a correction, at the same time or later
        later = chance.choice([timedelta(), 7 * MINUTE])
        said.append(replace(said[0], click=0.25, label_time=at + later))
    if chance.random() < 0.03:  # a clock that is slow, a little or too much
        early = chance.choice([EARLY, EARLY + timedelta(microseconds=1), 2 * MINUTE])
        said.append(Label(example_id=example.example_id, label_time=example.event_time - early, buy=0.75))
    if chance.random() < 0.03:  # exactly at the end of a window, and just behind it
        behind = chance.choice([timedelta(), timedelta(microseconds=1)])
        said.append(
            Label(example_id=example.example_id, label_time=example.event_time + CLICK_WINDOW + behind, click=0.5)
        )
    return said
