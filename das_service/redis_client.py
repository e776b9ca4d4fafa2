"""The connection to Redis or Valkey: scripts, what the server can do, and whether it keeps what it acknowledges."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import Any, TypeAlias

import redis
from redis.backoff import NoBackoff
from redis.connection import Encoder, PythonRespSerializer
from redis.exceptions import NoScriptError, ResponseError
from redis.retry import Retry

from das_service.settings import Settings

SOCKET_TIMEOUT_SECONDS = 10.0
_COPIED_BYTES = 6000  # longer arguments are sent as they are; hiredis would copy megabytes, 0.4 ms each
Argument: TypeAlias = str | bytes | memoryview | int
UNREACHABLE = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, redis.exceptions.BusyLoadingError)


@dataclass(frozen=True, slots=True)
class Script:
    """One Lua script of das_service/lua."""

    name: str
    text: str
    sha: str


@cache
def script(name: str) -> Script:
    """Give the script of that name."""
    text = files("das_service").joinpath("lua", f"{name}.lua").read_text()
    return Script(name, text, sha1(text.encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """One call of a script."""

    script: Script
    keys: Sequence[str | bytes]
    args: Sequence[Argument]


def connect(
    settings: Settings,
    *,
    on_connect: Callable[[], None] | None = None,
    timeout_seconds: float = SOCKET_TIMEOUT_SECONDS,
) -> redis.Redis:
    """Give a client with short time-outs and no hidden retries; nothing is sent yet.

    on_connect runs after each new connection is made and before it is used: the place to learn that the server may
    have restarted. What it raises goes to whoever wanted the connection.
    """

    def greet(connection: Any) -> None:  # noqa: ANN401 - redis-py names no type for it
        connection.on_connect()
        if on_connect is None:
            return
        try:
            on_connect()
        except BaseException:
            connection.disconnect()  # else the pool would keep it, connected and not looked at
            raise

    return redis.Redis.from_url(
        settings.redis_url.get_secret_value(),
        protocol=2,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=2.0,
        socket_keepalive=True,
        max_connections=100
        + 2 * settings.max_concurrent_requests,  # a request holds two at most; the pool's default is 100
        retry=Retry(NoBackoff(), 0),
        command_packer=PythonRespSerializer(_COPIED_BYTES, Encoder("utf-8", "strict", decode_responses=False).encode),
        redis_connect_func=greet,
    )


def run_scripts(client: redis.Redis, calls: Sequence[ScriptCall], *, at_once: bool = False) -> list[Any]:
    """Run the calls in one round trip and give their replies in order; an error reply stands in its place.

    The scripts are sent by digest; a server that does not know one yet is told and asked again.

    at_once: as one transaction, so that the server waits for its disk once, where it would wait for each long call. If
    it refuses to take one of them, none runs, and the error stands in all places.

    Raises:
        redis.exceptions.ConnectionError: The server is gone; the calls may or may not have run.
    """
    replies = _evalsha(client, calls, at_once=at_once)
    unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
    if unknown:
        for text in {calls[i].script.text for i in unknown}:
            client.script_load(text)
        again = _evalsha(client, [calls[i] for i in unknown], at_once=at_once)
        for i, reply in zip(unknown, again, strict=True):
            replies[i] = reply
    return replies


def run_script(client: redis.Redis, name: str, keys: Sequence[str | bytes], args: Sequence[Argument]) -> Any:  # noqa: ANN401
    """Run one script and give its reply.

    Raises:
        redis.exceptions.ResponseError: The script failed.
    """
    (reply,) = run_scripts(client, [ScriptCall(script(name), keys, args)])
    if isinstance(reply, Exception):
        raise reply
    return reply


def _evalsha(client: redis.Redis, calls: Sequence[ScriptCall], *, at_once: bool) -> list[Any]:
    pipeline = client.pipeline(transaction=at_once and len(calls) > 1)
    for call in calls:
        pipeline.evalsha(call.script.sha, len(call.keys), *call.keys, *call.args)
    try:
        return execute(pipeline)
    except ResponseError as error:  # the transaction was not taken: no memory is left, say
        return [error] * len(calls)


def execute(pipeline: Any) -> list[Any]:  # noqa: ANN401 - redis-py names no type for it
    """Give the replies of a pipeline; an error reply stands in its place, without its traceback.

    A traceback would be part of a cycle, and keep all that its frames and their callers know until the collector comes.
    """
    replies = list(pipeline.execute(raise_on_error=False))
    for reply in replies:
        if isinstance(reply, Exception):
            reply.__traceback__ = None
    return replies


def has_msetex(client: redis.Redis) -> bool:
    """Give whether the server has MSETEX (Valkey >= 9.1, Redis >= 8.4)."""
    probe = "local c = redis.call('COMMAND', 'INFO', 'MSETEX'); return c[1] and 1 or 0"
    return bool(client.eval(probe, 0))


def durability_problems(client: redis.Redis) -> list[str]:
    """Give what keeps this server from holding what it acknowledges; empty when a 2xx may mean "on disk"."""
    wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
    try:
        actual = {_text(k): _text(v) for k, v in client.config_get(*wanted).items()}
    except ResponseError as error:
        return [f"its settings can't be read ({error})"]
    return [
        f"{name} is {actual.get(name, 'unknown')}, not {value}"
        for name, value in wanted.items()
        if actual.get(name) != value
    ]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
