"""One HTTP call of the client: repeated while that can help, until its deadline, then an answer or an error.

Every call of the service is idempotent, so a lost connection is tried again, and so are the refusals that call
themselves retryable (429 and 503 above all): after what Retry-After says, at least an exponential back-off with jitter,
and never past the deadline.
"""

import contextlib
import io
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import httpx

from das_service.client.errors import DasClientError, NotFoundError, UnreachableError, problem_error
from das_service.client.transport import plain_transport

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
ATTEMPT_SECONDS = 30.0
CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Clock:
    """Time and chance, so that tests need neither."""

    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    chance: Callable[[], float] = random.random


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request. attempt_seconds: longest wait for one answer."""

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    content: bytes | None = None
    attempt_seconds: float = ATTEMPT_SECONDS


class Caller:
    """Sends calls to one service. Threads may share it."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        timeout_seconds: float,
        transport: httpx.BaseTransport | None,
        clock: Clock,
    ) -> None:
        self.url = _checked_url(url)
        self.timeout_seconds = timeout_seconds
        self._clock = clock
        headers = {"Authorization": f"Bearer {_checked_token(token)}"} if token else {}
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
        transport = plain_transport(self.url) if transport is None else transport
        self._http = httpx.Client(base_url=self.url, headers=headers, transport=transport, limits=limits)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(
        self, call: Call, *, timeout_seconds: float | None = None, retry_seconds: float = math.inf
    ) -> httpx.Response:
        """Give the answer of a call that succeeded.

        timeout_seconds: the longest that it takes, default the client's. retry_seconds: the longest that it is tried
        again after the first failure, for a call that the service takes long to answer once it has it.

        Raises:
            DasClientError: It did not, and trying again did not help or could not.
        """
        budget = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        deadline = self._clock.monotonic() + budget
        last_try = deadline
        pause = FIRST_PAUSE_SECONDS
        while True:
            outcome = self._attempt(call, deadline)
            if isinstance(outcome, httpx.Response):
                return outcome
            error, wanted_seconds = outcome
            seconds = max(wanted_seconds, pause * (0.5 + self._clock.chance() / 2))
            now = self._clock.monotonic()
            last_try = min(last_try, now + retry_seconds)
            if not error.retryable or now + seconds >= last_try:
                raise error
            self._clock.sleep(seconds)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def ask_once(self, path: str) -> httpx.Response:
        """Give whatever is answered to a GET, an error answer too, without a second try.

        Raises:
            UnreachableError: No answer came.
        """
        try:
            return self._http.get(path, timeout=CONNECT_SECONDS)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    @contextlib.contextmanager
    def streamed(self, call: Call) -> Iterator[httpx.Response]:
        """Give the answer of a call whose body is still to be read, without a second try.

        Raises:
            DasClientError: It was refused; the body is read from the connection in the caller's hands.
            httpx.TransportError: There was no answer, or it breaks off.
        """
        timeout = httpx.Timeout(call.attempt_seconds, connect=CONNECT_SECONDS)
        with self._http.stream(
            call.method, call.path, params=call.params, headers=call.headers, timeout=timeout
        ) as response:
            if not response.is_success:
                response.read()
                raise problem_error(response.status_code, parse_problem(response))
            yield response

    def _attempt(self, call: Call, deadline: float) -> httpx.Response | tuple[DasClientError, float]:
        """Give the answer, or why there is none and how long the service asks to wait."""
        seconds = max(0.05, min(call.attempt_seconds, deadline - self._clock.monotonic()))
        try:
            with self._http.stream(
                call.method,
                call.path,
                params=call.params,
                headers=call.headers,
                json=call.json,
                content=call.content,
                timeout=httpx.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds)),
            ) as answer:
                response = _whole(answer)
        except httpx.TransportError as error:
            return self._unreachable(error), 0.0
        if response.is_success:
            return response
        refusal = problem_error(response.status_code, parse_problem(response))
        return refusal, retry_after_seconds(response.headers.get("Retry-After"))

    def _unreachable(self, error: httpx.TransportError) -> UnreachableError:
        what = str(error) or type(error).__name__
        can_help = not isinstance(error, httpx.LocalProtocolError)  # what we may not send at all
        return UnreachableError(f"no answer from {self.url}: {what}", code="unreachable", retryable=can_help)


def _whole(answer: httpx.Response) -> httpx.Response:
    """Give an answer with its body, gathered in one place: httpx would hold all its pieces and then copy them."""
    body = io.BytesIO()
    for piece in answer.iter_bytes():
        body.write(piece)
    headers = answer.headers.copy()
    headers.pop("content-encoding", None)  # it is decoded
    return httpx.Response(answer.status_code, headers=headers, content=body.getvalue(), request=answer.request)


def _checked_url(url: str) -> str:
    """Give the address of a service without a slash at its end.

    Raises:
        DasClientError: bad_url.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise DasClientError(f"{url!r} is no address of a service, such as http://127.0.0.1:8000", code="bad_url")
    return url.rstrip("/")


def _checked_token(token: str) -> str:
    """Give a token that a header can hold.

    Raises:
        DasClientError: bad_token; the message does not repeat it.
    """
    if not token.isascii() or not token.isprintable():
        raise DasClientError("the token (DAS_TOKEN) has a character that no header can hold", code="bad_token")
    return token


def path_of(*parts: str) -> str:
    """Give the path of what is named so, whatever characters the names have.

    Raises:
        NotFoundError: A name would end a part of the path: nothing can have it.
    """
    for part in parts:
        if "/" in part or part in {"", ".", ".."}:
            raise NotFoundError(f"nothing is named {part!r}", code="not_found")
    return "/v1/" + "/".join(quote(part, safe="", errors="replace") for part in parts)


def json_object(response: httpx.Response) -> dict[str, Any]:
    """Give the JSON object of an answer.

    Raises:
        DasClientError: bad_answer: it is something else, so somebody else answered.
    """
    with contextlib.suppress(ValueError):
        body = response.json()
        if isinstance(body, dict):
            return body
    raise DasClientError(f"{response.url} did not answer as the service does: is the address right?", code="bad_answer")


def parse_problem(response: httpx.Response) -> dict[str, Any]:
    """Give the JSON object of an error answer, empty where its body is something else."""
    with contextlib.suppress(DasClientError):
        return json_object(response)
    return {}


def retry_after_seconds(text: str | None) -> float:
    """Give the seconds that a Retry-After header asks for, as a number or a date; 0 where it is absent or unclear."""
    if not text:
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return 0.0
