"""Every route against its own OpenAPI document, with requests that schemathesis makes up: good, odd and bad ones.

The app stands behind a real socket on a real server, with tokens, a dataset, an FM and a snapshot; the names that the
document has as examples are theirs. No answer is a 5xx, every one conforms to what the document says of it, and an
error is told as a problem document.
"""

import json
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import SecretStr
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from das_service.up.embedded import find_server, free_port
from schemas.wire import ARROW_STREAM, PROBLEM_JSON
from tests.conftest import Server, make_settings
from tests.contract.write_golden import GOLDEN
from tests.served import Stand, arrow_body, examples, examples_table, serve, serve_over_tcp

SCHEMA = schemathesis.openapi.from_dict(json.loads((GOLDEN / "openapi.json").read_text()))
TOKEN = "t0ken"
READY = "/health/ready"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that knows dataset `ads`, FM `teacher`, snapshot `s1` and one token."""
    folder = tmp_path_factory.mktemp("schemathesis")
    server = Server(program=find_server(), folder=folder / "server", port=free_port())
    server.start()
    settings = make_settings(server, folder)
    with server.client() as client, serve(settings) as api:
        api.declare()
        api.declare_fm("teacher", required=False)  # a caller that waits for scores then waits for none
        Stand(settings, client, fm="teacher").validate()
        api.post(examples(0, 10))
    with serve_over_tcp(settings.model_copy(update={"token": SecretStr(TOKEN)})) as port:
        yield f"http://127.0.0.1:{port}"
    server.stop()


def cut_or_flipped(body: bytes, place: int, change: int) -> bytes:
    """A damaged body: cut at a place (change 0), or one byte of it changed."""
    at = place % len(body)
    return body[:at] if change == 0 else body[:at] + bytes([body[at] ^ change]) + body[at + 1 :]


WHOLE = st.sampled_from(
    [arrow_body(table) for table in (examples_table(0, 5), examples_table(0, 1).select(["example_id", "event_time"]))]
)
DAMAGED = st.builds(cut_or_flipped, WHOLE, st.integers(0, 10_000), st.integers(0, 255))
schemathesis.openapi.media_type(ARROW_STREAM, WHOLE | DAMAGED)

HEADERS = {"Authorization": f"Bearer {TOKEN}"}
# Ours says 5xx with a list of the routes that may; and a schema can't say which ids, names and features there are.
EXCLUDED = [not_a_server_error, positive_data_acceptance]


@SCHEMA.parametrize()
@hypothesis_settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_route_does_what_its_document_says(case: schemathesis.Case, url: str) -> None:
    if case.query is not None:
        case.query.pop("follow", None)  # such an answer has no end
    response = case.call(base_url=url, headers=HEADERS)
    if response.status_code == 431:  # a head of more than 64 KiB is refused before there is a route
        return

    case.validate_response(response, excluded_checks=EXCLUDED, headers=HEADERS)
    if case.operation.path != READY:  # it says that there is neither a sink nor a worker
        assert response.status_code < 500, response.text
        assert response.status_code < 400 or response.headers["content-type"] == [PROBLEM_JSON], response.text
