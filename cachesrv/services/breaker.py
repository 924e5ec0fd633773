"""A circuit breaker: who has failed several times in a row is left alone for a while, so that nobody waits for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

FAILURES = 3
"""Failures in a row that open the circuit."""
PAUSE_SECONDS = 10.0
"""How long it stays open; then one question is let through, and its outcome decides."""


class Breaker:
    """`clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._closed_again = 0.0

    @property
    def open(self) -> bool:
        """Whether nothing should be asked now. One caller of several is told to try when the pause is over."""
        if self._failures < FAILURES:
            return False
        now = self._clock()
        if now < self._closed_again:
            return True
        self._closed_again = now + PAUSE_SECONDS
        return False

    def succeeded(self) -> None:
        """It answered."""
        self._failures = 0

    def failed(self) -> None:
        """It did not."""
        self._failures += 1
        if self._failures >= FAILURES:
            self._closed_again = self._clock() + PAUSE_SECONDS
