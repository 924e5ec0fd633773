"""A path that is missing, brought here from another copy, with all that it needs and that is missing as well."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from cachesrv.errors import CachesrvError
from cachesrv.services.candidate import Candidate
from cachesrv.services.copies import Wanted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.copies import Copy
    from cachesrv.services.ingest import Ingest
    from cachesrv.services.mending import Sources
    from cachesrv.services.path_check import PathCheck
    from cachesrv.services.publish import Publish
    from cachesrv.services.spool import Spool, Spooled

_CHUNK = 2**20
_DEEPEST = 1000
"""Paths of which each needs the next one."""


class Importing:
    """Brings paths into one cache, in the name of `by`."""

    def __init__(
        self,
        cache: ServedCache,
        check: PathCheck,
        sources: Sources,
        spool: Spool,
        *,
        ingest: Ingest,
        publish: Publish,
        by: str,
    ) -> None:
        self._cache = cache
        self._check = check
        self._ingest = ingest
        self._publish = publish
        self._sources = sources
        self._spool = spool
        self._by = by

    async def path(self, hash_part: str, name: str | None = None, *, depth: int = 0) -> str | None:
        """Publish a path; where it comes from, None when it cannot be had."""
        if depth > _DEEPEST:
            return None
        async for copy, info in self._sources.described(Wanted(self._cache, hash_part, name)):
            if await self.references(info, depth=depth) and await self._take_in(copy, info):
                return copy.where
        return None

    async def references(self, info: NarInfo, *, depth: int = 0) -> bool:
        """Have all that it refers to; whether that went well."""
        missing = await self._check.missing(info)
        for reference in info.references:
            wanted = reference.hash_part in missing and reference != info.store_path
            if wanted and not await self.path(reference.hash_part, reference.name, depth=depth + 1):
                return False
        return True

    async def _take_in(self, copy: Copy, info: NarInfo) -> bool:
        try:
            async with self._spool.fetched(copy, info.nar_hash.nix32, info.nar_size) as spooled:
                size = spooled.nar.file_size
                await self._ingest.receive(self._cache, spooled.name, _chunks(spooled), size)
                file = replace(
                    info,
                    url=f"nar/{spooled.name}",
                    compression=spooled.compression,
                    file_hash=spooled.nar.file_hash,
                    file_size=size,
                )
            # What is said of it has been found good already.
            trusting = replace(self._cache, trusted_keys={})
            await self._publish.one(trusting, Candidate.from_narinfo(file), self._by)
        except CachesrvError as error:
            self._sources.failed(error)
            return False
        return True


async def _chunks(spooled: Spooled) -> AsyncIterator[bytes]:
    spooled.file.seek(0)
    while chunk := await asyncio.to_thread(spooled.file.read, _CHUNK):
        yield chunk
