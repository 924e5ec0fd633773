"""Many small paths from a real store: few requests, and a server that dies in their midst is no harm."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from cachesrv import pack
from cachesrv.api import PackHead
from tests.system import push
from tests.system.server import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.system.nix import Nix
    from tests.system.server import Server

NUMBER = 600
SLOW = 12
PACKS = "/api/v1/caches/main/nars"
# Each refers to the one before it and to one far away.
PATHS = f"""
    let
      make = number: builtins.toFile "path-${{toString number}}" (text number);
      text = number: if number == 0 then "" else "${{path (number - 1)}} ${{path (number / 2)}}";
      path = number: builtins.elemAt paths number;
      paths = builtins.genList make {NUMBER};
    in paths
"""


@pytest.fixture
def paths(builder: Nix) -> list[str]:
    found: list[str] = builder.evaluate(PATHS)
    return found


def test_many_small_paths_are_few_requests(builder: Nix, cache: Server, client: Nix, paths: list[str]) -> None:
    done = push.attempt(builder, cache, paths[-1])
    assert done.returncode == 0, done.stderr

    told = push.events(done)
    assert told[-1]["uploaded"] == NUMBER
    published = [one["path"] for one in told if one["event"] == "published"]
    assert sorted(published) == sorted(path.rpartition("/")[2] for path in paths)
    asked = [line for line in cache.client().get("/metrics").text.splitlines() if 'route="api"' in line]
    assert sum(float(line.rpartition(" ")[2]) for line in asked) < NUMBER / 50
    assert 'route="nar"' not in "".join(asked)
    client.run("nix-store", "--realise", paths[-1])
    assert client.hashes(paths[-1]) == builder.hashes(paths[-1])
    client.run("nix", "store", "verify", "--store", f"file://{cache.objects}", "--sigs-needed", "1", *paths)


@pytest.mark.parametrize("objects", [1, NUMBER + 1])
def test_the_server_is_killed_and_comes_back(
    builder: Nix, cache: Server, client: Nix, paths: list[str], objects: int
) -> None:
    """While a pack is on its way, or its answer; the push that was under way completes."""
    command = push.command(builder, cache, paths[-1])
    out = builder.folder / "events"
    with out.open("w") as file, subprocess.Popen(command, env=builder.environment, stdout=file) as pushing:
        while _count(cache.objects) < objects and pushing.poll() is None:
            time.sleep(0.001)
        cache.kill()
        cache.start()
        pushing.wait(push.PATIENCE)
    told = [json.loads(line) for line in out.read_text().splitlines()]

    assert pushing.returncode == 0, told[-3:]
    assert told[-1]["failed"] == 0
    until(lambda: cache.client().get("/health/ready").status == 200, "the server is not ready")
    client.run("nix", "store", "verify", "--store", cache.main, "--sigs-needed", "1", *paths)
    client.run("nix", "store", "verify", "--store", f"file://{cache.objects}", "--sigs-needed", "1", *paths)
    (published,) = cache.query("select count(*) from paths")
    assert published == (NUMBER,)
    assert push.push(builder, cache, paths[-1])["present"] == NUMBER


def _count(folder: Path) -> int:
    found = 0
    for place in (folder, folder / "nar"):
        found += len(os.listdir(place)) if place.exists() else 0  # noqa: PTH208  it is asked a thousand times a second
    return found


def test_slow_senders_hold_nobody_up(cache: Server) -> None:
    """Each has said what it is about to send, and takes its time."""
    pusher = cache.pusher
    with ExitStack() as stack:
        for _ in range(SLOW):
            slow = stack.enter_context(pusher.connect())
            head = f"POST {PACKS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {pusher.token}\r\n"
            slow.sendall(f"{head}Content-Length: {2**20}\r\n\r\n.".encode())
        sent = pack.encode(PackHead([]), [])
        answers = [pusher.ask("POST", PACKS, sent).status for _ in range(3)]
    assert answers == [200] * 3
