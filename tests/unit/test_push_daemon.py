"""The store behind a daemon that behaves: all versions, closures, failures of single operations."""

import asyncio
import re
from dataclasses import replace

import pytest

from cachesrv.errors import DaemonError, NotAllowed, NotFound
from cachesrv.nix.daemon_messages import Frame, OperationFailed
from cachesrv.nix.hashes import Hash
from cachesrv.nix.path_info import PathInfo, in_reference_order
from cachesrv.nix.realisation import Realisation, TracedOutput
from cachesrv.nix.signing import Signature
from cachesrv.nix.store_path import DEFAULT_STORE_DIR, StorePath
from cachesrv.nix.wire import encode_string, encode_strings, encode_u64
from cachesrv.nix.worker_protocol import REALISATIONS, Op, Version
from cachesrv.push.daemon import LARGEST_BATCH, DaemonStore
from cachesrv.push.store_location import StoreLocation, locate
from tests.fake_daemon import LAST, FakeDaemon, Peer, encode_error, encode_path_info
from tests.waiting import PLENTY

NAR_HASH = Hash.of("sha256", b"")


def path(number: int) -> StorePath:
    return StorePath(f"{number:032d}", "x")


def info(number: int, *references: int) -> PathInfo:
    return PathInfo(path(number), NAR_HASH, 120, tuple(path(other) for other in sorted(references)))


def location(daemon: FakeDaemon, *, database: bool = True) -> StoreLocation:
    return locate(f"unix://{daemon.socket}{'' if database else '?state=/nowhere'}", {})


@pytest.mark.parametrize("version", [(1, 32), (1, 33), (1, 34), (1, 35), (1, 36), (1, 37), (1, 38), (1, 39), (1, 99)])
async def test_every_version_is_understood(version: Version) -> None:
    features = ("delete-dead-specific-referrers", "realisation-with-path-not-hash", "of-tomorrow")
    async with FakeDaemon(version=version, features=features, infos=[info(1, 1), info(2, 1)]) as daemon:
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        assert await store.path_info(path(2)) == info(2, 1)
        assert await store.closure([path(2)]) == [info(1, 1), info(2, 1)]
        assert store.name == f"Nix daemon{' 2.99.0' if version >= (1, 33) else ''} at {daemon.socket}"
        await store.close()


async def test_a_daemon_that_takes_only_new_clients_takes_us() -> None:
    async with FakeDaemon(version=(1, 35), oldest_client=(1, 35), nix_version="2.93.0-lix", infos=[info(1)]) as daemon:
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        assert await store.path_info(path(1)) == info(1)
        await store.close()


async def test_too_old_a_daemon_is_refused() -> None:
    async with FakeDaemon(version=(1, 21)) as daemon:
        expected = f"the Nix daemon at {daemon.socket}: it speaks protocol 1.21, at least 1.32 is needed"
        with pytest.raises(DaemonError, match=re.escape(expected)):
            await DaemonStore.open(location(daemon), timeout=PLENTY)


async def test_a_closure_is_complete_and_asks_for_each_path_once() -> None:
    infos = [info(number, *range(max(0, number - 5), number + (number % 3 == 0))) for number in range(500)]
    async with FakeDaemon(infos=infos) as daemon:
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        assert await store.closure([path(499), path(3)]) == in_reference_order(infos)
        assert len(daemon.asked) == 500
        assert daemon.connections == 1  # waves of five are not worth a second one
        await store.close()


async def test_many_paths_at_once_are_asked_for_over_all_connections_but_no_more() -> None:
    infos = [info(number) for number in range(10 * LARGEST_BATCH)]
    async with FakeDaemon(infos=infos) as daemon:
        store = await DaemonStore.open(location(daemon), connections=3, timeout=PLENTY)
        assert len(await store.closure(entry.store_path for entry in infos)) == len(infos)
        assert daemon.most_open == daemon.connections == 3
        await store.close()


async def test_a_path_that_is_not_valid_is_named_and_the_connection_kept() -> None:
    async with FakeDaemon(infos=[info(1)]) as daemon:
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        for _ in range(3):
            with pytest.raises(NotFound, match=f"^/nix/store/{path(2)} is not valid: .* {daemon.socket} "):
                await store.closure([path(1), path(2), path(3)])
        with pytest.raises(NotFound):
            await store.path_info(path(2))
        assert await store.path_info(path(1)) == info(1)
        assert daemon.connections == 1
        await store.close()


async def test_an_error_of_one_operation_is_told_and_the_connection_kept() -> None:
    async with FakeDaemon(infos=[info(1), info(2)]) as daemon:

        async def fail_for_one(peer: Peer) -> None:
            asked = await peer.string()
            if asked == f"/nix/store/{path(1)}":
                await peer.write(encode_error("database \x1b[31mdisk image\x1b[0m is malformed", "while asking"))
            else:
                await peer.write(LAST, encode_u64(0))

        daemon.answers[Op.QUERY_PATH_INFO] = fail_for_one
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        expected = f"the Nix daemon at {daemon.socket}: database disk image is malformed (while asking)"
        for _ in range(3):
            with pytest.raises(OperationFailed, match=f"^{re.escape(expected)}$"):
                await store.closure([path(1), path(2)])
        daemon.answers[Op.QUERY_PATH_INFO] = daemon.path_info
        assert await store.path_info(path(2)) == info(2)
        assert daemon.connections == 1
        await store.close()


