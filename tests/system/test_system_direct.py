"""Large NARs straight to the bucket, from a real store to a real gateway: interrupted, checked before they count."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from threading import Event
from typing import TYPE_CHECKING

import pytest

from tests.system import push
from tests.system.fault_proxy import Alter, AlterRequest, Delay, FaultProxy, Hold, LoseAnswer
from tests.system.server import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.radosgw import Gateway
    from tests.system.conftest import MakeBucket, MakeClient, StartServer
    from tests.system.fault_proxy import Seen
    from tests.system.nix import Nix
    from tests.system.server import Server
    from tests.system.stored import Bucket

MIB = 2**20
PART = 8 * MIB
CONTENT = Random(8).randbytes(3 * PART + MIB)
AT_ONCE = 4
"""Parts on their way at once, with the memory that a push takes by default."""


@pytest.fixture
def proxy(gateway: Gateway) -> Iterator[FaultProxy]:
    """Between all and the bucket."""
    with FaultProxy(gateway.endpoint) as proxy:
        yield proxy


@pytest.fixture
def stored(make_bucket: MakeBucket, proxy: FaultProxy) -> Bucket:
    return make_bucket(endpoint=proxy.url)


@pytest.fixture
def start(builder: Nix, make_server: StartServer, stored: Bucket) -> Callable[..., Server]:
    """Starts a server, with more in its environment."""

    def start(**environment: str) -> Server:
        environment |= {"CACHESRV_SERVER__STORE_DIR": builder.store_dir, "CACHESRV_UPLOADS__PART_SIZE": "1 MiB"}
        return make_server(environment=environment, stored=stored).start()

    return start


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start()


def of_clients(proxy: FaultProxy) -> list[Seen]:
    """Parts that a client has sent."""
    return [
        seen
        for seen in proxy.seen
        if seen.method == "PUT" and "partNumber" in seen.query and seen.headers.get("User-Agent") == "cachesrv-push"
    ]


def check(server: Server, builder: Nix, make_client: MakeClient, path: str) -> None:
    """A client substitutes it, and nothing else lies in the bucket."""
    client = make_client(server)
    client.run("nix-store", "--realise", path)
    assert client.hashes(path) == builder.hashes(path)
    names = server.stored.names()
    hash_part = path.rpartition("/")[2][:32]
    assert names - server.stored.names("nar/") == {"nix-cache-info", f"{hash_part}.ls", f"{hash_part}.narinfo"}
    assert len(server.stored.names("nar/")) == 1
    listing = json.loads(server.client().get(f"/main/{hash_part}.ls").text)
    assert (listing["root"]["type"], listing["root"]["size"]) == ("regular", Path(path).stat().st_size)
    assert server.stored.state().get("uploads") == set()
    assert not any("~uploads" in key for key in server.stored.state())


def test_parts_pass_the_server_by(server: Server, builder: Nix, make_client: MakeClient, proxy: FaultProxy) -> None:
    path = builder.add("large", CONTENT)
    summary = push.push(builder, server, path)

    assert summary["uploaded"] == 1
    assert len(of_clients(proxy)) == 4
    assert all("Authorization" not in seen.headers for seen in of_clients(proxy))
    check(server, builder, make_client, path)


def pieces(proxy: FaultProxy) -> list[Seen]:
    """NARs that clients have sent in one piece."""
    sent = [seen for seen in proxy.seen if seen.method == "PUT" and seen.headers.get("User-Agent") == "cachesrv-push"]
    return [seen for seen in sent if "partNumber" not in seen.query]


def test_a_nar_of_one_part_passes_the_server_by_in_one_piece(
    server: Server, builder: Nix, make_client: MakeClient, proxy: FaultProxy
) -> None:
    """And again, when nobody hears that it has arrived."""
    path = builder.add("medium", CONTENT[: 5 * MIB])
    proxy.plan(LoseAnswer(), method="PUT", path=".staged", times=1)
    summary = push.push(builder, server, path)

    assert summary["uploaded"] == 1
    assert len(pieces(proxy)) == 2
    assert all("Authorization" not in seen.headers for seen in pieces(proxy))
    assert of_clients(proxy) == []
    check(server, builder, make_client, path)


def test_killed_while_a_piece_is_checked(
    server: Server, builder: Nix, make_client: MakeClient, proxy: FaultProxy
) -> None:
    path = builder.add("medium", CONTENT[: 5 * MIB])
    held = Event()
    proxy.plan(Hold(held), method="GET", path=".staged", times=1)
    pushing = push.started(builder, server, path)
    until(lambda: proxy.count("GET", path=".staged") == 1, "it is not checked")
    pushing.kill()
    pushing.wait()
    held.set()
    summary = push.push(builder, server, path)

    assert summary["failed"] == 0
    check(server, builder, make_client, path)


def test_killed_on_its_way(
    server: Server, stored: Bucket, builder: Nix, make_client: MakeClient, proxy: FaultProxy
) -> None:
    """Twice: what has arrived is not sent again, and what is sent again was on its way. Late parts do no harm."""
    path = builder.add("larger", Random(9).randbytes(8 * PART + MIB))
    held = Event()
    arrived: set[int] = set()
    for more in (2, 3):
        known = len(arrived)
        proxy.plan(Delay(0), method="PUT", query="partNumber", times=more)
        proxy.plan(Hold(held), method="PUT", query="partNumber", times=100)
        pushing = push.started(builder, server, path)
        until(lambda: len(stored.parts()) == known + more, "parts do not arrive")  # noqa: B023  it ends in this round
        until(lambda: proxy.waiting < 100, "nothing is on its way")
        pushing.kill()
        pushing.wait()
        sent, arrived_before, arrived = numbers(proxy), arrived, stored.parts()
        assert sent.isdisjoint(arrived_before)
        assert 0 < len(sent - arrived) <= AT_ONCE
        proxy.calm()
    held.set()
    summary = push.push(builder, server, path)

    assert numbers(proxy).isdisjoint(arrived)
    assert summary["resumed_bytes"] >= len(arrived) * PART
    check(server, builder, make_client, path)


def numbers(proxy: FaultProxy) -> set[int]:
    """Of the parts that clients have sent."""
    return {int(seen.query["partNumber"]) for seen in of_clients(proxy)}


def test_the_first_download_does_not_go_to_the_bucket(
    start: Callable[..., Server], builder: Nix, make_client: MakeClient, proxy: FaultProxy
) -> None:
    server = start(CACHESRV_DELIVERY__DISK_CACHE_SIZE="64 MiB")
    path = builder.add("large", CONTENT)
    push.push(builder, server, path)
    assert len(of_clients(proxy)) == 4
    assert proxy.count("GET", query="X-Amz-Signature", path=".staged") == 1
    proxy.calm()
    check(server, builder, make_client, path)

    assert proxy.count("GET", path="/nar/") == 0


def test_a_part_that_was_altered_is_sent_again(
    server: Server, builder: Nix, make_client: MakeClient, proxy: FaultProxy
) -> None:
    path = builder.add("large", CONTENT)
    proxy.plan(AlterRequest(MIB), method="PUT", query="partNumber")
    push.push(builder, server, path)

    assert len(of_clients(proxy)) == 5
    check(server, builder, make_client, path)


def test_what_is_read_back_otherwise_is_not_published(
    server: Server, builder: Nix, make_client: MakeClient, proxy: FaultProxy
) -> None:
    path = builder.add("large", CONTENT)
    # Near the end: what is left of the answer fits into buffers when the server hangs up.
    proxy.plan(Alter(len(CONTENT) - 65536), method="GET", query="X-Amz-Signature", path=".staged", times=2)
    done = push.attempt(builder, server, path)

    assert done.returncode == 3
    assert "part 4 was altered" in done.stdout
    assert server.stored.names() <= {"nix-cache-info"}
    push.push(builder, server, path)
    check(server, builder, make_client, path)
