"""Paths that lie in storage and that the catalog does not know, published when somebody relies on them.

That is so in storage that others write to, and while a lost catalog is rebuilt: clients have been told that these paths
are there, and push what refers to them.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix import narinfo
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.findings import Listed
from cachesrv.services.flaws import Kind
from cachesrv.services.judging import flawed, judge, record_of, with_nar
from cachesrv.services.several import several
from cachesrv.services.visible import hidden, nar_hashes

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from cachesrv.catalog.base import Catalog, PathRecord
    from cachesrv.index.base import Index
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.completeness import Completeness
    from cachesrv.services.findings import Finding, FoundPath
    from cachesrv.storage.base import ObjectStore

_HASH_PART = 32
_MOST = 20_000
"""Paths that are taken in at once: larger closures wait for a reindex."""
_AT_A_TIME = 32


class Taking:
    """Where the catalog is said to hold all, and nobody else writes, nothing is looked for."""

    def __init__(self, storage: ObjectStore, catalog: Catalog, index: Index, completeness: Completeness) -> None:
        self._storage = storage
        self._catalog = catalog
        self._index = index
        self._completeness = completeness

    async def take(self, cache: ServedCache, hash_parts: Collection[str]) -> set[str]:
        """Publish those of them that lie in storage, with all that they refer to; which are published now. Raises
        StoreError.
        """
        if not hash_parts or (await self._completeness.holds(cache) and not cache.bucket_is_authority):
            return set()
        fence = await self._catalog.fence()
        paths, known = await self._closure(cache, set(hash_parts))
        if cache.references is ReferencePolicy.STRICT:
            _drop_incomplete(paths, known)
        records = [record_of(cache, hash_part, path) for hash_part, path in paths.items()]
        await self._publish(cache, records, fence)
        return await self._catalog.present(cache.name, hash_parts)

    async def deleted(self, cache: ServedCache, hash_parts: Collection[str]) -> set[str]:
        """Those of them that the catalog has, and others have deleted from storage that they write to. What the index
        answers for is taken to be there. Raises StoreError.
        """
        if not cache.bucket_is_authority:
            return set()
        unsure = await hidden(self._index, cache, hash_parts)
        keys = {one: cache.narinfo_key(one) for one in await self._catalog.present(cache.name, unsure)}
        there = await self._storage.existing(keys.values())
        return {one for one, key in keys.items() if key not in there}

    async def _closure(self, cache: ServedCache, wanted: set[str]) -> tuple[dict[str, FoundPath], set[str]]:
        """What is found of paths and all that they refer to; and those of these that are published."""
        paths: dict[str, FoundPath] = {}
        known: set[str] = set()
        looked_for: set[str] = set()
        while wanted and len(paths) < _MOST:
            looked_for |= wanted
            published = await self._catalog.present(cache.name, wanted)
            known |= published
            parts = sorted(wanted - published)
            findings = await several(partial(self._found, cache), parts, at_a_time=_AT_A_TIME)
            new = {
                part: finding.path for part, finding in zip(parts, findings, strict=True) if finding and finding.path
            }
            paths |= new
            wanted = {name[:_HASH_PART] for path in new.values() for name in path.references} - looked_for
        return paths, known

    async def _found(self, cache: ServedCache, hash_part: str) -> Finding | None:
        return await found(self._storage, cache, hash_part)

    async def _publish(self, cache: ServedCache, records: Sequence[PathRecord], fence: int) -> None:
        keys = [cache.narinfo_key(record.hash_part) for record in records]
        otherwise = await self._catalog.restore(records, used_at=int(time.time()), objects=keys)
        if records and await self._catalog.fence() != fence:
            # What was found in storage may have been deleted before it was published; it cannot be any more.
            there = await several(self._storage.head, keys, at_a_time=_AT_A_TIME)
            gone = {record.hash_part for record, info in zip(records, there, strict=True) if info is None}
            await self._catalog.remove(cache.name, gone - otherwise.keys())
            records = [record for record in records if record.hash_part not in gone]
        await nar_hashes(self._catalog, self._index, cache, [record.hash_part for record in records])


def _drop_incomplete(paths: dict[str, FoundPath], known: Collection[str]) -> None:
    """Leave out what refers to what is not there, again and again."""
    while dangling := [
        part
        for part, path in paths.items()
        if any(
            name[:_HASH_PART] not in paths and name[:_HASH_PART] not in known and name[:_HASH_PART] != part
            for name in path.references
        )
    ]:
        for part in dangling:
            del paths[part]


async def found(storage: ObjectStore, cache: ServedCache, hash_part: str) -> Finding | None:
    """What is found of a path in storage now; None when there is no narinfo. Raises StoreError."""
    key = cache.narinfo_key(hash_part)
    info = await storage.head(key)
    if info is None:
        return None
    listed = Listed(hash_part, info.size, info.modified)
    try:
        text = await storage.get(key, limit=narinfo.DEFAULT_LIMIT)
    except TooLarge as error:
        return flawed(listed, Kind.UNREADABLE_NARINFO, str(error))
    finding = judge(cache, listed, text) if text is not None else None
    if finding is None or finding.path is None:
        return finding
    try:
        nar = await storage.head(cache.key(f"nar/{finding.path.nar}"))
    except BadInput:
        nar = None
    return with_nar(finding, nar.size if nar else None)
