"""The server is killed at any moment of concurrent pushes: what is visible can be kept, and a push goes on."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.system import push
from tests.system.conftest import FILES, PROXY
from tests.system.nix import MANY
from tests.system.server import until
from tests.system.stored import Bucket
from tests.system.visible import check_what_is_visible

if TYPE_CHECKING:
    from tests.system.nix import Nix
    from tests.system.server import Server

ROUNDS = 3
MIB = 1024 * 1024
SMALL = 30
LARGE = (2 * MIB, 2 * MIB, 9 * MIB)
"""Bytes; the last one goes into a bucket in parts."""


@pytest.mark.parametrize(("storage", "seed"), [(FILES, 1), (FILES, 2), (PROXY, 4)], indirect=["storage"])
def test_killed_while_pushes_run(builder: Nix, cache: Server, client: Nix, seed: int) -> None:
    moments = random.Random(seed)
    every: list[str] = []
    cut_short = 0
    for number in range(ROUNDS):
        text = builder.evaluate(MANY % (f"{seed}-{number}", SMALL))
        large = [builder.add(f"large-{at}", moments.randbytes(size)) for at, size in enumerate(LARGE)]
        every += text + large
        pushers = [
            push.command(builder, cache, "--jobs", "4", text[-1], *large),
            ["nix", "copy", "--to", cache.main, text[SMALL // 2], large[0]],
        ]
        _kill_while(builder, cache, pushers, moments.randrange(SMALL + len(LARGE)), moments.uniform(0, 0.05))
        cache.start()
        visible = check_what_is_visible(cache, client, every)
        cut_short += len(visible) < len(every)
        push.push(builder, cache, text[-1], *large)
        assert check_what_is_visible(cache, client, every) == set(every)
    assert cut_short, "no push was cut short: this shows nothing"
    _check_that_garbage_goes(cache)


def _kill_while(builder: Nix, server: Server, pushers: list[list[str]], nars: int, pause: float) -> None:
    """Kill the server a moment after so many more NARs have come than there were."""
    before = len(server.stored.names("nar/"))
    running = [
        subprocess.Popen(command, env=builder.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in pushers
    ]
    try:
        while len(server.stored.names("nar/")) < before + nars and any(process.poll() is None for process in running):
            time.sleep(0.001)
        time.sleep(pause)
        server.kill()
    finally:
        for process in running:
            process.kill()
            process.wait()


def _check_that_garbage_goes(server: Server) -> None:
    """What writers left behind that were killed is swept away by the next start, once it is old."""
    if isinstance(server.stored, Bucket):
        # Nobody can make it look older.
        asyncio.run(_sweep(server.stored))
        assert not server.stored.uploads()
        return
    yesterday = time.time() - 86400
    for file in server.objects.rglob(".incoming-*"):
        os.utime(file, (yesterday, yesterday))
    server.stop()
    server.start()
    until(lambda: not [*server.objects.rglob(".incoming-*")], "unfinished files are left behind for ever")


async def _sweep(bucket: Bucket) -> None:
    store = bucket.open()
    left = len(bucket.uploads())
    assert await store.sweep(older_than=0) >= left  # and what they had claimed
    assert await store.sweep(older_than=0) == 0
    await store.close()
