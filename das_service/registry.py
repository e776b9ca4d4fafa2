"""The registry: declared datasets, FMs and snapshots. One hash in the server, changed by compare-and-swap.

A copy lies beside the tables (`_das/registry.json`, fsynced): `das recover` restores from it when the server lost its
own, and a server whose revision is behind it has been rewound.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal, TypeVar

import redis
import xxhash
from pydantic import BaseModel, ConfigDict

from das_service.audit import AUDIT_ENTRIES, Note, entry_text
from das_service.errors import ConflictError, UnavailableError, UnknownNameError
from das_service.folder import Folder
from das_service.redis_client import run_script
from schemas import keys
from schemas.dataset import DatasetSpec
from schemas.gates import GateReport
from schemas.snapshot import OutputColumns

COPY = "_das/registry.json"
SnapshotState = Literal["validating", "validated", "rejected", "active", "shadow", "retired"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    format: int = 1


class FmRecord(_Record):
    """A declared FM. snapshots: ids in the order of registration; their place is the number in online values.

    What may score is decided in this one record, so that no two decisions can contradict each other. shadow scores
    shadow_share of the examples beside the active one.
    """

    fm: str
    required: bool
    outputs: OutputColumns | None = None
    active: str | None = None
    was_active: tuple[str, ...] = ()
    shadow: str | None = None
    shadow_share: float = 0.0
    retired: tuple[str, ...] = ()
    activations: int = 0
    generation: int = 0
    snapshots: tuple[str, ...] = ()

    @property
    def etag(self) -> str:
        """Changes whenever the record does."""
        return f'"{xxhash.xxh64_hexdigest(self.model_dump_json().encode())}"'


class SnapshotRecord(_Record):
    """A registered snapshot. sha256 is that of its snapshot.json, which names the others'.

    Stored states are validating, validated and rejected; what is active, shadow or retired the FM's record says.
    """

    snapshot_id: str
    uri: str
    sha256: str
    state: SnapshotState = "validating"
    reasons: tuple[str, ...] = ()
    trained_through: datetime | None = None
    registered_at: datetime
    validator: str | None = None
    gate: GateReport | None = None


class Catalog(BaseModel):
    """The whole registry at one revision."""

    model_config = ConfigDict(frozen=True)

    revision: int
    datasets: dict[str, DatasetSpec]
    fms: dict[str, dict[str, FmRecord]]
    snapshots: dict[str, dict[str, dict[str, SnapshotRecord]]]

    def spec(self, dataset: str) -> DatasetSpec:
        """Give a dataset's declaration.

        Raises:
            UnknownNameError: It is not declared.
        """
        if dataset not in self.datasets:
            raise UnknownNameError("dataset", dataset, "; PUT /v1/datasets/{dataset} declares one")
        return self.datasets[dataset]

    def fm(self, dataset: str, fm: str) -> FmRecord:
        """Give an FM's record.

        Raises:
            UnknownNameError: The dataset or the FM is not declared.
        """
        self.spec(dataset)
        record = self.fms.get(dataset, {}).get(fm)
        if record is None:
            raise UnknownNameError("FM", fm, f" of dataset {dataset!r}")
        return record

    def snapshot(self, dataset: str, fm: str, snapshot_id: str) -> SnapshotRecord:
        """Give a snapshot's record, with the state `active`, `shadow` or `retired` where its FM's record says so.

        Raises:
            UnknownNameError: The dataset, the FM or the snapshot is not declared.
        """
        owner = self.fm(dataset, fm)
        record = self.snapshots.get(dataset, {}).get(fm, {}).get(snapshot_id)
        if record is None:
            raise UnknownNameError("snapshot", snapshot_id, f" of FM {fm!r}")
        return record.model_copy(update={"state": _state(owner, record)})

    def iter_fms(self) -> Iterator[tuple[str, FmRecord]]:
        """Give (dataset, FM record) pairs."""
        for dataset, fms in self.fms.items():
            for record in fms.values():
                yield dataset, record


def _state(owner: FmRecord, record: SnapshotRecord) -> SnapshotState:
    if owner.active == record.snapshot_id:
        return "active"
    if owner.shadow == record.snapshot_id:
        return "shadow"
    return "retired" if record.snapshot_id in owner.retired else record.state


def read_catalog(client: redis.Redis) -> Catalog:
    """Give the registry as it is now."""
    return parse_catalog({k.decode(): v.decode() for k, v in client.hgetall(keys.REGISTRY).items()})


def read_revision(client: redis.Redis) -> int:
    """Give the registry's revision: one small read that tells whether a cached catalog still holds."""
    return int(client.hget(keys.REGISTRY, "revision") or 0)


