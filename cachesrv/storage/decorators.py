"""What stands between a store and a service behind a network: each class adds one habit to the requests that pass.

All of them are `Requests` and can be stacked in any order; the usual one, from the outside, is Retrying, Guarded,
Limited, Measured, Direct. They work on single requests and not on calls of an ObjectStore, because that is what can
be repeated: of an upload that breaks the one part is sent again, of a listing the one page is asked for again, and a
body that is read goes on where it broke.

A request says by TryAgain or SlowDown that repeating it may help. It has to be safe to repeat.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

import stamina
import structlog
from stamina.instrumentation import set_on_retry_hooks

from cachesrv.errors import StoreUnavailable
from cachesrv.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stamina.instrumentation import RetryDetails

_log = structlog.get_logger()

T = TypeVar("T")

Observe: TypeAlias = "Callable[[str, float, BaseException | None], None]"
"""Told of each request: its operation, how many seconds it took, and what it raised."""


class TryAgain(StoreUnavailable):
    """A request failed in a way that may pass; `after` is how many seconds the service wants to be left alone."""

    def __init__(self, message: str, *, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class SlowDown(TryAgain):
    """The service is there, and asks for fewer requests."""


class Requests(Protocol):
    """Carries out requests."""

    async def run(self, operation: str, request: Callable[[], Awaitable[T]]) -> T:
        """What `request` returns or raises; `operation` is the name of its kind. It may be called several times, one
        after the other.
        """


class Direct:
    """Does just that."""

    async def run(self, _operation: str, request: Callable[[], Awaitable[T]]) -> T:
        return await request()


class Measured:
    """Tells of each request how it went."""

    def __init__(self, inner: Requests, observe: Observe, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner = inner
        self._observe = observe
        self._clock = clock

    async def run(self, operation: str, request: Callable[[], Awaitable[T]]) -> T:
        begun = self._clock()
        try:
            result = await self._inner.run(operation, request)
        except BaseException as error:
            self._observe(operation, self._clock() - begun, error)
            raise
        self._observe(operation, self._clock() - begun, None)
        return result


class Limited:
    """Lets at most `most` requests through at a time, and finds out how many the service bears (see `cachesrv.turns`):
    a SlowDown says that it was too much.
    """

    def __init__(self, inner: Requests, *, most: int = 64) -> None:
        self._inner = inner
        self._turns = Turns(most)

    @property
    def limit(self) -> int:
        """How many requests may be under way at present."""
        return self._turns.limit

    async def run(self, operation: str, request: Callable[[], Awaitable[T]]) -> T:
        async with self._turns.turn() as turn:
            try:
                result = await self._inner.run(operation, request)
            except SlowDown:
                turn.was_too_much()
                raise
            turn.went_well()
            return result


class Guarded:
    """Asks no more of a service that is gone: when nothing has come through for `patience` seconds, requests fail at
    once with StoreUnavailable; every `pause` seconds one is let through to see. A service that only says SlowDown, or
    that refuses a request, is not gone.
    """

    def __init__(
        self,
        inner: Requests,
        *,
        patience: float = 10.0,
        pause: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inner = inner
        self._patience = patience
        self._pause = pause
        self._clock = clock
        self._failing_since: float | None = None
        self._gone = ""
        self._next_look = 0.0

    async def run(self, operation: str, request: Callable[[], Awaitable[T]]) -> T:
        if self._gone:
            if self._clock() < self._next_look:
                raise StoreUnavailable(self._gone)
            self._next_look = self._clock() + self._pause
        try:
            result = await self._inner.run(operation, request)
        except SlowDown:
            self._is_there()
            raise
        except TryAgain as error:
            self._failed(error)
            raise
        except Exception:
            self._is_there()
            raise
        self._is_there()
        return result

    def _is_there(self) -> None:
        self._failing_since = None
        self._gone = ""

    def _failed(self, error: TryAgain) -> None:
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        if now - self._failing_since >= self._patience:
            self._gone = f"{error} (so it is since {now - self._failing_since:.0f} seconds; asked again shortly)"
            self._next_look = now + self._pause


class Retrying:
    """Tries again what failed with TryAgain: at most `attempts` times in all, for at most `timeout` seconds, after
    delays that double from `first` to `longest` seconds and have something at random in them, or as long as the
    service said, if that is not longer than `longest`.
    """

    def __init__(
        self,
        inner: Requests,
        *,
        attempts: int = 6,
        timeout: float = 45.0,
        first: float = 0.1,
        longest: float = 10.0,
    ) -> None:
        self._inner = inner
        self._longest = longest
        self._caller = stamina.AsyncRetryingCaller(
            attempts=attempts, timeout=timeout, wait_initial=first, wait_max=longest, wait_jitter=5 * first
        )

    async def run(self, operation: str, request: Callable[[], Awaitable[T]]) -> T:
        return await self._caller(self._backoff, self._inner.run, operation, request)

    def _backoff(self, error: Exception) -> bool | float:
        if not isinstance(error, TryAgain) or error.after > self._longest:
            return False
        if error.after:
            return error.after * random.uniform(1, 1.5)  # noqa: S311  jitter is no secret
        return True


def log_retries() -> None:
    """From now on what is tried again in this process is told in the log in few words: it may be thousands."""
    set_on_retry_hooks([_tell])


def _tell(details: RetryDetails) -> None:
    _log.info("a request is tried again", error=str(details.caused_by), in_seconds=round(details.wait_for, 2))
