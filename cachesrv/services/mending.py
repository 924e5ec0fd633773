"""One path mended, from another copy of what is broken: what the catalog has of it, or a NAR that is elsewhere.

Nothing is guessed: what a NAR has to be is said by a narinfo whose signatures hold; a copy is read to its end and
verified before it replaces anything. The order is that of publishing (NAR, narinfo, catalog, index), so that a crash
leaves the path as broken as it was, and no other path touched.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from cachesrv.catalog.base import NarRecord
from cachesrv.errors import CachesrvError, StoreError, StoreInaccessible
from cachesrv.nix import narinfo
from cachesrv.nix.hashes import Hash
from cachesrv.nix.signing import verify_any
from cachesrv.services.copies import Wanted
from cachesrv.services.flaws import Kind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence

    from cachesrv.catalog.base import PathRecord
    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.nix.signing import PublicKey
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.copies import Copies, Copy
    from cachesrv.services.path_check import Stores
    from cachesrv.services.path_judge import PathJudge
    from cachesrv.services.spool import Spool, Spooled

NARINFO_KINDS = frozenset(
    kind.label
    for kind in (
        Kind.UNREADABLE_NARINFO,
        Kind.FOREIGN_NARINFO,
        Kind.MISSING_NARINFO,
        Kind.WRONG_SIGNATURE,
        Kind.DISAGREEMENT,
    )
)
NAR_KINDS = frozenset(kind.label for kind in (Kind.MISSING_NAR, Kind.WRONG_SIZE, Kind.DAMAGED_NAR))


class Sources:
    """All places that may have copies, asked one after the other. `tried` says why those were of no use that have been
    asked since it was emptied.
    """

    def __init__(self, places: Sequence[Copies], keys: Mapping[str, Mapping[str, PublicKey]]) -> None:
        self.tried: list[str] = []
        self._places = places
        self._keys = keys

    async def copies(self, wanted: Wanted) -> AsyncIterator[Copy]:
        """Those of this path, with the NAR hash if one is wanted."""
        for place in self._places:
            try:
                copy = await place.find(wanted)
            except CachesrvError as error:
                self.failed(error)
                continue
            if copy and wanted.nar_hash not in (None, copy.nar_hash):
                self.tried.append(f"{copy.where} has another NAR of this path, {copy.nar_hash}")
            elif copy:
                yield copy

    async def described(self, wanted: Wanted) -> AsyncIterator[tuple[Copy, NarInfo]]:
        """Those of which something is said that can be believed: it has a signature by a known key, or needs none."""
        keys = self._keys[wanted.cache.name]
        async for copy in self.copies(wanted):
            if copy.info and (copy.believed or verify_any(copy.info.fingerprint, copy.info.signatures, keys)):
                yield copy, copy.info
            elif copy.info:
                self.tried.append(f"{copy.where} has it without a signature by a key that is known")

    def failed(self, error: CachesrvError) -> None:
        """That was of no use. Raises the error when it is one of our own stores that failed."""
        if isinstance(error, StoreError):
            raise error
        self.tried.append(str(error))


class Mending:
    """Mends paths that the catalog has. Only for who holds the lock of `cachesrv.services.maintenance`."""

    def __init__(self, stores: Stores, cache: ServedCache, judge: PathJudge) -> None:
        self._storage = stores.storage
        self._catalog = stores.catalog
        self._index = stores.index
        self._cache = cache
        self._judge = judge

    async def narinfo(self, record: PathRecord, sources: Sources) -> str | None:
        """Have storage and catalog say the same of it, and what holds; what was done, None when there is no way."""
        text = await self._text(record.hash_part)
        there = self._judge.usable(record.hash_part, text)
        known = self._judge.usable(record.hash_part, record.narinfo)
        if there and known and not self._cache.bucket_is_authority:
            there = there if self._judge.standing(there) >= self._judge.standing(known) else None
        if there and there.nar_hash.nix32 == record.nar_hash and await self._has_nar(there):
            await self._publish(record, there)
            return "the catalog has what lies in storage"
        if known and known.nar_hash.nix32 == record.nar_hash:
            await self._write(known)
            await self._publish(record, known)
            return "its narinfo was written again, as the catalog has it"
        nar = await self._catalog.nar(record.nar_key)
        wanted = self._wanted(record)
        async for copy, info in sources.described(wanted):
            if nar and nar.nar_hash == record.nar_hash:
                anew = self._described_anew(info, nar)
                await self._write(anew)
                await self._publish(record, anew)
                return f"its narinfo was made anew after {copy.where}"
        return None

    async def nar(self, record: PathRecord, sources: Sources, spool: Spool) -> str | None:
        """Have its NAR in storage; what was done, None when no copy is to be had."""
        info = self._judge.usable(record.hash_part, record.narinfo)
        if info is None:
            return None
        async for copy in sources.copies(self._wanted(record)):
            async with AsyncExitStack() as stack:
                try:
                    fetched = spool.fetched(copy, record.nar_hash, record.nar_size)
                    spooled = await stack.enter_async_context(fetched)
                except CachesrvError as error:
                    sources.failed(error)
                    continue
                await self._replace_nar(record, info, spooled)
                return f"its NAR was taken from {copy.where}"
        return None

    async def index(self, hash_parts: Collection[str]) -> str:
        """Have the index learn paths anew."""
        await asyncio.to_thread(self._index.delete, [(self._cache.name, hash_part) for hash_part in hash_parts])
        return "the index learns it anew"

    def _wanted(self, record: PathRecord) -> Wanted:
        return Wanted(self._cache, record.hash_part, record.name, record.nar_hash, record.nar_key)

    async def _replace_nar(self, record: PathRecord, info: NarInfo, spooled: Spooled) -> None:
        """In its place if it is the same file to the byte, else under a name of its own, which the path then says."""
        same = info.file_hash == spooled.nar.file_hash and info.compression == spooled.compression
        url = info.url if same else f"nar/{spooled.name}"
        await spooled.store(self._storage, self._cache.key(url))
        await self._catalog.put_nar(
            NarRecord(
                key=self._cache.key(url),
                scope=self._cache.prefix,
                compression=spooled.compression,
                file_hash=spooled.nar.file_hash.nix32,
                file_size=spooled.nar.file_size,
                nar_hash=spooled.nar.nar_hash.nix32,
                nar_size=spooled.nar.nar_size,
                listing=None,
                verified_at=int(time.time()),
            )
        )
        if not same:
            moved = replace(
                info,
                url=url,
                compression=spooled.compression,
                file_hash=spooled.nar.file_hash,
                file_size=spooled.nar.file_size,
            )
            await self._write(moved)
            await self._publish(record, moved)

    def _described_anew(self, info: NarInfo, nar: NarRecord) -> NarInfo:
        """What is said elsewhere of a path whose NAR is here."""
        ours = [key.sign(info.fingerprint) for key in self._cache.signing_keys]
        return replace(
            info.replace_signatures(ours),
            url=nar.key.removeprefix(self._cache.key("")),
            compression=nar.compression,
            file_hash=Hash.parse(nar.file_hash),
            file_size=nar.file_size,
            system=None,
        )

    async def _text(self, hash_part: str) -> bytes | None:
        try:
            return await self._storage.get(self._cache.narinfo_key(hash_part), limit=narinfo.DEFAULT_LIMIT)
        except StoreInaccessible:
            raise
        except CachesrvError:
            return None

    async def _has_nar(self, info: NarInfo) -> bool:
        found = await self._storage.head(self._cache.key(info.url))
        return found is not None and info.file_size in (None, found.size)

    async def _write(self, info: NarInfo) -> None:
        key = self._cache.narinfo_key(info.store_path.hash_part)
        await self._storage.put(key, narinfo.render(info), replace=True)

    async def _publish(self, record: PathRecord, info: NarInfo) -> None:
        """Have catalog and index know what lies in storage."""
        nar_key = self._cache.key(info.url)
        found = None if info.file_size else await self._storage.head(nar_key)
        file_size = info.file_size or (found.size if found else record.file_size)
        known = replace(
            record,
            narinfo=narinfo.render(info),
            nar_key=nar_key,
            nar_size=info.nar_size,
            file_size=file_size,
            references=tuple(reference.base_name for reference in info.references),
            deriver=info.deriver.base_name if info.deriver else None,
            ca=info.ca.render() if info.ca else None,
        )
        await self._catalog.publish([known])
        await self.index([record.hash_part])
