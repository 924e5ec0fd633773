"""Rebuilding catalog and index from what lies in storage: a standard binary cache, whoever wrote it.

Narinfos are taken as they lie there: their signatures are what they were, and NARs are not read, only looked for. What
cannot be served is reported and passed over. Serving goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cachesrv.catalog.base import PathRecord
from cachesrv.errors import BadInput, CachesrvError, Conflict, NotFound
from cachesrv.index.base import IndexEntry
from cachesrv.nix import narinfo
from cachesrv.services.answer import present
from cachesrv.services.caches import ReferencePolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from cachesrv.catalog.base import Catalog
    from cachesrv.index.base import Index
    from cachesrv.services.caches import ServedCache
    from cachesrv.storage.base import ObjectStore

_BATCH = 500
_NARINFO = ".narinfo"


@dataclass(slots=True)
class Report:
    """What a reindex found: how many paths it took, and what is wrong with the others, by object name."""

    taken: int = 0
    broken: dict[str, str] = field(default_factory=dict)


class Reindex:
    """Reads the narinfos of a cache into catalog and index."""

    def __init__(self, storage: ObjectStore, catalog: Catalog, index: Index) -> None:
        self._storage = storage
        self._catalog = catalog
        self._index = index

    async def run(self, cache: ServedCache, progress: Callable[[Report], None]) -> Report:
        """Take in everything that can be served; `progress` is called after each batch."""
        report = Report()
        batch: list[str] = []
        async for key in self._narinfos(cache):
            batch.append(key)
            if len(batch) == _BATCH:
                await self._take(cache, batch, report)
                progress(report)
                batch = []
        await self._take(cache, batch, report)
        progress(report)
        await self._drop_incomplete(cache, report)
        await self._fill_index(cache)
        return report

    async def _narinfos(self, cache: ServedCache) -> AsyncIterator[str]:
        prefix = f"{cache.prefix}/"
        async for info in self._storage.list(prefix):
            name = info.key.removeprefix(prefix)
            if name.endswith(_NARINFO) and "/" not in name:
                yield info.key

    async def _take(self, cache: ServedCache, keys: list[str], report: Report) -> None:
        results = await asyncio.gather(*(self._read(cache, key) for key in keys), return_exceptions=True)
        records = []
        for key, result in zip(keys, results, strict=True):
            if isinstance(result, PathRecord):
                records.append(result)
            elif isinstance(result, CachesrvError):
                report.broken[key] = str(result)
            elif isinstance(result, BaseException):
                raise result
        report.taken += await self._publish(records, report, cache)

    async def _read(self, cache: ServedCache, key: str) -> PathRecord:
        text = await self._storage.get(key, limit=narinfo.DEFAULT_LIMIT)
        if text is None:
            raise NotFound("it was there a moment ago and is gone")
        info = narinfo.parse(text)
        if key != cache.narinfo_key(info.store_path.hash_part):
            raise BadInput(f"it is the narinfo of {info.store_path}")
        if info.store_dir != cache.store_dir:
            raise BadInput(f"its path lies in {info.store_dir}, this cache is for {cache.store_dir}")
        nar = await self._storage.head(cache.key(info.url))
        if nar is None:
            raise NotFound(f"its NAR {info.url} is not there")
        if info.file_size is not None and info.file_size != nar.size:
            raise BadInput(f"its NAR {info.url} has {nar.size} bytes, it says {info.file_size}")
        return PathRecord(
            cache=cache.name,
            hash_part=info.store_path.hash_part,
            name=info.store_path.name,
            narinfo=narinfo.render(info),
            nar_key=nar.key,
            nar_hash=info.nar_hash.nix32,
            nar_size=info.nar_size,
            file_size=nar.size,
            references=tuple(path.base_name for path in info.references),
            deriver=info.deriver.base_name if info.deriver else None,
            ca=info.ca.render() if info.ca else None,
            registered_at=int(time.time()),
        )

    async def _publish(self, records: list[PathRecord], report: Report, cache: ServedCache) -> int:
        """All at once; if one of them is published with another NAR, one by one."""
        try:
            await self._catalog.publish(records)
        except Conflict:
            if len(records) == 1:
                key = cache.narinfo_key(records[0].hash_part)
                report.broken[key] = "its path is published with another NAR hash"
                return 0
            return sum([await self._publish([record], report, cache) for record in records])
        return len(records)

    async def _drop_incomplete(self, cache: ServedCache, report: Report) -> None:
        """A path whose references are not all there is not served, nor are those that need it."""
        while cache.references is ReferencePolicy.STRICT:
            dangling = await self._catalog.dangling(cache.name, _BATCH)
            if not dangling:
                return
            for hash_part, reference in dangling:
                report.broken[cache.narinfo_key(hash_part)] = f"it refers to {reference}, which is not there"
            gone = {hash_part for hash_part, _ in dangling}
            report.taken -= len(gone)
            await self._catalog.remove(cache.name, gone)
            await asyncio.to_thread(self._index.delete, [(cache.name, hash_part) for hash_part in gone])

    async def _fill_index(self, cache: ServedCache) -> None:
        entries: list[IndexEntry] = []
        async for record in self._catalog.scan(cache.name):
            entries.append(IndexEntry(cache.name, record.hash_part, present(record.narinfo)))
            if len(entries) == _BATCH:
                await asyncio.to_thread(self._index.put, entries)
                entries = []
        await asyncio.to_thread(self._index.put, entries)
