"""A disk that is full, a real one: what does not fit is refused, what is there is served, a collection makes room."""

from __future__ import annotations

import os
import random
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.samples import Sample
from tests.system import push
from tests.system.conftest import PROXY
from tests.system.server import until
from tests.system.small_disk import ServerOn, SmallDisk, small_disk

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.system.conftest import MakeBucket
    from tests.system.nix import Nix
    from tests.system.server import Server
    from tests.system.stored import Stored

MIB = 2**20
RESERVE = 2 * MIB
CONFIG = """
[collect]
interval = 0
lease = 1
nar_grace = 0

[[cache]]
name = "main"
root = true
retention_size = "4 MiB"
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", "24m") as disk:
        yield disk


@pytest.fixture
def make_server(disk: SmallDisk, tmp_path: Path) -> Iterator[Callable[..., ServerOn]]:
    servers: list[ServerOn] = []

    def make(stored: Stored | None = None, **environment: str) -> ServerOn:
        environment |= {"CACHESRV_STORAGE__RESERVE": str(RESERVE)}
        servers.append(ServerOn(disk, tmp_path / "server", config=CONFIG, environment=environment, stored=stored))
        return servers[-1]

    yield make
    for server in servers:
        server.dispose()


@pytest.fixture
def server(make_server: Callable[..., ServerOn]) -> ServerOn:
    server = make_server()
    server.start()
    return server


def sample(number: int, size: int = MIB) -> Sample:
    return Sample(f"path-{number}", random.Random(number).randbytes(size))


def put(server: Server, what: Sample) -> int:
    """The status of a push in the way of `nix copy`: of the first step that failed, or of the last."""
    status = server.pusher.put(what.nar_url, what.file).status
    return status if status != 204 else server.pusher.put(what.narinfo_url, what.narinfo()).status


def fill_by_pushes(server: Server) -> list[Sample]:
    """What was acknowledged before the first refusal."""
    acknowledged: list[Sample] = []
    while (status := put(server, sample(len(acknowledged)))) == 204:
        acknowledged.append(sample(len(acknowledged)))
    assert status == 507
    return acknowledged


def check_served(server: Server, *samples: Sample) -> None:
    for what in samples:
        assert server.client().get(what.narinfo_url).status == 200
        assert server.client().get(what.nar_url).body == what.file


def has_reserve(disk: SmallDisk) -> bool:
    reserve = disk.outside / "data" / "reserve"
    return reserve.exists() and reserve.stat().st_blocks * 512 >= RESERVE


def leftovers(disk: SmallDisk) -> list[str]:
    return [name for _, _, names in os.walk(disk.outside) for name in names if name.startswith(".incoming-")]


def test_pushes_until_refusal_then_a_collection_then_pushes_again(server: ServerOn, disk: SmallDisk) -> None:
    acknowledged = fill_by_pushes(server)
    assert len(acknowledged) > 10
    assert disk.free >= RESERVE
    assert has_reserve(disk)
    disk.fill()
    assert disk.free == 0
    check_served(server, *acknowledged)
    assert server.client().get(sample(9999).narinfo_url).status == 404
    server.kill()
    server.start()
    check_served(server, *acknowledged)
    assert put(server, sample(1000)) == 507
    done = server.run("gc", "--json")
    assert done.returncode == 0, done.stderr
    until(partial(has_reserve, disk), "there is no reserve again")
    assert disk.free > 4 * MIB
    again = [sample(number) for number in range(2000, 2003)]
    assert [put(server, what) for what in again] == [204] * 3
    statuses = [server.client().get(what.narinfo_url).status for what in acknowledged]
    assert set(statuses) == {200, 404}
    check_served(server, *again, *(what for what, status in zip(acknowledged, statuses, strict=True) if status == 200))
    assert leftovers(disk) == []


def test_objects_in_a_bucket_and_a_full_disk_beside_it(
    make_server: Callable[..., ServerOn], make_bucket: MakeBucket, disk: SmallDisk
) -> None:
    """There is room for objects, but none for what catalog and index say of them, nor in the disk cache."""
    server = make_server(make_bucket(PROXY), CACHESRV_DELIVERY__DISK_CACHE_SIZE="3 MiB")
    server.start()
    acknowledged = [sample(number) for number in range(6)]
    assert [put(server, what) for what in acknowledged] == [204] * 6
    disk.fill()
    assert put(server, sample(1000)) == 507
    check_served(server, *acknowledged)
    server.kill()
    server.start()
    check_served(server, *acknowledged)
    disk.fill()  # the disk cache has made room for others
    assert put(server, sample(1000)) == 507
    done = server.run("gc", "--json")
    assert done.returncode == 0, done.stderr
    statuses = [server.client().get(what.narinfo_url).status for what in acknowledged]
    assert sorted(statuses) == [200] * 3 + [404] * 3
    assert len(server.stored.names("nar/")) == 3
    disk.empty()
    until(partial(has_reserve, disk), "there is no reserve again")
    assert put(server, sample(1000)) == 204
    done = server.run("verify", "--contents")
    assert done.returncode == 0, done.stdout


def test_what_does_not_fit_is_refused_before_it_is_sent(server: ServerOn, disk: SmallDisk) -> None:
    large = sample(1, MIB)
    head = f"PUT {large.nar_url} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.token}\r\n"
    with server.client().connect() as connection:
        connection.sendall(f"{head}Content-Length: {40 * MIB}\r\nExpect: 100-continue\r\n\r\n".encode())
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 507 ")
    assert b"room for this, 2" in answer  # of the 24 MiB some are taken
    assert b" MiB are missing" in answer
    assert leftovers(disk) == []
    check_served(server)


def received(connection: socket.socket) -> bytes:
    data = b""
    while more := connection.recv(65536):
        data += more
        if b"missing" in data:
            break
    return data


def test_a_body_of_unknown_length_ends_where_the_room_does(server: ServerOn, disk: SmallDisk) -> None:
    first = sample(1)
    assert put(server, first) == 204
    large = sample(2, 30 * MIB)
    pieces = (large.file[start : start + MIB] for start in range(0, len(large.file), MIB))
    assert server.pusher.put(large.nar_url, pieces).status == 507  # in chunks: nobody says how much it is
    assert leftovers(disk) == []
    assert disk.free >= RESERVE
    check_served(server, first)
    assert put(server, sample(3)) == 204


def test_an_uploader_says_what_is_the_matter_and_gives_up(
    builder: Nix, make_server: Callable[..., ServerOn], disk: SmallDisk
) -> None:
    server = make_server(CACHESRV_SERVER__STORE_DIR=builder.store_dir)
    server.start()
    disk.fill(leaving=RESERVE + MIB)
    path = builder.add("large", random.Random(1).randbytes(8 * MIB))
    done = push.attempt(builder, server, path)
    assert done.returncode == 1
    assert "no room" in done.stderr + done.stdout
    assert not [event for event in push.events(done) if event["event"] == "retrying"]
    disk.empty()
    assert push.push(builder, server, path)["uploaded"] == 1