@contextmanager
def asked_revision(client: redis.Redis) -> Iterator[Callable[[], int]]:
    """Ask for the registry's revision now, and give what waits for the answer, to be called once."""
    pool = client.connection_pool
    connection = pool.get_connection()
    is_answered = False

    def answer() -> int:
        nonlocal is_answered
        reply = connection.read_response()
        is_answered = True
        return int(reply or 0)

    try:
        connection.send_command("HGET", keys.REGISTRY, "revision")
        yield answer
    finally:
        if not is_answered:
            connection.disconnect()  # else whoever gets it next would read our answer
        pool.release(connection)


def parse_catalog(fields: dict[str, str]) -> Catalog:
    """Give the catalog that the hash's fields spell."""
    datasets: dict[str, DatasetSpec] = {}
    fms: dict[str, dict[str, FmRecord]] = {}
    snapshots: dict[str, dict[str, dict[str, SnapshotRecord]]] = {}
    for field, text in sorted(fields.items()):
        match field.split("/"):
            case ["dataset", dataset]:
                datasets[dataset] = DatasetSpec.model_validate_json(text)
            case ["fm", dataset, fm]:
                fms.setdefault(dataset, {})[fm] = FmRecord.model_validate_json(text)
            case ["snapshot", dataset, fm, snapshot_id]:
                record = SnapshotRecord.model_validate_json(text)
                snapshots.setdefault(dataset, {}).setdefault(fm, {})[snapshot_id] = record
            case _:
                pass
    return Catalog(revision=int(fields.get("revision", 0)), datasets=datasets, fms=fms, snapshots=snapshots)


_R = TypeVar("_R", bound=BaseModel)


class Registry:
    """Reads and changes the registry, and keeps its copy beside the tables."""

    def __init__(self, client: redis.Redis, folder: Folder) -> None:
        self._client = client
        self._folder = folder

    def change(
        self,
        field: str,
        model: type[_R],
        update: Callable[[_R | None], _R],
        *,
        note: Callable[[_R], Note] | None = None,
    ) -> _R:
        """Give the record that `update` makes of the stored one, once it is stored and copied.

        `update` may be called again when somebody else was faster; what it raises goes to the caller. note: what the
        audit log says of the change, in the same atomic step.

        Raises:
            ConflictError: Others keep changing the record.
        """
        for _ in range(50):
            text = (self._client.hget(keys.REGISTRY, field) or b"").decode()
            stored = model.model_validate_json(text) if text else None
            wanted = update(stored)
            if stored is not None and wanted == stored:
                return wanted
            arguments: list[str | bytes | int] = [field, text, wanted.model_dump_json()]
            arguments += _audit_arguments(None if note is None else note(wanted), stored, wanted)
            if run_script(self._client, "swap", [keys.REGISTRY], arguments) >= 0:
                self.copy()
                return wanted
        raise ConflictError(f"{field} is being changed by others all the time; try again", code="busy")

    def copy(self) -> None:
        """Bring the copy beside the tables up to date; its revision never goes back.

        On an object store, where nothing can be locked, an older copy may land on a newer one: the next look of an API
        (LogGuard) finds it behind the server and copies again.
        """
        fields = {k.decode(): v.decode() for k, v in self._client.hgetall(keys.REGISTRY).items()}
        with self._folder.locked(COPY):  # the server is not asked in here: a new connection may look, and copy, itself
            if int(fields.get("revision", 0)) > int(self.read_copy().get("revision", 0)):
                self._folder.write(COPY, json.dumps(fields, indent=1, sort_keys=True).encode())

    def read_copy(self) -> dict[str, str]:
        """Give the fields as last copied, empty before the first."""
        data = self._folder.read(COPY)
        return {} if data is None else dict(json.loads(data))

    def check(self) -> None:
        """Compare the server's registry with the copy.

        Raises:
            UnavailableError: log_lost or log_rewound: the server knows less than the copy.
        """
        copied, actual = int(self.read_copy().get("revision", 0)), read_revision(self._client)
        if actual < copied:
            code = "log_lost" if actual == 0 else "log_rewound"
            raise UnavailableError(
                f"the server's registry is at revision {actual}, the copy beside the tables at {copied}: "
                "run `das recover`",
                code=code,
            )


def _audit_arguments(note: Note | None, stored: BaseModel | None, wanted: BaseModel) -> list[str | bytes | int]:
    if note is None:
        return []
    return [note.prefix, entry_text(note, stored, wanted, at=datetime.now(UTC)), AUDIT_ENTRIES]


def dataset_field(dataset: str) -> str:
    """Field of a dataset's declaration."""
    return f"dataset/{dataset}"


def fm_field(dataset: str, fm: str) -> str:
    """Field of an FM's record."""
    return f"fm/{dataset}/{fm}"


def snapshot_field(dataset: str, fm: str, snapshot_id: str) -> str:
    """Field of a snapshot's record."""
    return f"snapshot/{dataset}/{fm}/{snapshot_id}"
