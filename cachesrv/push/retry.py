"""The one place where the uploader tries again.

Its own few lines instead of a library's, for three reasons: the server's `Retry-After` is the least delay, each
repetition is told as an event, and nothing here may write to stdout, which belongs to `--json`.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from cachesrv.errors import ServerError
from cachesrv.push.events import Retrying

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cachesrv.push.events import Emit

Result = TypeVar("Result")

OUTAGE = 240.0
"""Seconds: a laptop that sleeps, a router that starts again."""


class TryAgain(ServerError):
    """A failure that may pass; `retry_after` is the delay in seconds that the server asked for. `tried` says that it
    was tried again, and often enough; `hopeless`, that whatever else is tried now fails as well.
    """

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.tried = False
        self.hopeless = False


class Overloaded(TryAgain):
    """It may have been too much for the server, or for what stands before it."""


class Broken(Overloaded):
    """A request was cut short: it may have been too large, or too slow, for what stands before the server."""


class Away(Overloaded):
    """There may be no server behind the proxy that answers; the request may be why."""


class Unreachable(TryAgain):
    """No connection, or one to a proxy with nobody behind it."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message, retry_after)
        self.hopeless = True


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often and how long: the delay doubles from `first` to `longest` seconds, the last half of it at random.
    A server that asks for more than `patience` seconds is not waited for. With an `outage`, one that cannot be reached
    is tried for so many seconds, however often that is.
    """

    attempts: int = 8
    first: float = 0.5
    longest: float = 30.0
    patience: float = 300.0
    outage: float = 0.0

    def delay(self, attempt: int, retry_after: float, jitter: float) -> float:
        """Seconds to wait after the failure of `attempt` (from 1); `jitter` is from 0 to 1."""
        full = min(self.longest, self.first * 2.0 ** min(attempt - 1, 30))
        return max(retry_after, full * (0.5 + jitter / 2))


async def retry(operation: Callable[[], Awaitable[Result]], what: str, backoff: Backoff, emit: Emit) -> Result:
    """The result of `operation`, called again after each TryAgain but those that come out of here themselves; the last
    one is raised.
    """
    attempt, missed, lost_since = 0, 0, 0.0
    now = asyncio.get_running_loop().time
    while True:
        try:
            return await operation()
        except TryAgain as error:
            if isinstance(error, Unreachable) and backoff.outage:
                missed, lost_since = missed + 1, lost_since or now()
                over = now() - lost_since >= backoff.outage
            else:
                attempt, missed, lost_since = attempt + 1, 0, 0.0
                over = attempt >= backoff.attempts
            impatient = error.retry_after > backoff.patience
            if error.tried or over or impatient:
                error.tried = True
                error.hopeless |= impatient
                raise
            count = missed or attempt
            delay = backoff.delay(count, error.retry_after, random.random())  # noqa: S311  jitter is no secret
            emit(Retrying(what, count, round(delay, 3), str(error)))
        await asyncio.sleep(delay)
