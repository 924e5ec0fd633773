"""What a deletion left behind that was killed does not stand in the way of those who push it again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from cachesrv.catalog.retention import MAINTENANCE
from cachesrv.errors import BeingRemoved, StoreError, StoreUnavailable
from cachesrv.services.finishing import keep_finishing
from cachesrv.services.maintenance import maintenance
from cachesrv.services.removing import Removing
from tests.collecting import (
    DAY,
    HOLDER,
    Clock,
    Gate,
    Process,
    Stores,
    cache,
    check_consistency,
    die,
    open_stores,
    policy,
)
from tests.samples import Sample

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CACHES = {"main": cache()}
LIBRARY = Sample("library", b"library")


@pytest.fixture
async def stores() -> AsyncIterator[Stores]:
    """A collection died over its deletions."""
    clock = Clock()
    with clock.in_force():
        async with open_stores() as stores:
            process = Process(stores, tries=1)
            await process.push(CACHES["main"], LIBRARY)
            clock.pass_(100 * DAY)
            dying = Process(stores.through(Gate(1, die, late=True)))
            with pytest.raises(StoreError):
                await dying.collect(CACHES, {"main": policy(max_age=DAY)})
            await stores.catalog.unlock(MAINTENANCE, HOLDER)
            assert await stores.catalog.doomed()
            yield stores
            await process.end()
            await dying.end()


class Watched:
    """Its catalog; each look at what is doomed is counted. The first may fail, and others find what is `stale`."""

    def __init__(self, stores: Stores, *, fails: bool = False) -> None:
        self._catalog = stores.catalog
        self._fails = fails
        self._looks = asyncio.Semaphore(0)
        self.stale: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._catalog, name)

    async def doomed(self) -> list[str]:
        self._looks.release()
        if self._fails:
            self._fails = False
            raise StoreUnavailable("as told")
        return self.stale or await self._catalog.doomed()

    async def looked(self, times: int) -> None:
        """What followed on the look before has been done by then."""
        async with asyncio.timeout(20):
            for _ in range(times):
                await self._looks.acquire()


@asynccontextmanager
async def finishing(stores: Stores, *, fails: bool = False) -> AsyncIterator[Watched]:
    catalog: Any = Watched(stores, fails=fails)
    removing = Removing(stores.storage, stores.catalog, stores.index)
    task = asyncio.create_task(keep_finishing(removing, catalog, lambda: CACHES, pause=0.01))
    try:
        yield catalog
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def test_it_is_finished(stores: Stores) -> None:
    process = Process(stores, tries=1)
    with pytest.raises(BeingRemoved):
        await process.push(CACHES["main"], LIBRARY)
    async with finishing(stores) as watched:
        await watched.looked(2)
    assert not await stores.catalog.doomed()
    await process.push(CACHES["main"], LIBRARY)
    await check_consistency(stores, CACHES)
    await process.end()


async def test_who_is_still_at_it_is_left_alone(stores: Stores) -> None:
    async with maintenance(stores.catalog), finishing(stores) as watched:
        await watched.looked(3)
        assert await stores.catalog.doomed()


async def test_what_others_finished_meanwhile_is_not_told(stores: Stores) -> None:
    doomed = await stores.catalog.doomed()
    with structlog.testing.capture_logs() as logs:
        async with finishing(stores) as watched:
            await watched.looked(2)
            told = [log["objects"] for log in logs]
            watched.stale = doomed
            await watched.looked(3)
    assert told == [len(doomed)]
    assert len(logs) == 1


async def test_a_catalog_that_fails_does_not_end_it(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    async with finishing(stores, fails=True) as watched:
        await watched.looked(3)
    assert not await stores.catalog.doomed()
    caplog.clear()
