"""Every route against its own OpenAPI document, with requests that schemathesis makes up: good, odd and bad ones.

The app stands behind a real socket on a real server, with a dataset, an FM and a snapshot declared. No answer is a 5xx,
every one conforms to what the document says of it, and bad input is told as a problem document.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from das_service.up.embedded import find_server, free_port
from schemas.wire import PROBLEM_JSON
from tests.conftest import Server, make_settings
from tests.contract.write_golden import GOLDEN
from tests.served import Stand, examples, serve, serve_over_tcp

SCHEMA = schemathesis.openapi.from_dict(json.loads((GOLDEN / "openapi.json").read_text()))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("schemathesis")
    server = Server(program=find_server(), folder=folder / "server", port=free_port())
    server.start()
    settings = make_settings(server, folder)
    with server.client() as client, serve(settings) as api:
        api.declare()
        api.declare_fm()
        Stand(settings, client).validate()
        api.post(examples(0, 10))
    with serve_over_tcp(settings) as port:
        yield f"http://127.0.0.1:{port}"
    server.stop()


@SCHEMA.parametrize()
@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_route_does_what_its_document_says(case: schemathesis.Case, url: str) -> None:
    response = case.call(base_url=url)
    case.validate_response(response)
    if response.status_code >= 400:
        assert response.headers["content-type"] == [PROBLEM_JSON]
