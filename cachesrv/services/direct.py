"""NARs that clients write to storage themselves: staged where nobody is served from, read back and checked, published.

What was checked is what is published, since a staged object that is complete changes no more, and each has a key of its
own (`cachesrv.storage.base.DirectStore`).
"""

from __future__ import annotations

from secrets import token_hex
from typing import TYPE_CHECKING

from cachetools import TTLCache
from msgspec.structs import replace

from cachesrv.errors import BadInput, NotFound
from cachesrv.services.part_store import Begun, Staged
from cachesrv.services.through import file_name
from cachesrv.storage.base import ArrivedPart

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from cachesrv.catalog.base import NarRecord
    from cachesrv.nix.hashes import Hash
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.ingest import Ingest
    from cachesrv.services.part_store import PartStore, Place
    from cachesrv.storage.base import DirectStore, ObjectStore, SignedPut

_REMEMBERED = 1000
_REMEMBERED_SECONDS = 300.0


class Direct:
    """`offered`: clients may begin such uploads. Raises StoreError."""

    def __init__(
        self, parts: PartStore, storage: ObjectStore, store: DirectStore, ingest: Ingest, *, offered: bool
    ) -> None:
        self.offered = offered
        self.least = store.least
        self.most = store.most
        self._parts = parts
        self._storage = storage
        self._store = store
        self._ingest = ingest
        self._read: dict[Place, int] = {}
        self._remembered: TTLCache[Place, Staged] = TTLCache(_REMEMBERED, _REMEMBERED_SECONDS)

    async def begin(self, place: Place, staged: Staged | None) -> tuple[Staged, list[ArrivedPart]]:
        """An upload, that one if it is still to be had, and the parts of it that are there."""
        if staged:
            key = place.staged_key(staged.name)
            parts = await self._store.parts(key, staged.id)
            if parts is None and staged.tags and await self._storage.head(key):
                # All of it is there, and nobody has come to check it.
                parts = [ArrivedPart(number, 0, tag, 0.0) for number, tag in enumerate(staged.tags, 1)]
            if parts is not None:
                return staged, parts
        name = token_hex(8)
        staged = self._remembered[place] = Staged(name, await self._store.begin(place.staged_key(name)))
        return staged, []

    async def sign(self, place: Place, number: int, md5: bytes) -> SignedPut:
        """For a part with this MD5. Raises BadInput, NotFound when there is no such upload."""
        if not 1 <= number <= self._store.most:
            raise BadInput(f"there is no part {number}: they are counted from 1 to {self._store.most}")
        staged = self._remembered.get(place)
        if staged is None:
            begun = await self._parts.begun(place)
            if begun is None or begun.staged is None:
                raise NotFound("there is no such upload: begin it, or look whether the NAR is there by now")
            staged = self._remembered[place] = begun.staged
        return await self._store.sign(place.staged_key(staged.name), staged.id, number, md5)

    async def missing(self, place: Place, begun: Begun, tags: Sequence[str]) -> list[int]:
        """Numbers of the parts with these tags that are not there; when there are none, the object is complete."""
        assert begun.staged
        staged, key = begun.staged, place.staged_key(begun.staged.name)
        parts = await self._store.parts(key, staged.id)
        if parts is None:
            complete = staged.tags == tuple(tags) and await self._storage.head(key)
            return [] if complete else [*range(1, len(tags) + 1)]
        there = {part.number: part for part in parts}
        missing = [number for number, tag in enumerate(tags, 1) if number not in there or there[number].tag != tag]
        if not missing:
            self._ingest.check_size(sum(there[number].size for number in range(1, len(tags) + 1)))
            await self._parts.begin(place, replace(begun, staged=replace(staged, tags=tuple(tags))))
            await self._store.complete(key, staged.id, tags)
        return missing

    async def make(self, cache: ServedCache, place: Place, nar_hash: Hash, staged: Staged) -> NarRecord:
        """The NAR out of a complete object. Raises BadInput when it is not that, NotFound when it has gone."""
        key = place.staged_key(staged.name)

        async def read() -> AsyncIterator[bytes]:
            self._read[place] = 0
            async for chunk in self._storage.read(key):
                self._read[place] += len(chunk)
                yield chunk

        async def publish(to: str) -> bool:
            return await self._store.publish(key, to)

        try:
            return await self._ingest.take_over(cache, file_name(nar_hash), read(), publish)
        finally:
            self._read.pop(place, None)

    def progress(self, place: Place) -> int:
        """Bytes of it that have been read."""
        return self._read.get(place, 0)

    async def abort(self, place: Place, staged: Staged) -> None:
        """Forget the parts; what is complete is left to `PartStore.remove`."""
        self._remembered.pop(place, None)
        await self._store.abort(place.staged_key(staged.name), staged.id)

    async def is_silent(self, place: Place, staged: Staged, before: float) -> bool:
        """Whether no part has come since then, in seconds since the epoch."""
        parts = await self._store.parts(place.staged_key(staged.name), staged.id)
        return all(part.modified < before for part in parts or ())

    async def sweep(self, *, older_than: float) -> int:
        """Forget what is noted nowhere and silent for so many seconds; how many there were."""
        return await self._store.sweep(older_than=older_than)
