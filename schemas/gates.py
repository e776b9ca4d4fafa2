"""What a new snapshot must reach on recent labelled examples before it may score, and what was measured of it."""

from datetime import datetime
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Ratio = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class SnapshotGates(BaseModel):
    """The bands of a dataset. min_rows: fewer labelled rows that the candidate has not trained on say nothing.

    max_ne_ratio: the candidate's NE / the active snapshot's. calibration: lowest and highest sum of predictions / sum
    of labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slice_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 50_000
    min_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 1_000
    max_ne_ratio: Ratio = 1.02
    calibration: tuple[Ratio, Ratio] = (0.8, 1.25)

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if self.min_rows > self.slice_rows:
            raise ValueError(f"snapshot_gates: min_rows {self.min_rows} is more than slice_rows {self.slice_rows}")
        if self.calibration[0] > self.calibration[1]:
            raise ValueError("snapshot_gates: calibration is [lowest, highest]")
        return self


class TaskGate(BaseModel):
    """One task on the slice, the candidate beside the active snapshot; null: it can't be said, `note` says why."""

    model_config = ConfigDict(frozen=True)

    rows: int
    ne: float | None = None
    active_ne: float | None = None
    ne_ratio: float | None = None
    calibration: float | None = None
    active_calibration: float | None = None
    note: str = ""


class GateReport(BaseModel):
    """What was measured of a snapshot before it was validated or rejected.

    rows: labelled examples with first <= event_time <= last, none before the candidate's trained_through. note: why
    nothing was measured, '' if it was.
    """

    model_config = ConfigDict(frozen=True)

    active: str | None = None
    rows: int = 0
    first: datetime | None = None
    last: datetime | None = None
    tasks: dict[str, TaskGate] = Field(default_factory=dict)
    note: str = ""
