"""Taking paths and NARs away, in one order: out of the index, out of the catalog, and then the objects in storage.

A path is out of sight first, and what it needs stays until then. A crash leaves objects that nobody refers to; the
catalog knows which, and whoever deletes next removes them (`finish`).
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING

from cachesrv.nix.store_path import is_hash_part

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping

    from cachesrv.catalog.base import Catalog
    from cachesrv.catalog.retention import Removal, Removed
    from cachesrv.index.base import Index
    from cachesrv.services.caches import ServedCache
    from cachesrv.storage.base import ObjectStore

_NARINFO = ".narinfo"
_REALISATION = re.compile(r"(?:\A|/)(?:realisations|build-trace-v2/[^/]+)/[^/]+\.doi\Z")
_HELD = 300
"""Seconds for which the index does not answer for paths that are being removed, if nobody says that they are."""


def objects_of(cache: ServedCache, hash_part: str) -> tuple[str, str]:
    """The objects that belong to one path alone."""
    return cache.narinfo_key(hash_part), cache.listing_key(hash_part)


def siblings_of(cache: ServedCache, caches: Mapping[str, ServedCache]) -> tuple[str, ...]:
    """The other caches that have the same objects."""
    return tuple(name for name, other in caches.items() if other.prefix == cache.prefix and name != cache.name)


class Removing:
    """Only for who holds the lock of `cachesrv.services.maintenance`."""

    def __init__(self, storage: ObjectStore, catalog: Catalog, index: Index) -> None:
        self._storage = storage
        self._catalog = catalog
        self._index = index

    async def finish(self, caches: Mapping[str, ServedCache]) -> int:
        """Remove what others had begun to remove when they died; how many objects. What goes for its contents alone
        stays: it may have become good before they could look again, and who finds it wrong begins anew.
        """
        number = 0
        while doomed := await self._catalog.doomed():
            going = [key for key in doomed if not _REALISATION.search(key)]
            await self._delete(going, [path for key in going for path in _paths_of(key, caches)])
            await self._catalog.settle(set(doomed).difference(going))
            number += len(going)
        return number

    async def paths(self, removal: Removal, paths: Mapping[int, str]) -> Removed:
        """Remove paths, given by their numbers with their hash parts, but for those that something keeps."""
        # Otherwise one of them that is looked up just now would still be there when others are not that it refers to.
        held = [(removal.cache, hash_part) for hash_part in paths.values()]
        await asyncio.to_thread(self._index.hold, held, int(time.time()) + _HELD)
        removed = await self._catalog.remove_unneeded(removal, paths)
        gone = [(removal.cache, summary.hash_part) for summary in removed.gone]
        await self._forget(sorted(set(held).difference(gone)))
        await self._delete(removed.doomed, gone)
        return removed

    async def nars(self, keys: Collection[str], *, holder: str, before: int, now: int) -> list[str]:
        """Remove NARs that are unused since `before`; those that were."""
        doomed = await self._catalog.doom(keys, holder=holder, before=before, now=now)
        await self._delete(doomed, [])
        return doomed

    async def damaged(self, keys: Collection[str], *, holder: str) -> list[str]:
        """Remove NARs that are no good, but for those that a path names; those that were."""
        doomed = await self._catalog.doom_damaged(keys, holder=holder)
        await self._delete(doomed, [])
        return doomed

    async def unpublished(
        self, caches: Collection[ServedCache], objects: Mapping[str, Collection[str]], *, holder: str
    ) -> list[str]:
        """Remove objects, given by hash part, of paths that none of these caches has published; those that were."""
        doomed = await self._catalog.doom_unpublished([cache.name for cache in caches], objects, holder=holder)
        await self._delete(doomed, [(cache.name, hash_part) for cache in caches for hash_part in objects])
        return doomed

    async def metadata(self, key: str, is_wrong: Callable[[], Awaitable[bool]], *, holder: str) -> bool:
        """Remove an object that belongs to no path, if it `is_wrong` still when nobody is writing it any more; whether
        it was.
        """
        doomed = await self._catalog.doom_unpublished((), {"": [key]}, holder=holder)
        wrong = False
        try:
            wrong = await is_wrong()
        finally:
            if not wrong:
                await self._catalog.settle(doomed)
        if wrong:
            await self._delete(doomed, [])
        return wrong

    async def _delete(self, doomed: list[str], paths: list[tuple[str, str]]) -> None:
        """Delete objects, and have the index forget what was looked up while they were still there."""
        if doomed:
            await self._storage.delete(doomed)
        await self._forget(paths)
        if doomed:
            await self._catalog.settle(doomed)

    async def _forget(self, paths: list[tuple[str, str]]) -> None:
        if paths:
            await asyncio.to_thread(self._index.delete, paths)


def _paths_of(key: str, caches: Mapping[str, ServedCache]) -> list[tuple[str, str]]:
    """Of the key of a narinfo, the path in all caches that have this object."""
    prefix, _, name = key.rpartition("/")
    hash_part = name.removesuffix(_NARINFO)
    if name == hash_part or not is_hash_part(hash_part):
        return []
    return [(cache.name, hash_part) for cache in caches.values() if cache.prefix == prefix]
