"""Bytes of memory that many share: who wants some waits for it, in order of asking."""

from __future__ import annotations

import asyncio
from collections import deque


class Budget:
    """`total` bytes; at most so many are out at any time."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def lease(self) -> Lease:
        """A part of the budget, empty at first."""
        return Lease(self)

    async def take(self, size: int) -> None:
        """Wait until `size` bytes are free. ValueError when the budget as a whole is less."""
        if size > self.total:
            raise ValueError(f"{size} bytes can never be had of {self.total}")
        if not self._waiting and size <= self.free:
            self.free -= size
            return
        granted = asyncio.get_running_loop().create_future()
        self._waiting.append((size, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                self._grant()  # the one behind may fit where this one did not
            else:
                self.give(size)
            raise

    def give(self, size: int) -> None:
        """`size` bytes are free again."""
        self.free += size
        self._grant()

    def _grant(self) -> None:
        while self._waiting and (self._waiting[0][0] <= self.free or self._waiting[0][1].cancelled()):
            size, granted = self._waiting.popleft()
            if not granted.cancelled():
                self.free -= size
                granted.set_result(None)


class Lease:
    """What one NAR holds of the budget; `close` gives back the rest."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._held = 0

    async def take(self, size: int) -> None:
        """Wait until `size` more bytes are there. ValueError when the budget as a whole is less."""
        await self._budget.take(size)
        self._held += size

    def give(self, size: int) -> None:
        """Back to the budget."""
        self._held -= size
        self._budget.give(size)

    def close(self) -> None:
        """Everything back."""
        self.give(self._held)
