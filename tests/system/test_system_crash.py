"""The server is killed at any moment of concurrent pushes: what is visible can be kept, and a push goes on."""

from __future__ import annotations

import os
import random
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.system import push
from tests.system.nix import MANY
from tests.system.server import until
from tests.system.visible import check_what_is_visible

if TYPE_CHECKING:
    from pathlib import Path

    from tests.system.nix import Nix
    from tests.system.server import Server

ROUNDS = 4
SMALL, LARGE = 30, 3
MIB = 1024 * 1024


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_while_pushes_run(builder: Nix, cache: Server, client: Nix, seed: int) -> None:
    moments = random.Random(seed)
    every: list[str] = []
    cut_short = 0
    for number in range(ROUNDS):
        text = builder.evaluate(MANY % (f"{seed}-{number}", SMALL))
        large = [builder.add(f"large-{at}", moments.randbytes(2 * MIB)) for at in range(LARGE)]
        every += text + large
        pushers = [
            push.command(builder, cache, "--jobs", "4", text[-1], *large),
            ["nix", "copy", "--to", cache.main, text[SMALL // 2], large[0]],
        ]
        _kill_while(builder, cache, pushers, moments.randrange(SMALL + LARGE), moments.uniform(0, 0.05))
        cache.start()
        visible = check_what_is_visible(cache, client, every)
        cut_short += len(visible) < len(every)
        push.push(builder, cache, text[-1], *large)
        assert check_what_is_visible(cache, client, every) == set(every)
    assert cut_short, "no push was cut short: this shows nothing"
    _check_that_garbage_goes(cache)


def _kill_while(builder: Nix, server: Server, pushers: list[list[str]], nars: int, pause: float) -> None:
    """Kill the server a moment after so many more NARs have come than there were."""
    folder = server.objects / "nar"
    before = _count(folder)
    running = [
        subprocess.Popen(command, env=builder.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in pushers
    ]
    try:
        while _count(folder) < before + nars and any(process.poll() is None for process in running):
            time.sleep(0.001)
        time.sleep(pause)
        server.kill()
    finally:
        for process in running:
            process.kill()
            process.wait()


def _count(folder: Path) -> int:
    return len(os.listdir(folder)) if folder.exists() else 0  # noqa: PTH208  it is asked a thousand times a second


def _check_that_garbage_goes(server: Server) -> None:
    """What writers left behind that were killed is swept away by the next start, once it is old."""
    yesterday = time.time() - 86400
    for file in server.objects.rglob(".incoming-*"):
        os.utime(file, (yesterday, yesterday))
    server.stop()
    server.start()
    until(lambda: not [*server.objects.rglob(".incoming-*")], "unfinished files are left behind for ever")
