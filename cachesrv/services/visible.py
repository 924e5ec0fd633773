"""What is published, made sure to be visible.

A crash may have come between catalog and index. An absence that was remembered before would then hide the path from
clients, while those who push it again are told that it is there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cachesrv.index.base import IndexEntry, Present
from cachesrv.services.answer import present
from cachesrv.services.unhurried import unhurried

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from cachesrv.catalog.base import Catalog
    from cachesrv.index.base import Index
    from cachesrv.services.caches import ServedCache

_TRIES = 5
"""How often the catalog is asked while paths are being deleted; each deletion may have been one of these."""


async def hidden(index: Index, cache: ServedCache, hash_parts: Iterable[str]) -> list[str]:
    """Those of them for which the index does not answer that they are there."""
    return [one async for one in unhurried(hash_parts) if not isinstance(index.get(cache.name, one), Present)]


async def nar_hashes(catalog: Catalog, index: Index, cache: ServedCache, hash_parts: Collection[str]) -> dict[str, str]:
    """The NAR hashes (`sha256:<nix32>`) of those of them that are published, by hash part; the index answers for these
    when this returns.
    """
    found: dict[str, str] = {}
    for _ in range(_TRIES):
        epoch = index.epoch()
        found = await catalog.nar_hashes(cache.name, hash_parts)
        unseen = await hidden(index, cache, found)
        if not unseen:
            break
        records = await catalog.paths(cache.name, unseen)
        entries = [IndexEntry(cache.name, one, present(record.narinfo)) for one, record in records.items()]
        shown = await asyncio.to_thread(index.put, entries, replace=False, epoch=epoch)
        if shown and len(records) == len(unseen):
            break
    return found
