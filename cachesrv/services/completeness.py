"""Whether the catalog knows all paths that lie in storage.

It does not when it was lost and begun anew, until a reindex has come to its end. What it does not know may be there all
the same until then: lookups ask storage as well, and nothing is collected, since NARs may have users that nobody knows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

import structlog

from cachesrv.errors import StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cachesrv.catalog.base import Catalog
    from cachesrv.services.caches import ServedCache
    from cachesrv.storage.base import ObjectStore

_log = structlog.get_logger()

_NO = "no"
_ALWAYS = "0"
_SURE_AFTER = 60
"""Seconds after a reindex for which storage is still asked: so long no lookup takes, that asked the catalog before."""
_ASKED_AGAIN = 1.0
_GONE = "nothing lies in storage of what is published: make sure that it is mounted, and the right one"
_LOOKING = 5.0
"""Seconds for all caches; a storage that cannot be reached does not hold up a start."""


class Completeness:
    """Kept as a note of the catalog for each cache: `no`, or since when it is complete. Without a note nothing is known
    yet, which is as `no`.
    """

    def __init__(self, storage: ObjectStore, catalog: Catalog, *, clock: Callable[[], float] = time.time) -> None:
        self._storage = storage
        self._catalog = catalog
        self._clock = clock
        self._asked_at: dict[str, float] = {}
        self._complete: set[str] = set()

    async def find_out(self, caches: Iterable[ServedCache]) -> list[str]:
        """Find out what is not known yet: a catalog is incomplete that knows nothing, while narinfos lie in storage.
        Returns the names of caches of which it is known to be. Raises StoreError where the catalog cannot be read.
        """
        caches = list(caches)
        for cache in caches:
            if await self._catalog.noted(_note(cache)) is None:
                empty = not (await self._catalog.count(cache.name))[0]
                try:
                    complete = not (empty and await self._lies_there(cache))
                    await self._catalog.note(_note(cache), _ALWAYS if complete else _NO)
                except StoreError as error:
                    _log.warning("it was not found out what lies in storage", cache=cache.name, error=str(error))
        return [cache.name for cache in caches if await self._catalog.noted(_note(cache)) == _NO]

    async def tell(self, caches: Iterable[ServedCache]) -> None:
        """Find it out, and put into the log what the operator has to do about it. Raises StoreError as `find_out`."""
        caches = list(caches)
        if incomplete := await self.find_out(caches):
            _log.warning("the catalog is incomplete: run `cachesrv reindex`", caches=incomplete)
        await asyncio.gather(*map(self._tell_if_gone, caches))

    async def reached(self, cache: ServedCache) -> None:
        """All that lies in storage has been taken in."""
        if await self._catalog.noted(_note(cache)) in (None, _NO):
            await self._catalog.note(_note(cache), str(int(self._clock())))

    async def holds(self, cache: ServedCache) -> bool:
        """Whether what the catalog does not know is not there. Raises StoreError."""
        if cache.name in self._complete:
            return True
        # Clocks are set back, too.
        if abs(self._clock() - self._asked_at.get(cache.name, 0.0)) >= _ASKED_AGAIN:
            since = await self._catalog.noted(_note(cache))
            self._asked_at[cache.name] = self._clock()
            if since not in (None, _NO) and abs(self._clock() - int(since)) >= _SURE_AFTER:
                self._complete.add(cache.name)
        return cache.name in self._complete

    def is_known(self, cache: ServedCache) -> bool:
        """Whether it was found before that what the catalog does not know is not there."""
        return cache.name in self._complete

    async def demand(self, caches: Iterable[ServedCache]) -> None:
        """Raises StoreUnavailable where it is known not to hold."""
        for cache in caches:
            if await self._catalog.noted(_note(cache)) == _NO:
                raise StoreUnavailable(
                    f"the catalog does not know all that lies in storage for {cache.name}: run `cachesrv reindex` first"
                )

    async def _tell_if_gone(self, cache: ServedCache) -> None:
        try:
            async with asyncio.timeout(_LOOKING):
                if await self._is_gone(cache):
                    _log.error(_GONE, cache=cache.name)
        except (StoreError, TimeoutError) as error:
            _log.warning("it was not found out what lies in storage", cache=cache.name, error=str(error))

    async def _is_gone(self, cache: ServedCache) -> bool:
        """Whether there is nothing in storage, although the catalog knows paths."""
        published = self._catalog.scan(cache.name)
        first = await anext(published, None)
        if isinstance(published, AsyncGenerator):
            await published.aclose()
        if first is None or await self._storage.head(cache.narinfo_key(first.hash_part)) is not None:
            return False
        return not await self._lies_there(cache)

    async def _lies_there(self, cache: ServedCache) -> bool:
        prefix = cache.key("")
        listed = self._storage.list(prefix)
        try:
            async for info in listed:
                name = info.key[len(prefix) :]
                if name.endswith(".narinfo") and "/" not in name:
                    return True
        finally:
            if isinstance(listed, AsyncGenerator):
                await listed.aclose()
        return False


def _note(cache: ServedCache) -> str:
    return f"complete {cache.name}"
