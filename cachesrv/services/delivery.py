"""How a NAR reaches a client: from a file of this host, by a redirect, or as it comes from where it lies."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from cachesrv.errors import StoreError
from cachesrv.services.alone import read_alone
from cachesrv.services.patience import waiting
from cachesrv.services.stored_nar import StoredNar
from cachesrv.storage.base import LocalFile, PresignedUrl, Stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from cachesrv.catalog.base import Catalog, NarRecord
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.fetch import Fetches, Remote
    from cachesrv.services.ingest import Ingest
    from cachesrv.storage.base import ByteRange, FilePart, ObjectCache, ObjectStore


@dataclass(frozen=True, slots=True)
class Coming:
    """The object comes from afar: `read` gives a part of its `size` bytes, as they come or where they lie by then."""

    size: int
    read: Callable[[ByteRange], AsyncIterator[bytes | FilePart]]


NarDelivery = LocalFile | PresignedUrl | Coming


class Origin(Protocol):
    """Somebody who may have a NAR that storage has not."""

    async def remote(self, cache: ServedCache, name: str, hash_part: str | None) -> Remote | None:
        """The NAR `nar/<name>` as it can be had there; None when it cannot. `hash_part` is that of a path that it is
        asked for, if that was said. Raises PeerError.
        """


@dataclass(frozen=True, slots=True)
class FarAway:
    """What it takes where NARs are not all files of this host: the disk cache, and the fetches that fill it.

    `storage_is_local`: those in storage are files of this host; `redirect`: where they are not, clients are sent there;
    `patience`: seconds for which it is waited to be told whether one is there.
    """

    disk_cache: ObjectCache
    fetches: Fetches
    origin: Origin
    storage_is_local: bool
    redirect: bool
    patience: float


class Delivery:
    """Opens NARs."""

    def __init__(self, storage: ObjectStore, catalog: Catalog, ingest: Ingest, far_away: FarAway) -> None:
        self._storage = storage
        self._catalog = catalog
        self._ingest = ingest
        self._far_away = far_away

    def at_once(self, key: str, *, limit: int) -> bytes | memoryview | None:
        """As `ObjectStore.at_once`, from storage or from the disk cache."""
        content = self._storage.at_once(key, limit=limit)
        return self._far_away.disk_cache.at_once(key, limit=limit) if content is None else content

    def warm_file(self, key: str, *, limit: int) -> tuple[int, int] | None:
        """As `ObjectStore.warm_file`, from storage or from the disk cache."""
        found = self._storage.warm_file(key, limit=limit)
        return self._far_away.disk_cache.warm_file(key, limit=limit) if found is None else found

    async def size(self, cache: ServedCache, name: str, hash_part: str | None) -> int | None:
        """The bytes of `nar/<name>`, None when there is no such NAR. Raises StoreError, PeerError."""
        _, size = await self._known(cache.key(f"nar/{name}"))
        if size is not None:
            return size
        remote = await self._far_away.origin.remote(cache, name, hash_part)
        if remote is None:
            return None
        if remote.size is None:
            await self._far_away.fetches.start(remote).done()
            return await self.size(cache, name, None)
        return remote.size

    async def open(
        self, cache: ServedCache, name: str, hash_part: str | None, *, not_at: str = ""
    ) -> NarDelivery | None:
        """The best way to `nar/<name>`, None when there is no such NAR; no redirect to the host `not_at`. Raises
        StoreError, PeerError.
        """
        key = cache.key(f"nar/{name}")
        if found := await self._here(key) or await self._far_away_stored(key, not_at):
            return found
        fetch = self._far_away.fetches.under_way(key)
        if fetch is None and (remote := await self._far_away.origin.remote(cache, name, hash_part)):
            fetch = self._far_away.fetches.start(remote)
        if fetch is None:
            return None
        if fetch.size is not None:
            await fetch.begun()
            return Coming(fetch.size, fetch.follow)
        await fetch.done()
        return await self.open(cache, name, None, not_at=not_at)

    async def _known(self, key: str) -> tuple[NarRecord | None, int | None]:
        """What the catalog knows of a NAR in storage, if anything, and its size; None when it is not there."""
        # A file is looked at; a question to a bucket is saved where the catalog knows the answer.
        if not self._far_away.storage_is_local and (record := await self._catalog.nar(key)):
            return record, record.file_size
        async with waiting(self._far_away.patience, f"whether {key} is there"):
            info = await self._storage.head(key)
        return None, info.size if info else None

    async def _here(self, key: str) -> NarDelivery | None:
        """From storage, where that is of this host, or from the disk cache."""
        if self._far_away.storage_is_local and (how := await self._storage.delivery(key)):
            return Coming(how.size, partial(self._storage.read, key)) if isinstance(how, Stream) else how
        return await self._far_away.disk_cache.get(key)

    async def _far_away_stored(self, key: str, not_at: str) -> NarDelivery | None:
        """From a store that is not of this host. Only to what is known to be there a redirect is given."""
        if self._far_away.storage_is_local:
            return None
        record, size = await self._known(key)
        if size is None:
            return None
        if self._far_away.redirect:
            how = await self._storage.delivery(key)
            if isinstance(how, PresignedUrl) and urlsplit(how.url).hostname != not_at:
                return how
        stored = StoredNar(self._storage, self._ingest, key, size=size, record=record)
        return Coming(size, partial(_shared, self._far_away.fetches, stored))


async def _shared(fetches: Fetches, stored: StoredNar, part: ByteRange) -> AsyncGenerator[bytes | FilePart, None]:
    """A part of a stored NAR: by a fetch of the whole for all who want it; past the disk cache where that has no room;
    and straight from storage for who wants but the end of it.
    """
    chunks: AsyncGenerator[bytes | FilePart, None]
    if part.start and not fetches.under_way(stored.key):
        chunks = stored.part(part)
    else:
        fetch = fetches.start(stored)
        try:
            await fetch.begun()
        except StoreError:
            chunks = read_alone(stored, part)
        else:
            chunks = fetch.follow(part)
    async with aclosing(chunks):
        async for chunk in chunks:
            yield chunk
