"""A server that bears few requests at once, as processes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tests.system.fault_proxy import Delay, FaultProxy
from tests.system.push import attempt, events

if TYPE_CHECKING:
    from tests.system.conftest import MakeClient
    from tests.system.nix import Nix
    from tests.system.server import Server

BEARS = 4
NUMBER = 30


def test_a_push_of_many_jobs_completes_and_keeps_to_what_is_borne(
    builder: Nix, cache: Server, make_client: MakeClient
) -> None:
    content = random.Random(1).randbytes(2**20)
    paths = [builder.add(f"middling-{number}", content + bytes([number])) for number in range(NUMBER)]
    with FaultProxy(cache.main.removesuffix("/main")) as proxy:
        proxy.bears = BEARS
        proxy.plan(Delay(0.05), method="PUT", times=NUMBER)
        done = attempt(builder, cache, "--to", f"{proxy.url}/main", "--jobs", "30", *paths)

    assert done.returncode == 0, [e for e in events(done) if e["event"] == "failed"][:3]
    assert events(done)[-1]["uploaded"] == NUMBER
    refused = sum(crowd > BEARS for crowd in proxy.crowds)
    assert BEARS <= refused < 3 * NUMBER
    later = proxy.crowds[len(proxy.crowds) // 2 :]
    assert sum(later) / len(later) > BEARS / 2
    assert max(later) <= BEARS + 3
    client = make_client(cache)
    client.run("nix", "copy", "--from", cache.main, *paths)
    assert client.hashes(*paths) == builder.hashes(*paths)
