"""What is published, made sure to be visible.

A crash may have come between catalog and index. An absence that was remembered before would then hide the path from
clients, while those who push it again are told that it is there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cachesrv.index.base import IndexEntry, Present
from cachesrv.services.answer import present

if TYPE_CHECKING:
    from collections.abc import Collection

    from cachesrv.catalog.base import Catalog, PathRecord
    from cachesrv.index.base import Index
    from cachesrv.services.caches import ServedCache

_TRIES = 5
"""How often the catalog is asked while paths are being deleted; each deletion may have been one of these."""


async def published(
    catalog: Catalog, index: Index, cache: ServedCache, hash_parts: Collection[str]
) -> dict[str, PathRecord]:
    """Those of them that are published, by hash part; the index answers for them when this returns."""
    records: dict[str, PathRecord] = {}
    for _ in range(_TRIES):
        epoch = index.epoch()
        records = await catalog.paths(cache.name, hash_parts)
        hidden = [
            IndexEntry(cache.name, hash_part, present(record.narinfo))
            for hash_part, record in records.items()
            if not isinstance(index.get(cache.name, hash_part), Present)
        ]
        if not hidden or await asyncio.to_thread(index.put, hidden, replace=False, epoch=epoch):
            break
    return records
