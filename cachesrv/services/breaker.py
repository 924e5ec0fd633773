"""A circuit breaker: who has failed several times in a row is left alone for a while, so that nobody waits for it."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FAILURES = 3
"""Failures in a row that open the circuit."""
PAUSE_SECONDS = 10.0
"""How long it stays open; then one question is let through, and its outcome decides."""
LONGEST_PAUSE_SECONDS = 300.0
"""How long somebody who asks for it is left alone, at most."""
SLOW_SECONDS = 0.5
"""A question that was given up on after this time or more has failed."""


class Breaker:
    """`clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._closed_again = 0.0

    def allows(self) -> bool:
        """Whether something may be asked now. When the pause is over, that is said to one caller of several."""
        if self._failures < FAILURES:
            return True
        now = self._clock()
        if now < self._closed_again:
            return False
        self._closed_again = now + PAUSE_SECONDS
        return True

    @contextmanager
    def watching(self, *failures: type[Exception]) -> Iterator[None]:
        """A question is being asked: what it raises says whether it failed. Other errors than `failures` are answers;
        an `after` of theirs is how many seconds the other side wants to be left alone.
        """
        begun = self._clock()
        try:
            yield
        except failures as error:
            self._failed(getattr(error, "after", 0.0))
            raise
        except asyncio.CancelledError:
            if self._clock() - begun >= SLOW_SECONDS:
                self._failed(0.0)
            raise
        except Exception:
            self._failures = 0
            raise
        self._failures = 0

    def _failed(self, after: float) -> None:
        self._failures = FAILURES if after else self._failures + 1
        if self._failures >= FAILURES:
            pause = min(max(after, PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
            self._closed_again = max(self._closed_again, self._clock() + pause)
