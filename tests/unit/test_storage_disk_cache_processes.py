"""A disk cache that several processes share, and that are killed: its limit holds at every moment."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cachesrv.storage.disk_cache import DiskCache
from tests.waiting import PLENTY

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
LIMIT = 3_000_000

# The name of each object is the hash of its contents. What is read while it comes, or after it was committed, is whole.
WORKER = f"""
import asyncio, hashlib, os, random, sys
from cachesrv.errors import StoreFull
from cachesrv.storage import disk_cache
from cachesrv.storage.disk_cache import DiskCache

disk_cache._STEP = 100_000

async def work(cache, random):
    known = []
    while True:
        data = random.randbytes(random.choice([0, 1000, 50_000, 400_000]))
        key = "nar/" + hashlib.sha256(data).hexdigest()
        try:
            async with cache.incoming(key, random.choice([len(data), None])) as incoming:
                for start in range(0, len(data), 100_000):
                    await incoming.write(data[start:start + 100_000])
                    assert await incoming.read(start, 100_000) == data[start:start + 100_000]
                if random.random() < 0.8:
                    await incoming.commit()
                    known.append(key)
                    print(key, flush=True)
        except StoreFull:
            print("full", flush=True)
        if random.random() < 0.3 and known:
            await cache.get(random.choice(known[-20:]))
        if random.random() < 0.1 and known:
            await cache.discard(random.choice(known[-20:]))

async def main(seed):
    cache = DiskCache(sys.argv[1], limit={LIMIT})
    await cache.open()
    print("ready", flush=True)
    await asyncio.gather(*(work(cache, random.Random(seed * 100 + n)) for n in range(4)))

asyncio.run(main(int(sys.argv[2])))
"""


@contextmanager
def worker(root: Path, seed: int) -> Iterator[subprocess.Popen[str]]:
    command = (sys.executable, "-c", WORKER, str(root), str(seed))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def measured(root: Path) -> tuple[int, int]:
    """The bytes that all files have, each counted once, and what the ledger says of them, both at one moment."""
    with (root / ".ledger").open("rb") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        sizes = {about.st_ino: about.st_size for about in map(os.stat, _files(root))}
        return sum(sizes.values()), int.from_bytes(ledger.read(8), "little")


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and path.name != ".ledger"]


def check_whole(root: Path) -> int:
    """How many objects there are; each has the contents that its name says."""
    number = 0
    for path in _files(root):
        if not path.name.startswith("."):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
            number += 1
    return number


async def opened(root: Path) -> int:
    """Bytes in use as a process finds that is started now."""
    cache = DiskCache(root, limit=LIMIT)
    await cache.open()
    try:
        return await cache.used()
    finally:
        await cache.close()


async def test_processes_that_share_it_keep_to_the_limit_together(tmp_path: Path) -> None:
    with worker(tmp_path, 1) as first, worker(tmp_path, 2) as second, worker(tmp_path, 3) as third:
        largest = rounds = 0
        deadline = time.monotonic() + PLENTY
        while rounds < 150 or largest <= LIMIT * 0.7:
            assert time.monotonic() < deadline, "the cache was never full: this shows little"
            files, ledger = measured(tmp_path)
            assert files == ledger <= LIMIT
            largest, rounds = max(largest, files), rounds + 1
            time.sleep(0.01)  # noqa: ASYNC251  nothing else happens in this process
        assert all(process.poll() is None for process in (first, second, third))


@pytest.mark.parametrize("seed", [1, 2])
async def test_killed_at_any_moment(tmp_path: Path, seed: int) -> None:
    for number in range(6):
        with worker(tmp_path, seed * 10 + number) as survivor:
            with worker(tmp_path, seed * 1000 + number):
                time.sleep(0.1 + 0.05 * number)  # noqa: ASYNC251  as above
            for _ in range(20):
                files, ledger = measured(tmp_path)
                # What the killed one had reserved may stand in the ledger still.
                assert files <= ledger <= LIMIT
                time.sleep(0.005)  # noqa: ASYNC251  as above
            assert survivor.poll() is None
        used = await opened(tmp_path)
        assert (used, used) == measured(tmp_path)
        assert not [path for path in _files(tmp_path) if path.name.startswith(".")]
        assert check_whole(tmp_path) > 1
