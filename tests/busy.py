"""A server that answers BUSY, as it does while somebody's script runs for long."""

import contextlib
import threading
import time
from collections.abc import Iterator

import redis


@contextlib.contextmanager
def busy(client: redis.Redis) -> Iterator[None]:
    """Keep the server busy with a script that is ended afterwards."""
    (former,) = client.config_get("busy-reply-threshold").values()
    client.config_set("busy-reply-threshold", 10)
    runner = threading.Thread(target=_run_until_killed, args=(client,))
    runner.start()
    try:
        _wait_until_busy(client)
        yield
    finally:
        client.script_kill()
        runner.join()
        client.config_set("busy-reply-threshold", former)


def _run_until_killed(client: redis.Redis) -> None:
    with contextlib.suppress(redis.exceptions.ResponseError):
        client.eval("while true do end", 0)


def _wait_until_busy(client: redis.Redis) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            client.ping()
        except redis.exceptions.ResponseError as error:
            if str(error).startswith("BUSY"):
                return
    raise TimeoutError("the server did not become busy")
