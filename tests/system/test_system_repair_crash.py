"""A repair is killed at any moment: it has harmed nothing that was well, and the next one makes the cache whole."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.system import push
from tests.system.conftest import FILES, PROXY
from tests.system.nix import MANY
from tests.system.visible import check_what_http_shows, check_what_is_visible

if TYPE_CHECKING:
    from tests.system.nix import Nix
    from tests.system.server import Server

PATHS = 30
COPIED = 20
"""Paths of which there are other copies."""
DAMAGED = (2, 5, 7, 11, 14, 18, 26)
"""Their NARs; the last one cannot be had again, and goes with the four that need it."""
FORGED = (3, 8, 16)
"""Their narinfos."""
LOST = 4
KILLS = 2


@pytest.mark.parametrize(("storage", "seed"), [(FILES, 2), (PROXY, 3)], indirect=["storage"])
def test_killed_while_it_repairs(builder: Nix, cache: Server, client: Nix, seed: int) -> None:
    moments = random.Random(seed)
    every = builder.evaluate(MANY % (seed, PATHS))
    push.push(builder, cache, every[-1])
    copies = builder.folder / "copies"
    builder.run("nix", "copy", "--to", f"file://{copies}?compression=none", every[COPIED - 1])
    _plant(cache, every, builder.folder / "faults")
    wrong = {Path(every[number]).name for number in (*DAMAGED, *FORGED)}
    assert _flawed(cache) == wrong
    repair = cache.command("verify", "--repair", "--contents", "--json", "--from", str(copies))
    interrupted = 0
    for _ in range(KILLS):
        interrupted += _kill(cache, repair, after=moments.randrange(1, 5), pause=moments.uniform(0, 0.05))
        check_what_http_shows(cache, every)
        still_wrong = _flawed(cache)
        assert still_wrong <= wrong, "a repair that was killed has left something worse than it was"
        wrong = still_wrong
    assert interrupted, "no repair was cut short: this shows nothing"
    subprocess.run(repair, check=False, env=cache.environment, stdout=subprocess.DEVNULL, timeout=120)
    assert _flawed(cache) == set()
    assert check_what_is_visible(cache, client, every) == set(every[: PATHS - LOST])
    assert cache.query("select count(*) from doomed") == [(0,)], "what was to be deleted lies there still"


def _plant(server: Server, every: list[str], folder: Path) -> None:
    """Put faults into storage, in the place of what is there."""
    (folder / "nar").mkdir(parents=True)
    narinfos = {number: f"{Path(every[number]).name[:32]}.narinfo" for number in (*DAMAGED, *FORGED)}
    for number, name in narinfos.items():
        text = server.stored.read(name)
        if number in FORGED:
            (folder / name).write_bytes(text.replace(b"Sig: main-1:", b"Sig: main-1:AAAA"))
            continue
        (url,) = [line[5:].decode() for line in text.splitlines() if line.startswith(b"URL: ")]
        nar = bytearray(server.stored.read(url))
        nar[len(nar) // 2] ^= 1
        (folder / url).write_bytes(nar)
    server.stored.fill(folder)


def _kill(server: Server, command: list[str], *, after: int, pause: float) -> bool:
    """Kill a repair a moment after it has told what became of so many paths; whether it was still at it."""
    process = subprocess.Popen(command, env=server.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout
        for line in process.stdout:
            after -= json.loads(line)["event"] == "repair"
            if not after:
                break
        time.sleep(pause)
    finally:
        process.kill()
        process.communicate()
    return process.returncode < 0


def _flawed(server: Server) -> set[str]:
    """The paths with which something is wrong."""
    command = server.command("verify", "--contents", "--restart", "--json")
    done = subprocess.run(command, check=False, env=server.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 3), done.stderr
    *flaws, _ = map(json.loads, done.stdout.splitlines())
    return {flaw["path"] for flaw in flaws}
