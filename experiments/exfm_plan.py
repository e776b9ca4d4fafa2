"""What the ExFM experiment runs: weeks, teachers, students, methods, and every cell of both slices of the factorial.

Weeks: the teachers and the students begin on `first`; what a method is tuned on is `tune`, what is reported is
`report`. A teacher takes its next place every `rotate_weeks`. With a lag of L weeks rows are scored by the snapshot
that was the newest L weeks before; `FROZEN` is the one of the last week before the report, throughout.

A cell is one student trained once over the weeks of the tuning, to warm up, and those of the report; paired cells share
the seed. Settings are chosen on all but the first `rotate_weeks` of the weeks of the tuning: the learning rates on
labels alone, and at these rates, which are best for labels alone, as many settings of each method as rates were tried.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal

from experiments.teacher import TeacherSize

FROZEN: Final = "frozen"
Lag = int | Literal["frozen"]
METHODS: Final = ("none", "single", "ah", "ah_scaled", "ah_sa", "single_sa")
TEACHERS: Final = {
    "small": TeacherSize(width=2, hidden=(24, 16)),
    "middle": TeacherSize(),
    "large": TeacherSize(width=32, hidden=(512, 256)),
}
MIDDLE: Final = "middle"
PEEK, PEEK_UNGUARDED = "peek", "peek_unguarded"
STUDENTS: Final = ("small", "large")
_CODE: Final = (
    "exfm", "exfm_cells", "exfm_plan", "exfm_serving", "exfm_students", "streaming", "students", "teacher",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Knobs:
    """What is tuned, by method. weight: of distillation; adapter: of the term on the adapted logit.

    table_rate (Adagrad) and layer_rate (Adam) are learning rates.
    """

    weight: float = 1.0
    alpha: float = 1.0
    beta: float = 1.0
    adapter_weight: float = 1.0
    table_rate: float = 0.1
    layer_rate: float = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One student, trained by one method on what one teacher said. fm is the teacher's name in the service."""

    method: str
    student: str
    seed: int
    fm: str = ""
    lag: Lag | None = None
    teacher_size: str | None = None
    control: str | None = None

    @property
    def warm_fm(self) -> str:
        """The FM of the weeks before the report: a teacher that lags has been a fresh one until then."""
        return self.fm if self.control is not None else self.teacher_size or ""

    def key(self, knobs: Knobs) -> str:
        """Give a name of its file: the same cell at other settings is another file."""
        text = json.dumps([asdict(self), asdict(knobs)], sort_keys=True)
        return f"{self.method}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which weeks, and how much of the factorial."""

    first: range = range(1, 15)
    tune: range = range(15, 27)
    report: range = range(27, 54)
    rotate_weeks: int = 4
    lags: tuple[Lag, ...] = (0, 4, 12, FROZEN)
    sizes: tuple[str, ...] = ("small", "middle", "large")
    students: tuple[str, ...] = STUDENTS
    seeds: range = range(5)
    tune_seeds: range = range(1)
    trials: int = 8
    slices: tuple[str, ...] = ("display", "mailer", "department GROCERY", "department DRUG GM")

    def boundaries(self) -> list[int]:
        """Give the weeks after which a teacher is published."""
        return list(range(self.first[-1], self.report[-1], self.rotate_weeks))

    def first_counted_of_tune(self) -> int:
        """Give the first week that counts when settings are chosen; a method warms up before."""
        return self.tune[0] + min(self.rotate_weeks, len(self.tune) // 2)

    def part_after(self, boundary: int) -> range:
        """Give the weeks that the snapshots of a boundary score."""
        return range(boundary + 1, min(boundary + self.rotate_weeks, self.report[-1]) + 1)

    def source(self, lag: Lag, boundary: int) -> int:
        """Give the boundary whose snapshot scores behind this one at that lag."""
        return self.tune[-1] if lag == FROZEN else boundary - lag

    def lag_fms(self) -> dict[str, Lag]:
        """Give the FMs of the middle teacher that lag."""
        return {fm_name(MIDDLE, lag): lag for lag in self.lags if lag != 0}

    def cells(self) -> Iterator[Cell]:
        """Give every cell of both slices, and of the controls."""
        for student, seed in itertools.product(self.students, self.seeds):
            yield Cell(method="none", student=student, seed=seed)
            for method in METHODS[1:]:
                for size, lag in self._teachers():
                    yield Cell(
                        method=method, student=student, seed=seed, fm=fm_name(size, lag), lag=lag, teacher_size=size
                    )
            yield from self._controls(student, seed)

    def _teachers(self) -> list[tuple[str, Lag]]:
        return [(MIDDLE, lag) for lag in self.lags] + [(size, 0) for size in self.sizes if size != MIDDLE]

    def _controls(self, student: str, seed: int) -> Iterator[Cell]:
        wanted = [("single_sa", MIDDLE, "constant")]
        wanted += [(method, MIDDLE, "shuffled") for method in METHODS[1:]]
        for method in ("single", "ah"):
            wanted += [(method, PEEK, PEEK), (method, PEEK_UNGUARDED, PEEK_UNGUARDED)]
        for method, fm, control in wanted:
            yield Cell(
                method=method, student=student, seed=seed, fm=fm, lag=0, teacher_size=MIDDLE, control=control
            )  # fmt: skip


FULL: Final = Plan()
QUICK: Final = Plan(
    first=range(1, 4), tune=range(4, 6), report=range(6, 10), rotate_weeks=2, lags=(0, 2, FROZEN), sizes=("middle",),
    students=("small",), seeds=range(2), trials=1, slices=("display", "mailer"),
)  # fmt: skip


def fingerprint(plan: Plan) -> str:
    """Give a digest of the plan and of the code that what is kept comes from: the same run, or another one."""
    root = Path(__file__).parents[1]
    code = [
        *(root / "experiments" / f"{name}.py" for name in _CODE),
        *sorted((root / "experiments" / "data").glob("*.py")),
        *sorted((root / "vm_training").rglob("*.py")),
    ]
    digest = hashlib.sha256(repr(plan).encode())
    for path in code:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def fm_name(size: str, lag: Lag) -> str:
    """Give the name of a teacher in the service."""
    return size if lag == 0 else f"{size}_{FROZEN}" if lag == FROZEN else f"{size}_lag{lag}"


def rates(count: int) -> tuple[Knobs, ...]:
    """Give the learning rates that are tried on labels alone; the first are the plain ones."""
    grid = ((0.1, 1e-2), (0.2, 1e-2), (0.4, 1e-2), (0.1, 3e-3), (0.2, 3e-3), (0.4, 3e-3), (0.1, 3e-2), (0.2, 3e-2))
    return tuple(Knobs(table_rate=table, layer_rate=layer) for table, layer in grid)[:count]


def trials(method: str, base: Knobs, count: int) -> tuple[Knobs, ...]:
    """Give the settings that are tried of a method, as many of each, at the learning rates of labels alone (base).

    The first is the plain form.
    """
    weights = [{"weight": weight} for weight in (1.0, 0.3, 0.1, 0.03, 3.0, 10.0, 2.0, 0.2)]
    pairs = ((1, 1), (0.3, 0.3), (1, 0.3), (0.3, 1), (3, 1), (1, 3), (3, 3), (0.1, 1))
    scalings = (
        (1, 1, 1), (1, 1, 3), (1, 1, 0.3), (1, 2, 1), (1, 0.5, 1), (1, 2, 3), (1, 3, 0.3), (10, 5, 20),
    )  # fmt: skip
    grid = {
        "single": weights,
        "single_sa": weights,
        "ah": weights,
        "ah_sa": [{"weight": weight, "adapter_weight": other} for weight, other in pairs],
        "ah_scaled": [{"weight": weight, "alpha": alpha, "beta": beta} for weight, alpha, beta in scalings],
    }
    return tuple(replace(base, **changes) for changes in grid[method][:count])