async def test_what_the_daemon_tells_on_the_way_does_not_matter() -> None:
    async with FakeDaemon(infos=[info(1)]) as daemon:

        async def wordy(peer: Peer) -> None:
            log = encode_u64(Frame.NEXT) + encode_string("w" * 10_000)
            activity = encode_u64(Frame.START_ACTIVITY) + encode_u64(1) * 3 + encode_string("a") + encode_u64(0) * 2
            await peer.write(*[log, activity] * 200)
            await daemon.path_info(peer)

        daemon.answers[Op.QUERY_PATH_INFO] = wordy
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        assert await store.path_info(path(1)) == info(1)
        await store.close()


async def test_an_answer_that_comes_byte_by_byte_is_read() -> None:
    async with FakeDaemon() as daemon:

        async def dribble(peer: Peer) -> None:
            await peer.string()
            for byte in LAST + encode_path_info(info(1, 1)):
                await peer.write(bytes([byte]))
                await asyncio.sleep(0)

        daemon.answers[Op.QUERY_PATH_INFO] = dribble
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        assert await store.path_info(path(1)) == info(1, 1)
        await store.close()


async def test_another_store_directory() -> None:
    async with FakeDaemon(infos=[info(1, 1)], store_dir="/opt/store") as daemon:
        where = locate(f"unix://{daemon.socket}?store=/opt/store", {})
        store = await DaemonStore.open(where, timeout=PLENTY)
        assert await store.path_info(path(1)) == info(1, 1)
        assert daemon.asked == [f"/opt/store/{path(1)}"]
        await store.close()


async def test_an_answer_from_another_store_directory_is_an_error() -> None:
    async with FakeDaemon(infos=[info(1, 1)], store_dir="/opt/store") as daemon:
        daemon.infos = {f"/nix/store/{path(1)}": info(1, 1)}
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        with pytest.raises(
            DaemonError, match=f"{daemon.socket} does not keep to the protocol: '/opt/store/.* is not in"
        ):
            await store.path_info(path(1))
        await store.close()


def output(number: int, name: str = "x", deriver: str = "x.drv", ca: str | None = "fixed:r:sha256:x") -> PathInfo:
    """A path that a derivation came out as."""
    return replace(info(number), store_path=StorePath(f"{number:032d}", name), ca=ca, deriver=drv(number, deriver))


def drv(number: int, name: str = "x.drv") -> StorePath:
    return StorePath(f"{number:032d}", name)


async def test_realisations_are_asked_for_by_derivation() -> None:
    infos = [
        output(1),
        output(2, "x-doc"),
        output(3),
        output(4),
        output(5, ca=None),
        output(6, "y"),
        info(7),
        output(8, "x-"),
    ]
    signature = Signature("key", bytes(64))
    known = {(drv(1), "out"): path(1), (drv(2), "doc"): infos[1].store_path, (drv(4), "out"): path(9)}
    asked: list[tuple[StorePath, str]] = []

    async def answer(peer: Peer) -> None:
        derivation = StorePath.parse_full(await peer.string(), DEFAULT_STORE_DIR)
        asked.append((derivation, await peer.string()))
        found = known.get(asked[-1])
        said = encode_u64(0)
        if found:
            said = encode_u64(1) + encode_string(found.full(DEFAULT_STORE_DIR)) + encode_strings([signature.render()])
        await peer.write(LAST + said)

    async with FakeDaemon(features=[REALISATIONS], infos=infos) as daemon:
        daemon.answers[Op.QUERY_REALISATION] = answer
        store = await DaemonStore.open(location(daemon, database=False), timeout=PLENTY)
        found = await store.realisations([one.store_path for one in infos])
        await store.close()

    assert found == {
        TracedOutput(drv(1), "out"): Realisation(path(1), (signature,)),
        TracedOutput(drv(2), "doc"): Realisation(infos[1].store_path, (signature,)),
    }
    assert sorted(asked) == [(drv(1), "out"), (drv(2), "doc"), (drv(3), "out"), (drv(4), "out")]


@pytest.mark.parametrize(("version", "features"), [((1, 37), [REALISATIONS]), ((1, 38), ["of-tomorrow"])])
async def test_a_daemon_that_cannot_be_asked_for_realisations_is_named(version: Version, features: list[str]) -> None:
    async with FakeDaemon(version=version, features=features, infos=[output(1)]) as daemon:
        store = await DaemonStore.open(location(daemon, database=False), timeout=PLENTY)
        with pytest.raises(NotAllowed, match=r"does not tell them, and this user may not read .*db.sqlite"):
            await store.realisations([path(1)])
        await store.close()
