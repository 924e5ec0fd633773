"""The lock of whoever deletes: one at a time, and free again soon after its holder has died."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cachesrv.catalog.retention import MAINTENANCE
from cachesrv.catalog.sql import SqlCatalog
from cachesrv.services.maintenance import LIFETIME, Busy, maintenance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).parents[2]

HOLD = """
import asyncio, sys
from cachesrv.catalog.sql import SqlCatalog
from cachesrv.services.maintenance import maintenance

async def main():
    catalog = await SqlCatalog.open(sys.argv[1])
    async with maintenance(catalog):
        print("held", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/catalog.sqlite"


@pytest.fixture
async def catalog(url: str) -> AsyncIterator[SqlCatalog]:
    catalog = await SqlCatalog.open(url)
    yield catalog
    await catalog.close()


async def holder_of(catalog: SqlCatalog) -> str:
    return await catalog.lock(MAINTENANCE, "nobody", now=0, until=0)


async def test_one_holds_it_at_a_time(catalog: SqlCatalog) -> None:
    async with maintenance(catalog) as holder:
        assert await holder_of(catalog) == holder
        with pytest.raises(Busy, match=r"process \d+ on .+ is at it"):
            async with maintenance(catalog):
                pass
        assert await holder_of(catalog) == holder
    async with maintenance(catalog) as other:
        assert other != holder


async def test_it_can_be_waited_for(catalog: SqlCatalog) -> None:
    entered = asyncio.Event()

    async def wait() -> None:
        async with maintenance(catalog, patience=30):
            entered.set()

    async with maintenance(catalog):
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.1)
        assert not entered.is_set()
    await waiting
    assert entered.is_set()


async def test_it_is_given_back_when_the_work_fails(catalog: SqlCatalog) -> None:
    with pytest.raises(ZeroDivisionError):
        async with maintenance(catalog):
            raise ZeroDivisionError
    async with maintenance(catalog):
        pass


async def test_a_holder_that_was_killed_here_is_found_out_at_once(url: str, catalog: SqlCatalog) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLD, url, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"held\n"
    with pytest.raises(Busy):
        async with maintenance(catalog):
            pass
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(Busy):
        async with maintenance(catalog):
            pass
    process.kill()
    await process.wait()
    async with maintenance(catalog):
        pass


async def test_a_holder_that_lives_here_keeps_it_when_the_clock_jumps(
    url: str, catalog: SqlCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLD, url, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"held\n"
    later = time.time() + 86_400
    monkeypatch.setattr("time.time", lambda: later)
    try:
        with pytest.raises(Busy, match=f"process {process.pid} "):
            async with maintenance(catalog):
                pass
    finally:
        process.kill()
        await process.wait()
    async with maintenance(catalog):
        pass


async def test_a_holder_elsewhere_with_a_clock_that_was_wrong_does_not_keep_it_until_then(catalog: SqlCatalog) -> None:
    now = int(time.time())
    elsewhere = "process 1 on another (0-0-0 pid:[1], 1, 00)"
    await catalog.lock(MAINTENANCE, elsewhere, now=now + 2**30, until=now + 2**30 + LIFETIME)
    with pytest.raises(Busy):
        async with maintenance(catalog):
            pass
    later = int(time.time()) + LIFETIME
    assert await catalog.lock(MAINTENANCE, "other", now=later - 10, until=later + LIFETIME) == elsewhere
    assert await catalog.lock(MAINTENANCE, "other", now=later, until=later + LIFETIME) == "other"


async def test_a_holder_elsewhere_keeps_it_until_it_is_heard_of_no_more(catalog: SqlCatalog) -> None:
    now = int(time.time())
    elsewhere = "process 1 on another (0-0-0 pid:[1], 1, 00)"
    await catalog.lock(MAINTENANCE, elsewhere, now=now, until=now + LIFETIME)
    with pytest.raises(Busy, match="process 1 on another is at it"):
        async with maintenance(catalog):
            pass
    await catalog.lock(MAINTENANCE, elsewhere, now=now, until=now - 1)
    async with maintenance(catalog):
        pass
