"""Admitted paths written to all stores, in order: listings and narinfos to storage, then the catalog, then the index.

What lies in storage already may just be being removed. The catalog tells: it refuses what is about to go, and by its
fence shows that something went meanwhile; then storage is looked at again.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachesrv.catalog.retention import Reliance
from cachesrv.errors import BadInput, BeingRemoved, Conflict
from cachesrv.index.base import Absent, IndexEntry, Present
from cachesrv.nix import narinfo
from cachesrv.nix.compression import decompress
from cachesrv.nix.store_path import HASH_PART_LENGTH
from cachesrv.services.answer import present
from cachesrv.services.verify_nar import LISTING_LIMIT

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from cachesrv.catalog.base import Catalog, NarRecord, PathRecord
    from cachesrv.index.base import Index
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.ingest import Ingest
    from cachesrv.storage.base import ObjectStore


@dataclass(frozen=True, slots=True)
class Admitted:
    """A path that passed all checks. `listing` is its `.ls` object, None where it has or can have none; `relies_on` are
    the hash parts of what it refers to in the cache itself.
    """

    cache: ServedCache
    record: PathRecord
    listing: bytes | None
    relies_on: Collection[str]

    @property
    def narinfo_key(self) -> str:
        return self.cache.narinfo_key(self.record.hash_part)

    @property
    def listing_key(self) -> str:
        return self.cache.listing_key(self.record.hash_part)


class Writing:
    """Makes them visible, or raises and leaves garbage at worst."""

    def __init__(self, storage: ObjectStore, catalog: Catalog, index: Index, ingest: Ingest) -> None:
        self._storage = storage
        self._catalog = catalog
        self._index = index
        self._ingest = ingest
        self._described: dict[str, bytes] = {}

    async def write(self, batch: Sequence[Admitted]) -> None:
        """Write paths, each after those that it refers to. Raises Conflict, MissingReferences, MissingNar for what the
        stores do not let in, BeingRemoved, StoreError.
        """
        objects = [key for path in batch for key in (path.narinfo_key, path.listing_key)]
        fence = await self._catalog.fence(objects)
        await self._describe({path.cache.name: path.cache for path in batch})
        await self._write_objects(batch)
        await self._doubt(batch)
        epoch = self._index.epoch()
        reliance = Reliance(_by_cache(batch), objects)
        if await self._catalog.publish([path.record for path in batch], reliance) != fence:
            await self._write_again(batch)
        await self._reveal(batch, epoch)

    async def listing(self, cache: ServedCache, hash_part: str, nar: NarRecord) -> bytes | None:
        """The listing that was made when the NAR was read; another path with the same NAR may have taken it."""
        if await self._storage.head(cache.listing_key(hash_part)):
            return None
        listing = await self._ingest.listing(cache, nar)
        return decompress("zstd", listing, LISTING_LIMIT) if listing else None

    async def _write_again(self, batch: Sequence[Admitted]) -> None:
        """What was found in storage may have been removed before it was published; it cannot be any more."""
        for path in batch:
            if await self._storage.head(path.narinfo_key) is None:
                await self._storage.put(path.narinfo_key, path.record.narinfo)
            nar = await self._catalog.nar(path.record.nar_key)
            listing = await self.listing(path.cache, path.record.hash_part, nar) if nar else None
            if listing:
                await self._storage.put(path.listing_key, listing)

    async def _doubt(self, batch: Sequence[Admitted]) -> None:
        """Have the index hold on to nothing against what the catalog is about to say: killed between the two, it would
        go on to answer with an absence, or with a narinfo from before.
        """
        known = {(path.cache.name, path.record.hash_part) for path in batch}
        answers = {key: self._index.get(*key) for key in known}
        absent = [key for key, answer in answers.items() if isinstance(answer, Absent)]
        if absent:  # not deleted, which would hold up all others who are about to write
            await asyncio.to_thread(self._index.put_absent, absent, until=0)
        older = [key for key, answer in answers.items() if isinstance(answer, Present)]
        if older:
            await asyncio.to_thread(self._index.delete, older)

    async def _reveal(self, batch: Sequence[Admitted], epoch: int) -> None:
        """Have the index answer for them, but not for what was deleted meanwhile."""
        entries = [IndexEntry(path.cache.name, path.record.hash_part, present(path.record.narinfo)) for path in batch]
        while not await asyncio.to_thread(self._index.put, entries, epoch=epoch):
            epoch = self._index.epoch()
            hash_parts: dict[str, set[str]] = defaultdict(set)
            for path in batch:
                hash_parts[path.cache.name].add(path.record.hash_part)
            records = [await self._catalog.paths(cache, those) for cache, those in hash_parts.items()]
            entries = [
                IndexEntry(record.cache, hash_part, present(record.narinfo))
                for found in records
                for hash_part, record in found.items()
            ]

    async def _describe(self, caches: dict[str, ServedCache]) -> None:
        """The objects of a cache are one without us as well: they begin with what it says of itself."""
        for cache in caches.values():
            if self._described.get(cache.name) != cache.info:
                await self._storage.put(cache.key("nix-cache-info"), cache.info, replace=True)
                self._described[cache.name] = cache.info

    async def _write_objects(self, batch: Sequence[Admitted]) -> None:
        """Create listings and narinfos. A narinfo that is there already is replaced when it is of the same NAR (it
        gains signatures), or is no narinfo. One of another NAR, which the catalog does not know, was left by a crash or
        put there by somebody else.
        """
        listings = {path.listing_key: path.listing for path in batch if path.listing}
        records = {path.narinfo_key: path.record for path in batch}
        levels = ({key: records[key].narinfo for key in level} for level in _levels(batch))
        created = await self._storage.put_in_order([listings, *levels])
        for key in records.keys() - created:
            there = await self._storage.get(key, limit=narinfo.DEFAULT_LIMIT)
            if there is None:
                raise BeingRemoved(f"{key} was there a moment ago and is gone; try again")
            if there == records[key].narinfo:
                continue
            other = _nar_hash(there)
            if other and other != records[key].nar_hash:
                raise Conflict(
                    f"{records[key].name} lies in storage with the NAR hash {other} and was pushed with "
                    f"{records[key].nar_hash}; `cachesrv reindex` publishes what lies in storage"
                )
            await self._storage.put(key, records[key].narinfo, replace=True)


def _levels(batch: Sequence[Admitted]) -> list[list[str]]:
    """Keys of narinfos: those that need no other one of the batch, those that need only these, and so on. Written in
    this order, a crash leaves none without those that it refers to.

    In the batch each path comes after those that it refers to.
    """
    depths: dict[str, int] = {}
    levels: list[list[str]] = []
    for path in batch:
        needed = (path.cache.narinfo_key(reference[:HASH_PART_LENGTH]) for reference in path.record.references)
        depth = max((depths[key] + 1 for key in needed if key in depths), default=0)
        key = path.cache.narinfo_key(path.record.hash_part)
        depths[key] = depth
        if depth == len(levels):
            levels.append([])
        levels[depth].append(key)
    return levels


def _by_cache(batch: Sequence[Admitted]) -> dict[str, set[str]]:
    """What they rely on, by the names of their caches."""
    relied_on: dict[str, set[str]] = defaultdict(set)
    for path in batch:
        relied_on[path.cache.name].update(path.relies_on)
    return relied_on


def _nar_hash(text: bytes) -> str | None:
    try:
        return narinfo.parse(text).nar_hash.nix32
    except BadInput:
        return None
