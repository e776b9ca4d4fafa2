"""The HTTP contract: the OpenAPI document and the shapes of answers do not change unseen.

After a wanted change: `python -m tests.contract.write_golden`, and a line in CHANGELOG.md.
"""

import json
import subprocess
import sys

import pytest

from tests.contract.write_golden import GOLDEN, build_openapi


def test_the_openapi_document_is_the_golden_one() -> None:
    assert build_openapi() == json.loads((GOLDEN / "openapi.json").read_text())


def test_it_is_openapi_3_1_and_every_operation_is_described() -> None:
    document = build_openapi()
    assert document["openapi"].startswith("3.1")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            assert operation["description"], (method, path)


def test_every_reference_leads_somewhere() -> None:
    document = build_openapi()
    names = set(document["components"]["schemas"])
    text = json.dumps(document)
    used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used <= names


def test_errors_are_problem_documents() -> None:
    for operations in build_openapi()["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if status.startswith(("4", "5")) and "/health" not in operation["operationId"]:
                    content = response.get("content", {})
                    assert set(content) <= {"application/problem+json", "application/json"}


@pytest.mark.parametrize("module", ["das_service.app", "das_service.watch.monitor", "das_service.dead_letters"])
def test_the_api_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
