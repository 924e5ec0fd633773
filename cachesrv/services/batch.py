"""Work that is cheaper together: what arrives while a batch is under way makes up the next one.

A sync to disk costs as much for a hundred paths as for one. Nothing waits for others to come: the first item leaves at
once, and those that arrive meanwhile leave together.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

Item = TypeVar("Item")


class Batcher(Generic[Item]):
    """Hands items to `flush` in lists of at most `limit`, one list at a time, in order of arrival."""

    def __init__(self, flush: Callable[[list[Item]], Awaitable[None]], *, limit: int = 1000) -> None:
        self._flush = flush
        self._limit = limit
        self._waiting: list[tuple[Item, asyncio.Future[None]]] = []
        self._running: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> None:
        """Return when the item has been flushed. Raises what flushing it alone raises.

        The caller may be cancelled: the item is flushed all the same.
        """
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        await asyncio.shield(done)

    async def close(self) -> None:
        """Wait for what has been submitted."""
        while self._running:
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
                await self._flush_isolated(batch)
        finally:
            self._running = None

    async def _flush_isolated(self, batch: list[tuple[Item, asyncio.Future[None]]]) -> None:
        """One bad item must not fail its neighbours: a batch that fails is repeated item by item."""
        try:
            await self._flush([item for item, _ in batch])
        except Exception as error:  # noqa: BLE001  whatever it was, it is handed to those who wait for it
            if len(batch) == 1:
                _settle(batch[0][1], error)
            else:
                for one in batch:
                    await self._flush_isolated([one])
        else:
            for _, done in batch:
                _settle(done, None)


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
        done.exception()  # the one who waited may have been cancelled; then nobody else would look
