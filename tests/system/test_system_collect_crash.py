"""The collector is killed at any moment: what is visible can be kept, and the next one goes on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.offline import DAY, pass_time
from tests.system import push
from tests.system.nix import MANY
from tests.system.server import CACHESRV
from tests.system.visible import check_what_is_visible

if TYPE_CHECKING:
    from tests.system.conftest import StartServer
    from tests.system.nix import Nix
    from tests.system.server import Server

PATHS = 60
ROUNDS = 4
_CONFIG = """
[[cache]]
name = "main"
retention_age = "90 d"
"""


@pytest.fixture
def cache(builder: Nix, make_server: StartServer) -> Server:
    return make_server(environment={"CACHESRV_SERVER__STORE_DIR": builder.store_dir}, config=_CONFIG).start()


def test_killed_while_it_collects(builder: Nix, cache: Server, client: Nix) -> None:
    moments = random.Random(1)
    interrupted = 0
    for number in range(ROUNDS):
        every = builder.evaluate(MANY % (number, PATHS))
        push.push(builder, cache, every[-1])
        kept = builder.infos(every[PATHS // 3]).keys()
        _run(cache, "pin", "add", "kept", every[PATHS // 3])
        _age(cache)
        # From when it has begun to when it has nearly ended: a narinfo, a listing and a NAR of each path go.
        interrupted += _kill_while_it_deletes(cache, moments.randrange(3 * (PATHS - len(kept))))
        visible = check_what_is_visible(cache, client, every)
        assert kept <= visible
        _age(cache)
        assert json.loads(_run(cache, "gc", "--now", "--json").splitlines()[-1])["kept"] == 0
        assert check_what_is_visible(cache, client, every) == kept
    assert interrupted, "no collection was cut short: this shows nothing"
    # of the last round the pinned closure is left, and nothing else of anything
    assert _objects(cache) == 3 * len(kept)
    assert cache.query("select count(*) from doomed") == [(0,)]


def _age(server: Server) -> None:
    """Let all that is there, and what clients have asked for, be too old to be kept."""
    server.stop()  # then that use is noted, which a running server does in a minute
    server.start()
    pass_time(server.data_dir / "catalog.sqlite", 91 * DAY)


def _kill_while_it_deletes(server: Server, objects: int) -> bool:
    """Kill the collector when it has deleted so many objects; whether it was still at it."""
    before = _objects(server)
    collector = subprocess.Popen(_command(server, "gc", "--now"), env=server.environment, stdout=subprocess.DEVNULL)
    try:
        while _objects(server) >= before - objects and collector.poll() is None:
            time.sleep(0.0005)
    finally:
        collector.kill()
    return collector.wait() != 0


def _objects(server: Server) -> int:
    """How many narinfos, listings and NARs there are."""
    names = [name for folder in (server.objects, server.objects / "nar") for name in os.listdir(folder)]  # noqa: PTH208  quick
    return sum(name.endswith((".narinfo", ".ls", ".nar.zst")) for name in names)


def _run(server: Server, *arguments: str) -> str:
    done = subprocess.run(
        _command(server, *arguments), check=False, env=server.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _command(server: Server, *arguments: str) -> list[str]:
    options = ["--data-dir", str(server.data_dir), "--config", str(server.config_file)]
    return [*CACHESRV, *arguments, *options]
