"""`push --level auto` through a slow link, as processes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.system.fault_proxy import Delay, FaultProxy
from tests.system.push import attempt, events

if TYPE_CHECKING:
    from tests.system.conftest import MakeClient
    from tests.system.nix import Nix
    from tests.system.server import Server

MIB = 2**20


def test_a_slow_link_raises_the_level(builder: Nix, cache: Server, make_client: MakeClient) -> None:
    """From one NAR to the next, for NARs that go one by one; what arrives is what was built."""
    content = random.Random(1).randbytes(2 * MIB)
    paths = [builder.add(f"large-{number}", content + bytes([number])) for number in range(4)]
    with FaultProxy(cache.main.removesuffix("/main")) as proxy:
        proxy.plan(Delay(1.5), method="PUT", path="/main/nar/", times=len(paths))
        done = attempt(builder, cache, "--to", f"{proxy.url}/main", "--level", "auto", "--jobs", "1", *paths)
        assert not proxy.waiting

    assert done.returncode == 0, done.stderr
    levels = [event["level"] for event in events(done) if event["event"] == "stored"]
    assert levels[0] == 3
    assert levels[-1] > 3
    client = make_client(cache)
    client.run("nix", "copy", "--from", cache.main, *paths)
    assert client.hashes(*paths) == builder.hashes(*paths)


@pytest.mark.parametrize("level", ["0", "20", "fast"])
def test_what_is_no_level_is_refused(builder: Nix, cache: Server, level: str) -> None:
    done = attempt(builder, cache, "--level", level, "/nix/store/anything")
    assert done.returncode == 2
    assert "--level" in done.stderr
