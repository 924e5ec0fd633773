"""kill -9 at any moment leaves whole objects, and garbage at worst."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cachesrv.storage.filesystem import FilesystemStore

ROOT = Path(__file__).parents[2]

# The name of each object is the hash of its contents; replaced ones end in their own hash.
WRITER = """
import asyncio, hashlib, os, sys
from cachesrv.storage.filesystem import FilesystemStore

def named(data):
    return "main/nar/" + hashlib.sha256(data).hexdigest()

async def stream(store, data):
    async with store.writer(named(data), size=len(data)) as writer:
        for start in range(0, len(data), 400_000):
            await writer.write(data[start:start + 400_000])
        await writer.commit()
    return [named(data)]

async def small(store, data):
    await store.put(named(data), data)
    return [named(data)]

async def many(store, data):
    objects = {named(data + bytes([n])): data + bytes([n]) for n in range(20)}
    await store.put_many(objects)
    return list(objects)

async def replace(store, data):
    await store.put("main/replaced", data + hashlib.sha256(data).digest(), replace=True)
    return ["main/replaced"]

async def work(store, write, size):
    while True:
        for key in await write(store, os.urandom(size)):
            print(key, flush=True)

async def main():
    store = FilesystemStore(sys.argv[1])
    await asyncio.gather(work(store, stream, 3_000_000), work(store, small, 2000), work(store, many, 300),
                         work(store, replace, 50_000))

asyncio.run(main())
"""


async def check_whole(store: FilesystemStore) -> set[str]:
    seen = set()
    async for info in store.list(""):
        data = await store.get(info.key, limit=2**24)
        assert data is not None
        assert len(data) == info.size
        if info.key == "main/replaced":
            assert hashlib.sha256(data[:-32]).digest() == data[-32:]
        else:
            assert info.key == f"main/nar/{hashlib.sha256(data).hexdigest()}"
        seen.add(info.key)
    return seen


def acknowledged_until_killed(root: Path, delay: float) -> set[str]:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as writer:
        assert writer.stdout
        lines = [writer.stdout.readline()]
        time.sleep(delay)
        writer.kill()
        lines += writer.stdout.readlines()
    return {line.strip() for line in lines if line.endswith("\n")}


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.25])
async def test_after_kill_9_each_visible_object_is_whole(tmp_path: Path, delay: float) -> None:
    acknowledged = acknowledged_until_killed(tmp_path / "objects", delay)
    store = FilesystemStore(tmp_path / "objects")
    try:
        seen = await check_whole(store)
        assert seen >= acknowledged
        await store.sweep(older_than=0)
        assert not list((tmp_path / "objects").rglob(".*"))
        assert await check_whole(store) == seen
    finally:
        await store.close()
