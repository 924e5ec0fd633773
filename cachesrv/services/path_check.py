"""Paths of a cache looked at in all stores, in batches.

The stores are asked one after the other, while others publish and remove: what is found wrong may be the work of a
moment. It is for the caller to look again before it believes it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cachesrv.errors import CachesrvError, NotFound, PeerError, StoreInaccessible
from cachesrv.nix import narinfo
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.flaws import Flaw, Kind
from cachesrv.services.path_judge import PathJudge, Seen
from cachesrv.services.reading import read_all
from cachesrv.services.several import several

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

    from cachesrv.catalog.base import Catalog, PathRecord
    from cachesrv.index.base import Index
    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.nix.signing import PublicKey
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.nar_check import NarCheck
    from cachesrv.services.path_judge import Reading
    from cachesrv.storage.base import ObjectStore

_ASKED_TOGETHER = 32
_KEPT = 100_000


@dataclass(frozen=True, slots=True)
class Stores:
    """Where to look; `resolve` gives the hash parts that the upstreams of a cache have, of those given, and raises
    PeerError when that cannot be told.
    """

    storage: ObjectStore
    catalog: Catalog
    index: Index
    resolve: Callable[[ServedCache, Collection[str]], Awaitable[set[str]]]


@dataclass(slots=True)
class _References:
    """Hash parts that are nowhere, and those of which that cannot be told, with the reason."""

    missing: set[str]
    undecided: dict[str, str]


class PathCheck:
    """Looks at the paths of one cache. With `contents`, their NARs are read. `unpublished_nars` are the keys of NARs
    that belong to narinfos which the catalog does not know; `more_unpublished`: there are more than are kept.
    """

    def __init__(
        self, stores: Stores, cache: ServedCache, keys: Mapping[str, PublicKey], contents: NarCheck | None
    ) -> None:
        self._stores = stores
        self._cache = cache
        self._judge = PathJudge(cache, keys)
        self._contents = contents
        self.unpublished_nars: set[str] = set()
        self.more_unpublished = False

    async def published(self, records: Sequence[PathRecord]) -> dict[str, list[Flaw]]:
        """What is wrong with paths that the catalog has, by hash part; those with nothing wrong are left out. Raises
        StoreUnavailable.
        """
        return await self._look({record.hash_part: record for record in records})

    async def found(self, hash_parts: Collection[str]) -> dict[str, list[Flaw]]:
        """The same of paths of which it is not known whether the catalog has them. Those that it has not, and that lie
        in storage, are flawed by that, unless storage is the authority.
        """
        known = await self._stores.catalog.paths(self._cache.name, hash_parts)
        return await self._look({hash_part: known.get(hash_part) for hash_part in hash_parts})

    async def _look(self, records: Mapping[str, PathRecord | None]) -> dict[str, list[Flaw]]:
        texts = await self._texts(records)
        seen = [
            Seen(hash_part, record, texts.get(hash_part), self._stores.index.get(self._cache.name, hash_part))
            for hash_part, record in records.items()
        ]
        readings = await asyncio.to_thread(lambda: [self._judge.read(one) for one in seen])
        infos = [reading.info for reading in readings if reading.info]
        sizes = await self._nar_sizes({self._cache.key(info.url) for info in infos})
        for published in (True, False):
            some = [r for r in readings if r.info and (records[r.hash_part] is not None) is published]
            references = await self._references([r.info for r in some if r.info], published=published)
            await several(partial(self._complete, sizes, references), some, at_a_time=self._jobs)
        if not self._cache.bucket_is_authority:
            for reading, one in zip(readings, seen, strict=True):
                if one.record is None and reading.info:
                    self._add_unpublished(reading, reading.info)
        return {reading.hash_part: reading.flaws for reading in readings if reading.flaws}

    async def lying(self, hash_parts: Collection[str]) -> set[str]:
        """Those of them whose narinfos lie in storage, whatever is in them."""
        return set(await self._texts(hash_parts))

    async def missing(self, info: NarInfo) -> set[str]:
        """Hash parts of what a path refers to that are nowhere, or of which that cannot be told."""
        references = await self._references([info], published=True)
        return references.missing | references.undecided.keys()

    def _add_unpublished(self, reading: Reading, info: NarInfo) -> None:
        if not reading.flaws:
            self._judge.add(reading, Kind.UNPUBLISHED, "it lies in storage, and the catalog does not know it")
        if len(self.unpublished_nars) < _KEPT:
            self.unpublished_nars.add(self._cache.key(info.url))
        else:
            self.more_unpublished = True

    @property
    def _jobs(self) -> int:
        return self._contents.jobs if self._contents else 1

    async def _texts(self, hash_parts: Collection[str]) -> dict[str, bytes | CachesrvError]:
        """Narinfos by hash part; for those that cannot be read, why."""
        keys = {self._cache.narinfo_key(hash_part): hash_part for hash_part in hash_parts}
        texts = await read_all(self._stores.storage, keys, limit=narinfo.DEFAULT_LIMIT)
        return {keys[key]: text for key, text in texts.items()}

    async def _nar_sizes(self, keys: Collection[str]) -> dict[str, int | str | None]:
        """Bytes by key, None for what is not there; words for what cannot be looked at."""
        ordered = sorted(keys)
        sizes = await several(self._nar_size, ordered, at_a_time=_ASKED_TOGETHER)
        return dict(zip(ordered, sizes, strict=True))

    async def _nar_size(self, key: str) -> int | str | None:
        try:
            info = await self._stores.storage.head(key)
        except StoreInaccessible:
            raise
        except CachesrvError as error:
            return str(error)
        return info.size if info else None

    async def _references(self, infos: Sequence[NarInfo], *, published: bool) -> _References:
        """What they refer to and is not there: published too, or in storage where that is enough."""
        if self._cache.references is ReferencePolicy.ANY:
            return _References(set(), {})
        wanted = {other.hash_part for info in infos for other in info.references if other != info.store_path}
        missing = wanted - await self._stores.catalog.present(self._cache.name, wanted)
        if missing and (self._cache.bucket_is_authority or not published):
            missing -= await self.lying(missing)
        if missing and (self._cache.references is ReferencePolicy.UPSTREAM or self._cache.pull_through):
            try:
                missing -= await self._stores.resolve(self._cache, missing)
            except PeerError as error:
                return _References(set(), dict.fromkeys(missing, str(error)))
        return _References(missing, {})

    async def _complete(self, sizes: Mapping[str, int | str | None], references: _References, reading: Reading) -> None:
        """Add what is wrong with its NAR and its references."""
        info = reading.info
        assert info is not None
        for reference in info.references:
            if reference.hash_part in references.missing:
                what = f"it refers to {reference}, which is not there"
                self._judge.add(reading, Kind.MISSING_REFERENCE, what)
            elif why := references.undecided.get(reference.hash_part):
                what = f"whether {reference} is there, to which it refers, cannot be told: {why}"
                self._judge.add(reading, Kind.UNDECIDED, what)
        key = self._cache.key(info.url)
        wrong = _wrong_size(info, sizes[key])
        if wrong is None and self._contents:
            try:
                damage = await self._contents.flaw(key, info)
            except NotFound:
                wrong = Kind.MISSING_NAR, f"its NAR {info.url} is not there"
            else:
                wrong = (Kind.DAMAGED_NAR, damage) if damage else None
        if wrong:
            self._judge.add(reading, *wrong, key)


def _wrong_size(info: NarInfo, size: int | str | None) -> tuple[Kind, str] | None:
    if size is None:
        return Kind.MISSING_NAR, f"its NAR {info.url} is not there"
    if isinstance(size, str):
        return Kind.DAMAGED_NAR, f"its NAR {info.url} cannot be read: {size}"
    if info.file_size not in (None, size):
        return Kind.WRONG_SIZE, f"its NAR {info.url} has {size} bytes, its narinfo says {info.file_size}"
    return None
