"""How much room the parts of unfinished uploads may take, so that they do not fill a disk or a bucket.

What there is is counted now and then, by listing it; what comes meanwhile is added. So the limits hold about: several
processes do not know at once what each of them takes in.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from cachesrv.errors import StoreFull

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cachesrv.services.part_store import Amount

_COUNTED_FOR = 60.0
_COUNTED_FOR_IF_FULL = 1.0
"""Seconds after which all is counted anew: what has become NARs meanwhile is in nobody's way."""


class Room:
    """`size` in bytes of all parts together; `uploads`: how many there may be; `amount` counts what there is."""

    def __init__(self, amount: Callable[[], Awaitable[Amount]], *, size: int, uploads: int) -> None:
        self._amount = amount
        self._most_size = size
        self._most_uploads = uploads
        self._size = 0
        self._uploads = 0
        self._counted_at = float("-inf")
        self._counting = asyncio.Lock()

    async def for_upload(self) -> None:
        """One more upload. Raises StoreFull."""
        if not await self._is_room(self._has_one_more):
            raise StoreFull(f"{self._uploads} uploads are unfinished, more are not taken (uploads.limit_count)")
        self._uploads += 1

    async def for_part(self, size: int) -> None:
        """One more part of so many bytes. Raises StoreFull."""
        if not await self.takes(size):
            raise StoreFull(f"{self._size} bytes of unfinished NARs are here, more are not taken (uploads.limit_size)")

    async def takes_piece(self, size: int) -> bool:
        """As `takes`, for an upload of so many bytes that is not begun before it is there."""
        there_is = await self._is_room(self._has_one_more) and await self.takes(size)
        if there_is:
            self._uploads += 1
        return there_is

    async def takes(self, size: int) -> bool:
        """Whether there is room for so many more bytes; then it is taken."""
        there_is = await self._is_room(lambda: self._size + size <= self._most_size)
        if there_is:
            self._size += size
        return there_is

    def _has_one_more(self) -> bool:
        return self._uploads < self._most_uploads

    async def _is_room(self, condition: Callable[[], bool]) -> bool:
        await self._count(_COUNTED_FOR)
        if not condition():
            await self._count(_COUNTED_FOR_IF_FULL)
        return condition()

    async def _count(self, every: float) -> None:
        async with self._counting:
            if time.monotonic() - self._counted_at >= every:
                amount = await self._amount()
                self._size, self._uploads = amount.size, amount.uploads
                self._counted_at = time.monotonic()
