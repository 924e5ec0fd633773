"""What others may have deleted is looked up again."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError
from cachesrv.index.base import IndexEntry
from cachesrv.index.memory import MemoryIndex
from cachesrv.services.answer import present
from cachesrv.services.relearning import keep_forgetting
from tests.samples import Sample
from tests.service_site import served_cache

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

SAMPLES = [Sample(f"sample-{number}", b"content") for number in range(20)]
BUCKET = served_cache(bucket_is_authority=True)
OWN = served_cache(name="own", prefix="own")
CACHES = {cache.name: cache for cache in (BUCKET, OWN)}


class Index(MemoryIndex):
    """Fails the first time that something is to be deleted; says when there is nothing left of the first cache."""

    def __init__(self) -> None:
        super().__init__()
        self._fails = True
        self._loop = asyncio.get_running_loop()
        self.forgotten = asyncio.Event()
        for cache in CACHES.values():
            self.put([IndexEntry(cache.name, one.path.hash_part, present(one.narinfo())) for one in SAMPLES])

    def delete(self, keys: Iterable[tuple[str, str]]) -> None:
        if self._fails:
            self._fails = False
            raise StoreError("as told")
        super().delete(keys)
        if not [*self.scan(BUCKET.name)]:
            self._loop.call_soon_threadsafe(self.forgotten.set)


async def test_all_that_others_may_have_deleted_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    index = Index()
    task = asyncio.create_task(keep_forgetting(index, lambda: CACHES, within=0.3))
    async with asyncio.timeout(20):
        await index.forgotten.wait()
    task.cancel()
    await asyncio.wait([task])
    assert len([*index.scan(OWN.name)]) == len(SAMPLES)
    caplog.clear()
