"""Takes registered snapshots from `validating` to `validated` or `rejected`, one at a time, beside the scoring.

Only what is wrong with a snapshot itself rejects it. Where the store, the disk or the memory fails, the snapshot stays
`validating`, its reasons say why, and it is tried again, by whichever worker comes first.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from das_service.audit import AuditAction, Note
from das_service.beats import Peer
from das_service.folder import Folder
from das_service.registry import (
    Catalog,
    FmRecord,
    Registry,
    SnapshotRecord,
    fm_field,
    snapshot_field,
)
from das_service.scratch_folder import ScratchFolder
from das_service.snapshot_folder import SnapshotError, read_manifest
from fm_inference.labelled_slice import Slice, write_slice
from fm_inference.repository import Repository
from fm_inference.validate import Compared, Comparison, NoVerdictError, compare_snapshot, validate_snapshot
from schemas.gates import GateReport, SnapshotGates
from schemas.snapshot import Manifest, OutputColumns

log = logging.getLogger("das.worker")
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0
NOT_YET = "not judged yet, and tried again: "
_Key = tuple[str, str, str]


class _NotMineError(Exception):
    """Another worker validates it, or somebody has already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Who validates, and how it runs models. is_stopping: whether to give up; clock: monotonic seconds."""

    instance: str
    device: str
    bf16: bool
    is_stopping: Callable[[], bool]
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pause:
    seconds: float
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """A verdict: no reasons, and what the manifest says, for a good snapshot."""

    reasons: list[str]
    outputs: OutputColumns | None = None
    trained_through: datetime | None = None
    gate: GateReport | None = None


def waiting_snapshots(catalog: Catalog) -> list[tuple[str, str, SnapshotRecord]]:
    """Give (dataset, fm, snapshot) of all that await validation, the oldest first."""
    waiting = [
        (dataset, fm, record)
        for dataset, fms in catalog.snapshots.items()
        for fm, records in fms.items()
        for record in records.values()
        if record.state == "validating" and dataset in catalog.datasets and fm in catalog.fms.get(dataset, {})
    ]
    return sorted(waiting, key=lambda item: item[2].registered_at)


class Validator:
    """Validates for one worker; one thread."""

    def __init__(self, registry: Registry, repository: Repository, machine: Machine, tables: Folder) -> None:
        self._registry = registry
        self._tables = tables
        self._repository = repository
        self._machine = machine
        self._pauses: dict[_Key, _Pause] = {}

    def validate_next(self, catalog: Catalog, peers: Mapping[str, Peer]) -> bool:
        """Try the oldest waiting snapshot that is due and that no living worker is at; give whether there was one."""
        waiting = waiting_snapshots(catalog)
        keys = {(dataset, fm, record.snapshot_id) for dataset, fm, record in waiting}
        self._pauses = {key: pause for key, pause in self._pauses.items() if key in keys}
        for dataset, fm, record in waiting:
            pause = self._pauses.get((dataset, fm, record.snapshot_id))
            is_due = pause is None or self._machine.clock() >= pause.until
            if is_due and not self._is_taken(record, peers):
                try:
                    self._validate(catalog, dataset, fm, record)
                except _NotMineError:
                    continue
                return True
        return False

    def _is_taken(self, record: SnapshotRecord, peers: Mapping[str, Peer]) -> bool:
        other = peers.get(record.validator or "")
        return record.validator not in {None, self._machine.instance} and other is not None and other.alive

    def _validate(self, catalog: Catalog, dataset: str, fm: str, record: SnapshotRecord) -> None:
        key = (dataset, fm, record.snapshot_id)
        taken = self._take(key, record)
        log.info("validating snapshot %s of %s/%s", record.snapshot_id, dataset, fm)
        try:
            judged = self._judge(catalog, dataset, fm, taken)
        except (OSError, NoVerdictError) as error:
            self._put_off(key, error)
            return
        if not judged.reasons and judged.outputs is not None:
            judged = self._with_outputs(dataset, fm, judged, judged.outputs)
        self._settle(key, judged)
        self._pauses.pop(key, None)

    def _take(self, key: _Key, seen: SnapshotRecord) -> SnapshotRecord:
        def update(stored: SnapshotRecord | None) -> SnapshotRecord:
            mine = {seen.validator, self._machine.instance}
            if stored is None or stored.state != "validating" or stored.validator not in mine:
                raise _NotMineError
            return stored.model_copy(update={"validator": self._machine.instance})

        return self._registry.change(snapshot_field(*key), SnapshotRecord, update)

    def _judge(self, catalog: Catalog, dataset: str, fm: str, record: SnapshotRecord) -> _Judged:
        sha256 = record.sha256.removeprefix("sha256:")
        try:
            with self._repository.borrowed(record) as folder:
                reasons = validate_snapshot(
                    folder,
                    catalog.spec(dataset),
                    fm=fm,
                    snapshot_id=record.snapshot_id,
                    sha256=sha256,
                    fixed_outputs=catalog.fm(dataset, fm).outputs,
                    device=self._machine.device,
                    bf16=self._machine.bf16,
                    is_stopping=self._machine.is_stopping,
                )
                if reasons:
                    return _Judged(reasons=reasons)
                manifest = read_manifest(folder, sha256=sha256)
                reasons, gate = self._pass_gate(catalog, dataset, fm, folder, sha256, manifest)
        except SnapshotError as error:
            return _Judged(reasons=error.reasons)
        return _Judged(
            reasons=reasons, outputs=manifest.outputs.columns(), trained_through=manifest.trained_through, gate=gate
        )

    def _pass_gate(
        self, catalog: Catalog, dataset: str, fm: str, folder: Path, sha256: str, manifest: Manifest
    ) -> tuple[list[str], GateReport | None]:
        """Give why a snapshot does too badly on recent labelled rows, and what was measured; None without a gate."""
        gates, active_id = catalog.spec(dataset).snapshot_gates, catalog.fm(dataset, fm).active
        if gates is None:
            return [], None
        if active_id is None:
            return [], GateReport(note="there is no active snapshot to compare with")
        with contextlib.closing(ScratchFolder("das-slice-")) as scratch:
            path = scratch.path / "slice.arrow"
            found = write_slice(
                self._tables, dataset, catalog.spec(dataset), path,
                since=manifest.trained_through, most_rows=gates.slice_rows,
            )  # fmt: skip
            if found.rows < gates.min_rows:
                return [], _report(active_id, found, note=_too_few(found, gates, manifest))
            compared = self._compare(catalog.snapshot(dataset, fm, active_id), folder, sha256, path, gates)
        report = _report(active_id, found)
        return list(compared.reasons), report.model_copy(update={"tasks": compared.tasks, "note": compared.note})

    def _compare(self, active: SnapshotRecord, folder: Path, sha256: str, path: Path, gates: SnapshotGates) -> Compared:
        with contextlib.ExitStack() as stack:
            try:
                active_folder = stack.enter_context(self._repository.borrowed(active))
            except SnapshotError as error:
                return Compared(note=f"the active snapshot can't be compared with: {error}")
            comparison = Comparison(
                folder=folder.absolute(), sha256=sha256, active_id=active.snapshot_id,
                active_folder=active_folder.absolute(), active_sha256=active.sha256.removeprefix("sha256:"),
                slice=path, gates=gates, device=self._machine.device, bf16=self._machine.bf16,
            )  # fmt: skip
            return compare_snapshot(comparison, is_stopping=self._machine.is_stopping)

    def _with_outputs(self, dataset: str, fm: str, judged: _Judged, outputs: OutputColumns) -> _Judged:
        """Fix the FM's outputs at its first validated snapshot; give reasons if another one fixed others meanwhile."""

        def update(stored: FmRecord | None) -> FmRecord:
            if stored is None:
                raise _NotMineError
            return stored if stored.outputs is not None else stored.model_copy(update={"outputs": outputs})

        fixed = self._registry.change(fm_field(dataset, fm), FmRecord, update).outputs
        if fixed == outputs:
            return judged
        return _Judged(
            gate=judged.gate, reasons=[f"the FM's outputs are fixed ({fixed}); other outputs are another FM"]
        )

    def _settle(self, key: _Key, judged: _Judged) -> None:
        state = "rejected" if judged.reasons else "validated"
        change = {
            "state": state, "reasons": tuple(judged.reasons), "trained_through": judged.trained_through,
            "gate": judged.gate,
        }  # fmt: skip
        self._change(key, change, what="reject" if judged.reasons else "validate")
        if judged.reasons:
            log.warning("snapshot %s of %s/%s is rejected: %s", key[2], *key[:2], "; ".join(judged.reasons))
        else:
            log.info("snapshot %s of %s/%s is validated", key[2], *key[:2])

    def _put_off(self, key: _Key, error: Exception) -> None:
        """Let the snapshot go, say why, and let this worker come back to it after a pause."""
        before = self._pauses.get(key)
        seconds = _FIRST_PAUSE_SECONDS if before is None else min(2 * before.seconds, _LONGEST_PAUSE_SECONDS)
        self._pauses[key] = _Pause(seconds=seconds, until=self._machine.clock() + seconds)
        log.warning("snapshot %s of %s/%s is tried again in %.0f s: %s", key[2], *key[:2], seconds, error)
        self._change(key, {"validator": None, "reasons": (f"{NOT_YET}{error}",)})

    def _change(self, key: _Key, change: Mapping[str, object], *, what: AuditAction | None = None) -> None:
        """Change a snapshot that is still validating. what: how the audit log calls it, None for no entry."""

        def update(stored: SnapshotRecord | None) -> SnapshotRecord:
            if stored is None:
                raise _NotMineError
            return stored if stored.state != "validating" else stored.model_copy(update=dict(change))

        def note(_: SnapshotRecord) -> Note:
            dataset, fm, snapshot_id = key
            who = self._machine.instance
            return Note(dataset=dataset, fm=fm, who=who, what=what or "validate", snapshot_id=snapshot_id)

        self._registry.change(snapshot_field(*key), SnapshotRecord, update, note=None if what is None else note)


def _report(active_id: str, found: Slice, *, note: str = "") -> GateReport:
    return GateReport(active=active_id, rows=found.rows, first=found.first, last=found.last, note=note)


def _too_few(found: Slice, gates: SnapshotGates, manifest: Manifest) -> str:
    return (
        f"not compared with the active snapshot: {found.rows} labelled rows have an event_time at or after its "
        f"trained_through ({manifest.trained_through.isoformat()}), {gates.min_rows} are needed "
        "(snapshot_gates.min_rows)"
    )
