"""What the connection to the server leaves behind."""

import contextlib
import gc
import weakref

import redis

from das_service.logs.streams import read_groups
from tests.conftest import Server


class Held:
    """Something that a caller knows."""


def call_with_a_log_that_is_not_there(client: redis.Redis) -> "weakref.ref[Held]":
    held = Held()
    assert read_groups(client, "ads", range(4), "scored/nobody") == {}
    return weakref.ref(held)


def test_error_replies_keep_nothing_of_their_callers_alive(server: Server) -> None:
    gc.disable()
    try:
        with contextlib.closing(server.client()) as client:
            assert call_with_a_log_that_is_not_there(client)() is None
    finally:
        gc.enable()
