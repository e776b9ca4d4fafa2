"""The client of the service: what a product, a trainer and the CLI hold. Needs httpx and pyarrow, nothing else."""

from das_service.client.batches import BatchOptions, BatchReader, TrainingBatch
from das_service.client.client import DEFAULT_URL, Client
from das_service.client.errors import (
    ConflictError,
    DasClientError,
    LostRaceError,
    NotFoundError,
    RowError,
    RowsRefusedError,
    SnapshotRejectedError,
    UnavailableError,
    UnreachableError,
)
from das_service.client.http import Clock
from das_service.client.ingest import IngestResult
from das_service.client.tables import TableSource
from schemas.wire import TruncatedStreamError

__all__ = [
    "DEFAULT_URL",
    "BatchOptions",
    "BatchReader",
    "Client",
    "Clock",
    "ConflictError",
    "DasClientError",
    "IngestResult",
    "LostRaceError",
    "NotFoundError",
    "RowError",
    "RowsRefusedError",
    "SnapshotRejectedError",
    "TableSource",
    "TrainingBatch",
    "TruncatedStreamError",
    "UnavailableError",
    "UnreachableError",
]
