"""Memory for parts of large NARs: each part is held until the server has it, so that it can be sent again by itself.

A few NARs at a time have a share of it. Each share is sure of some buffers, whatever the others do: who waits for a
buffer may hold back what others need to fill theirs, so nobody may wait for them. The rest is for those who ask first.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_SURE = 2
"""Buffers that a share has for itself, where it can use them: one that is filled while the other is on its way."""


class PartMemory:
    """`count` buffers of `size` bytes; `count` is 1 or more."""

    def __init__(self, size: int, count: int) -> None:
        self.size = size
        self.count = count
        self._shares: set[Share] = set()
        self._coming: deque[tuple[Share, asyncio.Future[None]]] = deque()
        self._waiting: deque[tuple[Share, asyncio.Future[memoryview]]] = deque()
        self._idle: list[memoryview] = []

    @asynccontextmanager
    async def share(self, parts: int = _SURE) -> AsyncIterator[Share]:
        """For one NAR, of so many parts; waits while too many others have one. At the end nothing may use its buffers
        any more.
        """
        share = Share(self, min(parts, _SURE, self.count))
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._coming.append((share, admitted))
        self._admit()
        try:
            await admitted
            yield share
        finally:
            admitted.cancel()
            self.leave(share)

    def leave(self, share: Share) -> None:
        """See Share."""
        self._shares.discard(share)
        self._idle += share.out.values()
        share.out.clear()
        self._admit()
        self._grant()

    def _admit(self) -> None:
        """In their order: who needs more must not wait for ever."""
        while self._coming:
            share, admitted = self._coming[0]
            if not admitted.done():
                if sum(other.sure for other in self._shares) + share.sure > self.count:
                    return
                self._shares.add(share)
                admitted.set_result(None)
            self._coming.popleft()

    async def take(self, share: Share) -> memoryview:
        """See Share."""
        granted: asyncio.Future[memoryview] = asyncio.get_running_loop().create_future()
        self._waiting.append((share, granted))
        self._grant()
        try:
            return await granted
        except asyncio.CancelledError:
            if not granted.cancelled():
                self.give(share, granted.result())
            raise

    def give(self, share: Share, buffer: memoryview) -> None:
        """See Share."""
        del share.out[id(buffer)]
        self._idle.append(buffer)
        self._grant()

    def _grant(self) -> None:
        still: deque[tuple[Share, asyncio.Future[memoryview]]] = deque()
        for share, granted in self._waiting:
            if granted.done():
                continue
            if self._may_take(share):
                buffer = self._idle.pop() if self._idle else memoryview(bytearray(self.size))
                share.out[id(buffer)] = buffer
                granted.set_result(buffer)
            else:
                still.append((share, granted))
        self._waiting = still

    def _may_take(self, share: Share) -> bool:
        """A share that was alone may have more than it is sure of when others come: those wait until it gives back."""
        out = sum(len(other.out) for other in self._shares)
        spoken_for = sum(max(len(other.out), other.sure) for other in self._shares)
        return out < self.count and (len(share.out) < share.sure or spoken_for < self.count)


class Share:
    """What one NAR has of it: `sure` buffers whenever it needs them; `out` are those that it has now, by their ids."""

    def __init__(self, memory: PartMemory, sure: int) -> None:
        self.size = memory.size
        self.sure = sure
        self.out: dict[int, memoryview] = {}
        self._memory = memory

    async def take(self) -> memoryview:
        """Wait for a buffer of `size` bytes; what is in it is of no meaning."""
        return await self._memory.take(self)

    def give(self, buffer: memoryview) -> None:
        """It may be used again."""
        self._memory.give(self, buffer)

    def leave(self) -> None:
        """It needs no more, and gives back what it has."""
        self._memory.leave(self)
