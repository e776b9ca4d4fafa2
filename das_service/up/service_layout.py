"""Where `das up` puts everything: addresses, folders, and the environment that each role gets."""

import os
import socket
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import das_service
from das_service.settings import Settings, load_settings
from das_service.up.embedded import free_port
from das_service.up.service_folder import ServiceFolder

ROLES = ("api", "worker", "sink")
SERVER = "valkey"
SERVER_MEMORY_RATIO = 0.4
_ANY_HOST = {"0.0.0.0", "[::]"}  # noqa: S104 - compared with, not bound to


class PortInUseError(Exception):
    """Somebody else listens on the API's port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where everything is, once decided. server_port: None where DAS_REDIS_URL names a server; roles: in stop order."""

    folder: ServiceFolder
    roles: tuple[str, ...]
    url: str
    redis_url: str
    server_port: int | None
    environment: Mapping[str, str]
    settings: Settings

    @property
    def shown_redis_url(self) -> str:
        """The server's address without its password."""
        parts = urlsplit(self.redis_url)
        if parts.scheme == "unix":
            return f"unix://{parts.path}"
        return f"{parts.scheme}://{parts.hostname or ''}:{parts.port or 6379}{parts.path}"

    def role_environment(self, role: str) -> dict[str, str]:
        """Give the environment of a role's process."""
        environment = dict(self.environment)
        if self.settings.instance is not None:
            environment["DAS_INSTANCE"] = f"{self.settings.instance}-{role}"
        return environment

    def banner(self) -> str:
        """Give what a person wants to know once everything is ready."""
        server = "embedded server" if self.server_port is not None else "server of DAS_REDIS_URL"
        who = (
            "tokens are asked for"
            if self.settings.tokens_file is not None or self.settings.token is not None
            else "no tokens are set, so it listens on the loopback interface only"
        )
        return "\n".join(
            [
                f"ready: {self.url} ({', '.join(self.roles)}, {server} at {self.shown_redis_url})",
                f"  folder   {self.folder.root}",
                f"  logs     {self.folder.root / 'logs'}",
                f"  access   {who}",
                "  stop     Ctrl-C, or SIGTERM: what is in flight is finished first",
                "  look     das status" + ("" if self.url.endswith(":8000") else f" --url {self.url}"),
            ]
        )


def lay_out(folder: Path, *, roles: Sequence[str], port: int | None) -> Layout:
    """Decide addresses and folders from the settings of this process. port: None = DAS_BIND's, 0 = any that is free.

    Raises:
        SettingsError: A DAS_* variable is unknown or has a bad value.
        PortInUseError: The API's port is taken.
    """
    asked = load_settings()
    root = ServiceFolder(folder.expanduser().absolute())
    host, _, bound_port = asked.bind.rpartition(":")
    port = (int(bound_port) if port is None else port) or free_port()
    if "api" in roles:
        _refuse_port_in_use(host, port)
    server_port = None if "DAS_REDIS_URL" in os.environ else free_port()
    redis_url = asked.redis_url.get_secret_value() if server_port is None else f"redis://127.0.0.1:{server_port}/0"
    url = f"http://{'127.0.0.1' if host in _ANY_HOST else host}:{port}"
    environment = {
        "DAS_TABLES_URI": str(root.tables),
        "DAS_SNAPSHOTS_URI": str(root.snapshots),
        **os.environ,
        "DAS_REDIS_URL": redis_url,
        "DAS_API_URL": url,
        "DAS_BIND": f"{host}:{port}",
        "DAS_PROBE_BIND": f"{asked.probe_bind.rpartition(':')[0]}:0",
        "PYTHONUNBUFFERED": "1",
        **import_path(),
    }
    if server_port is not None:
        environment["DAS_LOG_FOLDER"] = str(root.server_data)
    return Layout(
        folder=root,
        roles=tuple(role for role in ROLES if role in roles),
        url=url,
        redis_url=redis_url,
        server_port=server_port,
        environment=environment,
        settings=load_settings(redis_url=redis_url, api_url=url),
    )


def server_memory_bytes() -> int:
    """Give the embedded server's maxmemory: SERVER_MEMORY_RATIO of what this machine or container may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return int(SERVER_MEMORY_RATIO * min(total, int(text) if text.isdigit() else total))


def import_path() -> dict[str, str]:
    """Let the children find this package where it runs from a source tree that is not installed."""
    root = str(Path(das_service.__file__).parent.parent)
    if root == sysconfig.get_paths()["purelib"]:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


def _refuse_port_in_use(host: str, port: int) -> None:
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise PortInUseError(
                f"the API can't listen on {host}:{port} ({error.strerror}): choose another port with --port"
            ) from error
