"""Buffers for what is being compressed, shared by all NARs in flight; they are given in order of asking."""

from __future__ import annotations

import asyncio


class Buffers:
    """`count` buffers of `size` bytes, made when they are first wanted and used over and over: memory that is
    allocated and freed by several threads in turn grows far beyond what is in use.
    """

    def __init__(self, count: int, size: int) -> None:
        self._allowed = asyncio.Semaphore(count)
        self._size = size
        self._idle: list[memoryview] = []

    async def take(self) -> memoryview:
        """Wait for one; what is in it is of no meaning."""
        await self._allowed.acquire()
        return self._idle.pop() if self._idle else memoryview(bytearray(self._size))

    def give(self, buffer: memoryview) -> None:
        """It may be used again."""
        self._idle.append(buffer)
        self._allowed.release()
