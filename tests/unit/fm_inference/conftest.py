"""A dataset with every kind of feature, and one closed-form snapshot of it for all tests that only read it."""

from pathlib import Path

import pytest

from schemas.dataset import DatasetSpec
from tests.fakes import export_closed_form


@pytest.fixture(scope="session")
def spec() -> DatasetSpec:
    return DatasetSpec.model_validate(
        {
            "entity_key": ["user_id"],
            "features": [
                {"name": "price", "type": "float", "nullable": True},
                {"name": "user_id", "type": "category", "value_type": "string"},
                {"name": "item", "type": "category", "value_type": "int64", "nullable": True},
                {"name": "tags", "type": "category_list", "value_type": "string", "max_length": 12, "nullable": True},
                {"name": "shops", "type": "category_list", "value_type": "int64", "max_length": 4},
                {"name": "image", "type": "vector", "size": 3, "nullable": True},
            ],
            "tasks": [
                {"name": "click", "label_window_seconds": 3600},
                {"name": "buy", "label_window_seconds": 86400},
            ],
        }
    )


@pytest.fixture(scope="session")
def closed_form_folder(tmp_path_factory: pytest.TempPathFactory, spec: DatasetSpec) -> Path:
    """A read-only snapshot folder."""
    folder = tmp_path_factory.mktemp("snapshots") / "s1"
    export_closed_form(folder, spec)
    return folder
