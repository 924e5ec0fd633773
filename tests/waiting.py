"""Waiting for what comes true by itself, however busy the machine is."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PLENTY = 60.0
"""Seconds after which nothing comes any more."""


async def until(condition: Callable[[], bool]) -> None:
    """Return when it is true. Raises TimeoutError."""
    async with asyncio.timeout(PLENTY):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.01)


def let_pass(seconds: float) -> None:
    """As if so much time had gone by for the event loop of this test: what is due by then is over."""
    loop = asyncio.get_running_loop()
    clock = loop.time
    loop.time = lambda: clock() + seconds  # type: ignore[method-assign]  # the loop ends with the test


class Pace:
    """Whether steps that were to follow each other within `most` seconds did: on a busy machine they may not, and what
    comes of it then shows nothing.
    """

    TRIES = 100

    def __init__(self, most: float) -> None:
        self.kept = True
        self._most = most
        self._last = monotonic()

    def step(self) -> None:
        """One more."""
        now = monotonic()
        self.kept = self.kept and now - self._last < self._most
        self._last = now
