"""What is published and does not lie in storage as it should, taken out of sight."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cachesrv.index.base import Present
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.flaws import Kind
from cachesrv.services.judging import flaw_of
from cachesrv.services.several import several

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence

    from cachesrv.catalog.base import Catalog, PathRecord
    from cachesrv.index.base import Index
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.findings import Findings
    from cachesrv.services.flaws import Flaw
    from cachesrv.storage.base import ObjectStore

_TOGETHER = 500
_ASKED_TOGETHER = 32


class Withdrawal:
    """After a survey of a cache's storage, whose `findings` these are. What was published meanwhile is looked for where
    it lies now; `take` publishes what lies there. Only for who holds the lock of `cachesrv.services.maintenance`.
    """

    def __init__(
        self,
        storage: ObjectStore,
        catalog: Catalog,
        index: Index,
        *,
        cache: ServedCache,
        findings: Findings,
        take: Callable[[str], Awaitable[None]],
    ) -> None:
        self._storage = storage
        self._catalog = catalog
        self._index = index
        self._cache = cache
        self._findings = findings
        self._take = take

    async def paths(self) -> AsyncIterator[list[Flaw]]:
        """Withdraw published paths that lack something; the flaws, bit by bit, each of a path. A lost narinfo is a flaw
        too, but only where others write to storage it says that they want the path no more: else the catalog knows it,
        and it stays. Raises StoreError.
        """
        records: list[PathRecord] = []
        async for record in self._catalog.scan(self._cache.name):
            records.append(record)
            if len(records) == _TOGETHER:
                yield await self._incomplete(records)
                records = []
        yield await self._incomplete(records)
        while self._cache.references is ReferencePolicy.STRICT:
            dangling = await self._catalog.dangling(self._cache.name, _TOGETHER)
            if not dangling:
                break
            references = dict(dangling)
            await self._forget(references)
            gone = await self._catalog.remove_dangling(self._cache.name, references)
            await self._forget(gone)
            yield [
                flaw_of(self._cache, part, Kind.MISSING_REFERENCE, f"it refers to {name}, which is not there")
                for part, name in references.items()
                if part in gone
            ]

    def withdraws(self, flaw: Flaw) -> bool:
        """Whether a path with such a flaw is withdrawn."""
        kind = Kind.of(flaw.kind)
        return kind.is_loss or (kind is Kind.MISSING_NARINFO and self._cache.bucket_is_authority)

    async def is_lost(self, hash_part: str) -> bool:
        """Withdraw a published path if it lacks something; whether it is published no more."""
        record = await self._catalog.path(self._cache.name, hash_part)
        flaw = await self._flaw(record) if record else None
        if record and not (flaw and self.withdraws(flaw)):
            return False
        await self._withdraw([hash_part])
        return True

    async def answers(self) -> None:
        """Have the index forget what was looked up and cannot be answered so."""
        hash_parts: list[str] = []
        for hash_part, answer in self._index.scan(self._cache.name):
            if isinstance(answer, Present):
                hash_parts.append(hash_part)
            if len(hash_parts) == _TOGETHER:
                await self._doubt(hash_parts)
                hash_parts = []
        await self._doubt(hash_parts)

    async def _doubt(self, hash_parts: Sequence[str]) -> None:
        standing = await asyncio.to_thread(self._findings.of, hash_parts)
        doubtful = [part for part in hash_parts if part not in standing or not standing[part][1]]
        if doubtful:
            await self._forget(set(doubtful) - await self._catalog.present(self._cache.name, doubtful))

    async def _incomplete(self, records: Sequence[PathRecord]) -> list[Flaw]:
        standing = await asyncio.to_thread(self._findings.of, [record.hash_part for record in records])
        doubtful = [record for record in records if not standing.get(record.hash_part, (None, False))[1]]
        found = await several(self._flaw, doubtful, at_a_time=_ASKED_TOGETHER)
        flaws = {record.hash_part: flaw for record, flaw in zip(doubtful, found, strict=True) if flaw}
        lost = [record for record in doubtful if (flaw := flaws.get(record.hash_part)) and self.withdraws(flaw)]
        await self._withdraw([record.hash_part for record in lost])
        for record in lost:
            # A push may have brought it back just then, and have published it before it was withdrawn.
            if await self._flaw(record) is None:
                del flaws[record.hash_part]
                await self._take(record.hash_part)
        return [*flaws.values()]

    async def _flaw(self, record: PathRecord) -> Flaw | None:
        """What of it is not there now."""
        hash_part = record.hash_part
        nar = await self._storage.head(record.nar_key)
        if nar is None:
            return flaw_of(self._cache, hash_part, Kind.MISSING_NAR, f"its NAR {record.nar_key} is not there")
        if nar.size != record.file_size:
            why = f"its NAR {record.nar_key} has {nar.size} bytes, {record.file_size} were published"
            return flaw_of(self._cache, hash_part, Kind.WRONG_SIZE, why)
        if await self._storage.head(self._cache.narinfo_key(hash_part)) is None:
            return flaw_of(self._cache, hash_part, Kind.MISSING_NARINFO, "its narinfo is not there")
        return None

    async def _withdraw(self, hash_parts: Collection[str]) -> None:
        if hash_parts:
            await self._forget(hash_parts)
            await self._catalog.remove(self._cache.name, hash_parts)
            # It may have been looked up in between.
            await self._forget(hash_parts)

    async def _forget(self, hash_parts: Collection[str]) -> None:
        if hash_parts:
            await asyncio.to_thread(self._index.delete, [(self._cache.name, hash_part) for hash_part in hash_parts])
