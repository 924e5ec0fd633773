"""Several processes on one catalog, and processes that are killed."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cachesrv.catalog.sql import SqlCatalog
from tests.contracts.catalog_contract import hash_part, path, scanned

if TYPE_CHECKING:
    from asyncio.subprocess import Process

ROOT = Path(__file__).parents[2]
BATCH = 50

# Publishes batches of its own from a number on, and says each that is acknowledged; between them one that all publish.
PUBLISHER = f"""
import asyncio, sys
from cachesrv.catalog.sql import SqlCatalog
from tests.contracts.catalog_contract import path

async def main(url, first, batches):
    catalog = await SqlCatalog.open(url)
    for batch in range(first, first + batches):
        await catalog.publish([path(n, n, n + 1) for n in range(batch * {BATCH}, (batch + 1) * {BATCH})])
        await catalog.publish([path(n, cache="shared", narinfo=b"%d" % batch) for n in range(20)])
        print(batch, flush=True)
    await catalog.close()

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


async def publisher(file: Path, first: int, batches: int) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PUBLISHER,
        f"sqlite:///{file}",
        str(first),
        str(batches),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


async def test_processes_that_begin_at_once_make_one_catalog_and_lose_nothing(file: Path) -> None:
    publishers = [await publisher(file, first, 15) for first in (0, 100, 200, 300)]
    for process in publishers:
        await process.communicate()
    assert [process.returncode for process in publishers] == [0, 0, 0, 0]
    catalog = await SqlCatalog.open(f"sqlite:///{file}")
    assert await scanned(catalog) == [
        path(n, n, n + 1) for first in (0, 100, 200, 300) for n in range(first * BATCH, (first + 15) * BATCH)
    ]
    assert len({record.narinfo for record in await scanned(catalog, "shared")}) == 1
    await catalog.close()


async def test_what_was_acknowledged_outlives_kill_9_and_no_batch_is_halved(file: Path) -> None:
    chance = random.Random(9)
    acknowledged: set[int] = set()
    for first in range(0, 4_000, 1_000):
        process = await publisher(file, first, 1_000)
        assert process.stdout is not None
        acknowledged.add(int(await process.stdout.readline()))
        await asyncio.sleep(chance.random() * 0.2)
        process.kill()
        rest, _ = await process.communicate()
        acknowledged.update(int(line) for line in rest.splitlines(keepends=True) if line.endswith(b"\n"))
        assert process.returncode == -9

        catalog = await SqlCatalog.open(f"sqlite:///{file}")
        stored = await scanned(catalog)
        batches = {int(record.hash_part) // BATCH for record in stored}
        assert acknowledged <= batches
        assert len(stored) == len(batches) * BATCH
        assert len(batches - acknowledged) <= 1 + first // 1_000
        assert await catalog.referrers("main", hash_part(first * BATCH + 1)) == {hash_part(first * BATCH)}
        await catalog.close()
