"""When paths were last used: gathered in memory by lookups, written to the catalog in batches, never by a lookup."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import structlog

from cachesrv.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cachesrv.catalog.base import Catalog

_log = structlog.get_logger()

FLUSH_SECONDS = 60
MAX_GATHERED = 100_000
"""Paths that are gathered between two flushes, at most; those beyond are noted when they are asked for again."""

_BATCH = 1000


class Usage:
    """Gathers paths that were asked for, by their index keys (`<cache>/<hash part>`)."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._gathered: set[bytes] = set()

    def add(self, key: bytes) -> None:
        """A path was asked for."""
        if len(self._gathered) < MAX_GATHERED:
            self._gathered.add(key)

    def noter(self) -> Callable[[bytes], None]:
        """`add`, for many in a row without looking at the limit each time."""
        gathered = self._gathered if len(self._gathered) < MAX_GATHERED else set()
        return gathered.add

    async def run(self) -> None:
        """Flush from time to time, for ever."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write what was gathered. What the catalog does not take is lost: it is a hint, not a promise."""
        gathered, self._gathered = self._gathered, set()
        used: dict[str, list[str]] = defaultdict(list)
        for key in gathered:
            cache, _, hash_part = key.decode("ascii").partition("/")
            used[cache].append(hash_part)
        now = int(time.time())
        try:
            for cache, hash_parts in used.items():
                for start in range(0, len(hash_parts), _BATCH):
                    await self._catalog.touch(cache, dict.fromkeys(hash_parts[start : start + _BATCH], now))
        except StoreError as error:
            _log.warning("the last use of paths was not noted", error=str(error))
