"""Realisations and build logs in storage looked at: whether they are what their names say, signed, and lead somewhere.

Nothing else knows of them: what is looked at is what lies there. A realisation may lead to a path that was collected or
deleted since: clients then build, and the next one that is pushed takes its place.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, CachesrvError
from cachesrv.nix import realisation
from cachesrv.nix.store_path import StorePath
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.flaws import Flaw, Kind
from cachesrv.services.metadata import LOG, kind_of, output_named
from cachesrv.services.reading import read_all
from cachesrv.services.realisations import parse, unbelievable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence

    from cachesrv.nix.signing import PublicKey
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.path_check import Stores

_FOLDERS = ("realisations/", "build-trace-v2/", "log/")
_TOGETHER = 500


@dataclass(frozen=True, slots=True)
class _Leads:
    """A realisation that can be believed, and the path that it leads to."""

    key: str
    to: StorePath


class MetadataCheck:
    """Looks at those of one cache. `sharing` are the names of all caches that have the same objects, `keys`, by name,
    those whose signatures can be told right from wrong.
    """

    def __init__(
        self, stores: Stores, cache: ServedCache, keys: Mapping[str, PublicKey], sharing: Collection[str]
    ) -> None:
        self._stores = stores
        self._cache = cache
        self._keys = keys
        self._sharing = sharing

    async def all(self, patience: float) -> AsyncIterator[Sequence[Flaw]]:
        """The flaws of what lies in storage, bit by bit; what looks wrong is looked at again after so many seconds.
        Raises StoreError.
        """
        for folder in _FOLDERS:
            keys: list[str] = []
            async for info in self._stores.storage.list(self._cache.key(folder)):
                keys.append(info.key)
                if len(keys) == _TOGETHER:
                    yield await self._confirmed(keys, patience)
                    keys = []
            yield await self._confirmed(keys, patience)

    async def _confirmed(self, keys: Collection[str], patience: float) -> Sequence[Flaw]:
        suspected = await self.flaws(keys)
        if suspected:
            await asyncio.sleep(patience)
            suspected = await self.flaws([flaw.object for flaw in suspected])
        return suspected

    async def flaws(self, keys: Collection[str]) -> Sequence[Flaw]:
        """What is wrong with these objects, of each at most one thing; with those that are not there, nothing. Raises
        StoreError.
        """
        logs = [key for key in keys if kind_of(self._name(key)) is LOG]
        others = sorted(set(keys).difference(logs))
        texts = await read_all(self._stores.storage, others, limit=realisation.DEFAULT_LIMIT)
        judged = await asyncio.to_thread(lambda: [self._judge(key, text) for key, text in texts.items()])
        flaws = [flaw for flaw in map(self._misnamed_log, logs) if flaw]
        flaws += [one for one in judged if isinstance(one, Flaw)]
        return flaws + await self._dangling([one for one in judged if isinstance(one, _Leads)])

    def _judge(self, key: str, text: bytes | CachesrvError) -> Flaw | _Leads:
        """Of an object below the folders of realisations."""
        try:
            output = output_named(self._name(key))
        except BadInput as error:
            return self._flaw(Kind.FOREIGN_OBJECT, f"it lies among the realisations and is none: {error}", key)
        if isinstance(text, CachesrvError):
            return self._flaw(Kind.BAD_REALISATION, f"the realisation cannot be read: {text}", key)
        try:
            given = parse(output, text)
        except BadInput as error:
            return self._flaw(Kind.BAD_REALISATION, f"the realisation is none: {error}", key)
        if wrong := unbelievable(output, given, self._keys):
            what = f"the signature of the realisation by {' and '.join(wrong)} does not hold"
            return self._flaw(Kind.BAD_REALISATION, what, key)
        return _Leads(key, given.out_path)

    def _misnamed_log(self, key: str) -> Flaw | None:
        try:
            StorePath.parse(self._name(key).removeprefix("log/"))
        except BadInput as error:
            return self._flaw(Kind.FOREIGN_OBJECT, f"it lies among the build logs and is none: {error}", key)
        return None

    async def _dangling(self, realisations: Sequence[_Leads]) -> list[Flaw]:
        if self._cache.references is ReferencePolicy.ANY:
            return []
        missing = {one.to.hash_part for one in realisations}
        for cache in self._sharing:
            missing -= await self._stores.catalog.present(cache, missing)
        missing = {hash_part for hash_part in missing if not await self._is_accounted_for(hash_part)}
        return [
            self._flaw(Kind.DANGLING_REALISATION, f"the realisation leads to {one.to}, which is not there", one.key)
            for one in realisations
            if one.to.hash_part in missing
        ]

    async def _is_accounted_for(self, hash_part: str) -> bool:
        """Whether a path that is not published was taken away as it should be, or lies in storage."""
        for cache in self._sharing:
            if await self._stores.catalog.removal(cache, hash_part):
                return True
        return await self._stores.storage.head(self._cache.narinfo_key(hash_part)) is not None

    def _flaw(self, kind: Kind, what: str, key: str) -> Flaw:
        return Flaw(kind.label, self._cache.name, what, "", key)

    def _name(self, key: str) -> str:
        return key.removeprefix(self._cache.key(""))
