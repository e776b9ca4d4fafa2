"""`das compact`: the sink owns the tables, so it is asked, through the server, and says when it has done it."""

import time
import uuid

from das_service.redis_client import connect
from das_service.registry import read_catalog
from das_service.settings import Settings
from schemas import keys

POLL_SECONDS = 0.2


def request_compaction(settings: Settings, dataset: str, *, timeout_seconds: float) -> bool:
    """Ask the sink to compact a dataset's tables, and give whether it did in time.

    Raises:
        UnknownNameError: The dataset is not declared.
    """
    with connect(settings) as client:
        read_catalog(client).spec(dataset)
        client.hset(keys.COMPACT, dataset, uuid.uuid4().hex)
        deadline = time.monotonic() + timeout_seconds
        while client.hexists(keys.COMPACT, dataset):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True
