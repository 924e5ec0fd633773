"""How a NAR reaches a client: from a file of this host, by a redirect, or as it comes from where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol

from cachesrv.errors import Mismatch
from cachesrv.nix.hashes import Hash
from cachesrv.storage.base import ByteRange, LocalFile, PresignedUrl, Stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from cachesrv.catalog.base import Catalog, NarRecord
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.fetch import Fetch, Fetches, Remote
    from cachesrv.services.ingest import Ingest
    from cachesrv.storage.base import ObjectCache, ObjectStore


@dataclass(frozen=True, slots=True)
class Following:
    """The object is being fetched: follow it."""

    fetch: Fetch


NarDelivery = LocalFile | PresignedUrl | Stream | Following


class Origin(Protocol):
    """Somebody who may have a NAR that storage has not."""

    async def remote(self, cache: ServedCache, name: str, hash_part: str | None) -> Remote | None:
        """The NAR `nar/<name>` as it can be had there; None when it cannot. `hash_part` is that of a path that it is
        asked for, if that was said. Raises PeerError.
        """


@dataclass(frozen=True, slots=True)
class FarAway:
    """What it takes where NARs are not all files of this host: the disk cache, and the fetches that fill it.
    `storage_is_local`: those in storage are files of this host.
    """

    disk_cache: ObjectCache
    fetches: Fetches
    origin: Origin | None
    storage_is_local: bool


class Delivery:
    """Opens NARs."""

    def __init__(self, storage: ObjectStore, catalog: Catalog, ingest: Ingest, far_away: FarAway | None = None) -> None:
        self._storage = storage
        self._catalog = catalog
        self._ingest = ingest
        self._far_away = far_away

    def at_once(self, key: str, *, limit: int) -> bytes | memoryview | None:
        """As `ObjectStore.at_once`, from storage or from the disk cache."""
        content = self._storage.at_once(key, limit=limit)
        if content is None and self._far_away:
            content = self._far_away.disk_cache.at_once(key, limit=limit)
        return content

    async def size(self, cache: ServedCache, name: str, hash_part: str | None) -> int | None:
        """The bytes of `nar/<name>`, None when there is no such NAR. Raises StoreError, PeerError."""
        size = await self._size_in_storage(cache.key(f"nar/{name}"))
        if size is None and (remote := await self._remote(cache, name, hash_part)):
            return remote.size
        return size

    async def open(self, cache: ServedCache, name: str, hash_part: str | None) -> NarDelivery | None:
        """The best way to `nar/<name>`, None when there is no such NAR. Raises StoreError, PeerError."""
        key = cache.key(f"nar/{name}")
        far_away = self._far_away
        if far_away is None or far_away.storage_is_local:
            delivery = await self._storage.delivery(key)
            if delivery or far_away is None:
                return delivery
        if kept := await far_away.disk_cache.get(key):
            return kept
        if fetch := far_away.fetches.under_way(key):
            return Following(fetch)
        if not far_away.storage_is_local and (found := await self._from_afar(key)):
            return found
        remote = await self._remote(cache, name, hash_part)
        return Following(far_away.fetches.start(remote)) if remote else None

    async def _from_afar(self, key: str) -> NarDelivery | None:
        """A NAR in a store that is not of this host. A redirect is given only to what is known to be there."""
        record = await self._catalog.nar(key)
        size = record.file_size if record else await self._size_in_storage(key)
        if size is None or self._far_away is None:
            return None
        delivery = await self._storage.delivery(key)
        if isinstance(delivery, Stream):
            stored = StoredNar(self._storage, self._ingest, key, size=size, record=record)
            return Following(self._far_away.fetches.start(stored))
        return delivery

    async def _size_in_storage(self, key: str) -> int | None:
        # A file is looked at; a question to a bucket is saved where the catalog knows the answer.
        if self._far_away and not self._far_away.storage_is_local and (record := await self._catalog.nar(key)):
            return record.file_size
        info = await self._storage.head(key)
        return info.size if info else None

    async def _remote(self, cache: ServedCache, name: str, hash_part: str | None) -> Remote | None:
        if self._far_away is None or self._far_away.origin is None:
            return None
        return await self._far_away.origin.remote(cache, name, hash_part)


class StoredNar:
    """A NAR in a store that is not of this host, on its way to the disk cache; a `Remote`."""

    def __init__(self, storage: ObjectStore, ingest: Ingest, key: str, *, size: int, record: NarRecord | None) -> None:
        self.key = key
        self.size = size
        self.keep = True
        self._storage = storage
        self._ingest = ingest
        self._record = record

    async def read(self, start: int) -> AsyncGenerator[bytes, None]:
        """See Remote."""
        async for chunk in self._storage.read(self.key, ByteRange(start, self.size)):
            yield chunk

    async def receive(self, chunks: AsyncIterator[bytes]) -> None:
        """See Remote. A NAR that somebody else put there is judged by its name, which has one of its hashes."""
        if self._record is None:
            await self._ingest.examine(self.key.rpartition("/")[2], chunks)
            return
        hasher = sha256()
        async for chunk in chunks:
            hasher.update(chunk)
        found = Hash("sha256", hasher.digest()).nix32
        if found != self._record.file_hash:
            raise Mismatch(f"{self.key} has the hash {found}, not {self._record.file_hash}")
