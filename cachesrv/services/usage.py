"""When paths were last used: gathered in memory by lookups, written to the catalog in batches, never by a lookup."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import structlog

from cachesrv.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cachesrv.catalog.base import Catalog

_log = structlog.get_logger()

FLUSH_SECONDS = 60
MAX_GATHERED = 100_000
"""Paths that are gathered between two flushes, at most; those beyond are noted when they are asked for again."""
RESOLUTION = 1800
"""Seconds. What was noted a shorter time ago is not noted again: popular paths would cost a write in every minute."""
MAX_NOTED = 200_000
"""Paths and NARs of which that is remembered, about."""

_BATCH = 1000


class Usage:
    """Gathers paths that were asked for, by their index keys (`<cache>/<hash part>`). `resolution`: seconds by which
    what the catalog says may lie behind.
    """

    def __init__(self, catalog: Catalog, *, resolution: float = RESOLUTION) -> None:
        self._catalog = catalog
        self._resolution = resolution
        self._gathered: set[bytes] = set()
        self._nars: set[str] = set()
        self._noted: set[bytes | str] = set()
        self._noted_since = 0.0

    def add(self, key: bytes) -> None:
        """A path was asked for."""
        if len(self._gathered) < MAX_GATHERED:
            self._gathered.add(key)

    def add_nar(self, key: str) -> None:
        """A NAR was asked for, by its storage key: clients remember narinfos, and come for the NAR alone."""
        if len(self._nars) < MAX_GATHERED:
            self._nars.add(key)

    async def run(self) -> None:
        """Flush from time to time, for ever."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()

    async def flush(self) -> None:
        """Write what was gathered. What the catalog does not take is lost: it is a hint, not a promise."""
        gathered, self._gathered = self._gathered, set()
        nars, self._nars = self._nars, set()
        now = time.time()
        # A clock that has been set back would leave it so until it comes there again.
        if abs(now - self._noted_since) > self._resolution or len(self._noted) > MAX_NOTED:
            self._noted, self._noted_since = set(), now
        used: dict[str, list[str]] = defaultdict(list)
        for key in gathered - self._noted:
            cache, _, hash_part = key.decode("ascii").partition("/")
            used[cache].append(hash_part)
        try:
            for cache, hash_parts in used.items():
                for some in _batches(hash_parts):
                    await self._catalog.touch(cache, dict.fromkeys(some, int(now)))
            for some in _batches(list(nars - self._noted)):
                await self._catalog.touch_nars(some, int(now))
        except StoreError as error:
            _log.warning("the last use of paths was not noted", error=str(error))
        else:
            self._noted |= gathered
            self._noted |= nars


def _batches(values: list[str]) -> Iterator[list[str]]:
    return (values[start : start + _BATCH] for start in range(0, len(values), _BATCH))
