"""What `das status` knows: the API's own account, and without it what the supervisor left in its folder."""

import os
from pathlib import Path
from typing import Any

from das_service.client import DEFAULT_URL, Client
from das_service.client.errors import DasClientError
from das_service.up.service_folder import ServiceFolder

TIMEOUT_SECONDS = 5.0


def look(url: str | None, folder: Path) -> dict[str, Any]:
    """Give `/v1/status`; where the API is silent, `ready: false`, why, and the roles of the folder's supervisor.

    url: of the API, else DAS_API_URL, else that of the `das up` on the folder, else the default one. `source` says
    where the answer is from: api, folder or nobody. Processes that live stand first.
    """
    state = _read_folder(folder)
    asked = url or os.environ.get("DAS_API_URL") or (state or {}).get("url") or DEFAULT_URL
    try:
        with Client(asked, timeout_seconds=TIMEOUT_SECONDS) as client:
            answer = client.status()
            roles = sorted(answer["roles"], key=lambda role: role.get("alive") is False)
            return {"source": "api", "url": asked, **answer, "roles": roles}
    except DasClientError as error:
        problems = [f"the API can't be asked: {error.detail}"]
    if state is None:
        problems.append(f"no `das up` runs on {folder} either")
    return {
        "source": "nobody" if state is None else "folder",
        "url": asked,
        "ready": False,
        "problems": problems,
        "roles": [] if state is None else list(state["roles"]),
        "datasets": {},
    }


def _read_folder(folder: Path) -> dict[str, Any] | None:
    """Give what the supervisor of a folder says, None where none runs."""
    place = ServiceFolder(folder.absolute())
    return place.read_roles() if place.has_supervisor() else None
