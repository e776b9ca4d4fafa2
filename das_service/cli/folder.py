"""Where the `das up` on a folder keeps everything: what `--folder` means to commands that need more than the API."""

import os
from pathlib import Path

from das_service.cli.output import InputError


def folder_settings(root: Path | None) -> dict[str, str]:
    """Give where the `das up` on a folder keeps everything, as settings; nothing where no folder is named.

    Raises:
        InputError: None runs on it.
    """
    from das_service.up.service_folder import ServiceFolder

    if root is None:
        return {}
    folder = ServiceFolder(root.absolute())
    state = folder.read_roles()
    if state is None or not folder.has_supervisor():
        raise InputError(f"`das up` does not run on {root}")
    names = {"redis_url", "tables_uri", "snapshots_uri"}
    if "DAS_REDIS_URL" in os.environ:  # with its password, which the folder does not hold
        names.discard("redis_url")
    return {name: str(state[name]) for name in sorted(names)}


def tables_settings(root: Path | None) -> dict[str, str]:
    """Give where the tables of a folder of `das up` are, as settings, whether it runs or not; nothing without a folder.

    Raises:
        InputError: It is no folder of `das up`.
    """
    from das_service.up.service_folder import ServiceFolder

    if root is None:
        return {}
    if not ServiceFolder(root).tables.is_dir():
        raise InputError(f"{root} is no folder of `das up`: there is no {ServiceFolder(root).tables}")
    try:
        return folder_settings(root)
    except InputError:  # nothing runs on it: the tables are there all the same
        return {"tables_uri": str(ServiceFolder(root.absolute()).tables)}
