"""Work at no more than so many bytes a second."""

from __future__ import annotations

import asyncio
import time

_BURST = 0.25
"""Seconds of work that may be done ahead."""


class Pace:
    """`rate` in bytes a second, shared by all who spend; 0: no limit."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._due = 0.0

    async def spend(self, number: int) -> None:
        """Come back when `number` more bytes may be worked on."""
        if self._rate:
            self._due = max(self._due, time.monotonic() - _BURST) + number / self._rate
            await asyncio.sleep(max(0.0, self._due - time.monotonic()))
