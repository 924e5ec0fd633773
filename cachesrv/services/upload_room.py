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
    from cachesrv.services.part_store import PartStore

_COUNTED_FOR = 60.0
"""Seconds after which all is counted anew."""


class Room:
    """`size` in bytes of all parts together; `uploads`: how many there may be."""

    def __init__(self, store: PartStore, *, size: int, uploads: int) -> None:
        self._store = store
        self._most_size = size
        self._most_uploads = uploads
        self._size = 0
        self._uploads = 0
        self._counted_at = float("-inf")
        self._counting = asyncio.Lock()

    async def for_upload(self) -> None:
        """One more upload. Raises StoreFull."""
        await self._count()
        if self._uploads >= self._most_uploads:
            raise StoreFull(f"{self._uploads} uploads are unfinished, more are not taken (uploads.limit_count)")
        self._uploads += 1

    async def for_part(self, size: int) -> None:
        """One more part of so many bytes. Raises StoreFull."""
        await self._count()
        if self._size + size > self._most_size:
            raise StoreFull(f"{self._size} bytes of unfinished NARs are here, more are not taken (uploads.limit_size)")
        self._size += size

    async def _count(self) -> None:
        async with self._counting:
            if time.monotonic() - self._counted_at >= _COUNTED_FOR:
                amount = await self._store.amount()
                self._size, self._uploads = amount.size, amount.uploads
                self._counted_at = time.monotonic()
