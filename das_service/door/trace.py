"""The caller's trace, W3C Trace Context: `traceparent` is carried with the chunk to the worker and the sink.

Source: https://www.w3.org/TR/trace-context/#traceparent-header
"""

import re

from fastapi import Request

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def read_traceparent(request: Request) -> str | None:
    """Give the header where it is well formed; else None, as if it was not sent."""
    sent = request.headers.get("traceparent", "").strip()
    return sent if _TRACEPARENT.fullmatch(sent) else None
