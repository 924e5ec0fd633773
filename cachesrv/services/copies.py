"""Other copies of paths, from which what is broken can be mended."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from cachesrv.errors import BadInput, PeerError
from cachesrv.nix import narinfo

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from cachesrv.catalog.base import Catalog
    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.upstream import Reader, Upstreams
    from cachesrv.storage.base import ObjectStore


@dataclass(frozen=True, slots=True)
class Wanted:
    """A path of which another copy would be of use. `name` and `nar_hash` (`sha256:<nix32>`) are None where they are
    not known; `nar_key` is where its NAR lies, or should.
    """

    cache: ServedCache
    hash_part: str
    name: str | None = None
    nar_hash: str | None = None
    nar_key: str | None = None


@dataclass(frozen=True, slots=True)
class Copy:
    """A path as it is elsewhere. `where` is in words; `info` what is said of the path there, if anything, and
    `believed` whether that needs no signature of a known key. `read` gives its NAR, in this `compression`; with `pack`,
    it is to be compressed before it is stored.
    """

    where: str
    nar_hash: str
    compression: str
    read: Callable[[], AsyncIterator[bytes]]
    info: NarInfo | None = None
    believed: bool = False
    pack: bool = False


class Copies(Protocol):
    """A place that may have a copy."""

    async def find(self, wanted: Wanted) -> Copy | None:
        """The copy that it has. Raises PeerError, StoreError when that cannot be told."""


class SameNar:
    """A NAR with the same hash that is stored here, under another name or for another cache."""

    def __init__(self, storage: ObjectStore, catalog: Catalog, caches: Mapping[str, ServedCache]) -> None:
        self._storage = storage
        self._catalog = catalog
        self._prefixes = sorted({cache.prefix for cache in caches.values()})

    async def find(self, wanted: Wanted) -> Copy | None:
        """See Copies."""
        if wanted.nar_hash is None:
            return None
        for prefix in self._prefixes:
            for record in await self._catalog.nars_alike(prefix, wanted.nar_hash):
                if record.key != wanted.nar_key and await self._storage.head(record.key):
                    read = partial(self._storage.read, record.key)
                    return Copy(record.key, record.nar_hash, record.compression, read)
        return None


class OwnCache:
    """The cache itself."""

    def __init__(self, storage: ObjectStore, catalog: Catalog) -> None:
        self._storage = storage
        self._catalog = catalog

    async def find(self, wanted: Wanted) -> Copy | None:
        """See Copies. Raises BadInput for a narinfo that is none."""
        record = await self._catalog.path(wanted.cache.name, wanted.hash_part)
        if record is None:
            return None
        info = narinfo.parse(record.narinfo)
        read = partial(self._storage.read, record.nar_key)
        return Copy(f"the cache {wanted.cache.name}", record.nar_hash, info.compression, read, info)


class OtherCaches:
    """The other caches of this server."""

    def __init__(self, storage: ObjectStore, catalog: Catalog, caches: Mapping[str, ServedCache]) -> None:
        self._storage = storage
        self._catalog = catalog
        self._caches = caches

    async def find(self, wanted: Wanted) -> Copy | None:
        """See Copies."""
        for cache in self._caches.values():
            record = await self._catalog.path(cache.name, wanted.hash_part)
            if record is None or cache.name == wanted.cache.name or record.nar_key == wanted.nar_key:
                continue
            try:
                info = narinfo.parse(record.narinfo)
            except BadInput:
                continue
            read = partial(self._storage.read, record.nar_key)
            return Copy(f"the cache {cache.name}", record.nar_hash, info.compression, read, info)
        return None


class FromUpstreams:
    """The upstreams of the cache, whose keys have signed what they say."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    async def find(self, wanted: Wanted) -> Copy | None:
        """See Copies."""
        found = await self._upstreams.find(wanted.cache, wanted.hash_part)
        if found is None:
            return None
        upstream, info = found
        read = partial(upstream.read, info, 0)
        return Copy(f"upstream {upstream.name}", info.nar_hash.nix32, info.compression, read, info, believed=True)


class FromReader:
    """Any binary cache, called `name`."""

    def __init__(self, name: str, reader: Reader) -> None:
        self._name = name
        self._reader = reader

    async def find(self, wanted: Wanted) -> Copy | None:
        """See Copies."""
        text = await self._reader.get(f"{wanted.hash_part}.narinfo", narinfo.DEFAULT_LIMIT)
        if text is None:
            return None
        try:
            info = narinfo.parse(text)
        except BadInput as error:
            raise PeerError(f"{self._name}: the narinfo of {wanted.hash_part} cannot be used: {error}") from error
        if info.store_path.hash_part != wanted.hash_part or info.store_dir != wanted.cache.store_dir:
            raise PeerError(f"{self._name} sent the narinfo of {info.full_path} for {wanted.hash_part}")
        read = partial(self._reader.read, info.url, 0)
        return Copy(self._name, info.nar_hash.nix32, info.compression, read, info)
