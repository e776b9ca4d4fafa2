"""What a loader is told: options that can't be are refused before anything is asked of a service."""

from datetime import UTC, datetime
from typing import Any

import pytest

from das_service.client import Client
from vm_training import AugmentedDataset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0, "world_size": 2}, "give all of them the cursor `start` of one"),
        ({"rank": 2, "world_size": 2, "cursor": "x"}, "rank=2 and world_size=2"),
        ({"world_size": 2}, "give both"),
        ({"prefetch": 0}, "at least one batch is read ahead"),
        ({"embedding_format": "float16"}, "leave embedding_format out"),
        ({"follow": True, "until": datetime(2026, 1, 1, tzinfo=UTC)}, "leave out as_of and until"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentedDataset(Client(), "stream", **options)
