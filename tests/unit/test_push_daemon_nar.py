"""NARs that the daemon sends: whole, or an error that says what happened; in little memory."""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from cachesrv.errors import DaemonError
from cachesrv.nix.daemon_messages import OperationFailed
from cachesrv.nix.hashes import Hash
from cachesrv.nix.path_info import PathInfo
from cachesrv.nix.store_path import StorePath
from cachesrv.nix.wire import encode_string
from cachesrv.nix.worker_protocol import Op
from cachesrv.push.daemon import DaemonStore
from cachesrv.push.daemon_connection import Connection
from cachesrv.push.store_location import StoreLocation, locate
from tests.fake_daemon import LAST, Answer, FakeDaemon, Peer, encode_error
from tests.waiting import PLENTY

PATH = StorePath("1" * 32, "file")


def location(daemon: FakeDaemon) -> StoreLocation:
    return locate(f"unix://{daemon.socket}", {})


def nar_of(contents: bytes) -> bytes:
    words = (b"nix-archive-1", b"(", b"type", b"regular", b"contents", contents, b")")
    return b"".join(map(encode_string, words))


def info(nar: bytes) -> PathInfo:
    return PathInfo(PATH, Hash.of("sha256", nar), len(nar))


SMALL = nar_of(b"hello\n")
LARGE = nar_of(random.Random(0).randbytes(5_000_001))


def sends(*data: bytes, hang_up: bool = True) -> Answer:
    async def answer(peer: Peer) -> None:
        await peer.string()
        await peer.write(LAST, *data)
        if hang_up:
            raise ConnectionAbortedError
        await peer.hung_up()

    return answer


async def read(store: DaemonStore, wanted: PathInfo) -> bytes:
    async with asyncio.timeout(PLENTY):
        return b"".join([chunk async for chunk in store.nar(wanted)])


@pytest.mark.parametrize("nar", [SMALL, LARGE], ids=["small", "large"])
async def test_a_nar_arrives_whole_and_the_connection_stays(nar: bytes) -> None:
    async with FakeDaemon(infos=[info(nar)]) as daemon:
        daemon.nars[PATH.base_name] = nar
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        for _ in range(3):
            assert await read(store, info(nar)) == nar
            assert await store.path_info(PATH) == info(nar)
        assert daemon.connections == 1
        await store.close()


async def test_chunks_are_small_and_the_daemon_is_held_back_by_a_slow_reader() -> None:
    sent = 0

    async def endless(peer: Peer) -> None:
        nonlocal sent
        await peer.string()
        await peer.write(LAST)
        while True:
            await peer.write(bytes(1 << 16))
            sent += 1 << 16

    async with FakeDaemon() as daemon:
        daemon.answers[Op.NAR_FROM_PATH] = endless
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        async with aclosing(store.nar(PathInfo(PATH, Hash.of("sha256", b""), 1 << 40))) as chunks:
            received = 0
            async for chunk in chunks:
                received += len(chunk)
                assert 0 < len(chunk) <= 1 << 20
                if received > 10 << 20:
                    break
            await asyncio.sleep(0.1)
            assert sent - received < 4 << 20
        await store.close()


async def test_a_reader_that_leaves_early_gives_the_connection_up() -> None:
    async with FakeDaemon(infos=[info(LARGE)]) as daemon:
        daemon.nars[PATH.base_name] = LARGE
        store = await DaemonStore.open(location(daemon), connections=1, timeout=PLENTY)
        async with aclosing(store.nar(info(LARGE))) as chunks:
            await anext(chunks)
        assert await store.path_info(PATH) == info(LARGE)
        assert daemon.connections == 2
        await store.close()


async def test_a_reader_that_is_cancelled_gives_the_connection_up() -> None:
    async with FakeDaemon(infos=[info(LARGE)]) as daemon:
        begin, begun = sends(LARGE[:1000], hang_up=False), asyncio.Event()

        async def answer(peer: Peer) -> None:
            begun.set()
            await begin(peer)

        daemon.answers[Op.NAR_FROM_PATH] = answer
        store = await DaemonStore.open(location(daemon), connections=1, timeout=PLENTY)
        reading = asyncio.ensure_future(read(store, info(LARGE)))
        await begun.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await store.path_info(PATH) == info(LARGE)
        assert daemon.connections == 2
        await store.close()


FAILURE = encode_error("reading from file '\x1b[35;1m/nix/store/x\x1b[0m': Input/output error")
"""As the daemon sends it, twice, among the bytes of the NAR, before it hangs up."""


@pytest.mark.parametrize(
    ("nar", "sent", "expected"),
    [
        (SMALL, b"", "it hung up after 0 of 120 bytes"),
        (SMALL, SMALL[:-1], "it hung up after 119 of 120 bytes"),
        (LARGE, LARGE[:-8], f"it hung up after {len(LARGE) - 8} of {len(LARGE)} bytes"),
        (LARGE, LARGE[:70_000] + FAILURE * 2, "reading from file '/nix/store/x': Input/output error"),
        (LARGE, LARGE[:4_000_000] + FAILURE * 2, "reading from file '/nix/store/x': Input/output error"),
        (SMALL, SMALL[:24] + FAILURE * 2, "reading from file '/nix/store/x': Input/output error"),
        (SMALL, SMALL[:24] + encode_error("") * 2, "an error without a message"),
        (SMALL, SMALL[:-8] + b"12345678", "its 120 bytes are not a whole NAR"),
        (SMALL, SMALL + SMALL[:-8], None),
    ],
    ids=["none", "one missing", "end missing", "error", "late error", "error longer", "mute error", "no NAR", "more"],
)
async def test_a_nar_that_does_not_come_whole(nar: bytes, sent: bytes, expected: str | None) -> None:
    async with FakeDaemon(infos=[info(nar)]) as daemon:
        daemon.answers[Op.NAR_FROM_PATH] = sends(sent)
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        if expected is None:
            assert await read(store, info(nar)) == nar
        else:
            with pytest.raises(DaemonError) as caught:
                await read(store, info(nar))
            assert str(caught.value) == f"the Nix daemon at {daemon.socket}: {expected} (while sending a NAR)"
        assert await store.path_info(PATH) == info(nar)
        assert daemon.connections == 2
        await store.close()


async def test_a_refused_nar_is_an_error_of_one_operation() -> None:
    async def refuse(peer: Peer) -> None:
        await peer.string()
        await peer.write(encode_error("not allowed"))

    async with FakeDaemon(infos=[info(SMALL)]) as daemon:
        daemon.answers[Op.NAR_FROM_PATH] = refuse
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        with pytest.raises(OperationFailed, match="not allowed"):
            await read(store, info(SMALL))
        assert await store.path_info(PATH) == info(SMALL)
        assert daemon.connections == 1
        await store.close()


@pytest.mark.parametrize("sent", [b"", LARGE[:1000], SMALL[:-8] + b"12345678"], ids=["none", "some", "no end"])
async def test_silence_in_the_middle_of_a_nar_ends_in_time(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    truly = Connection.nar

    def in_a_hurry(connection: Connection, size: int) -> AsyncGenerator[bytes, None]:
        connection._timeout = 0.2
        return truly(connection, size)

    monkeypatch.setattr(Connection, "nar", in_a_hurry)
    async with FakeDaemon() as daemon:
        daemon.answers[Op.NAR_FROM_PATH] = sends(sent, hang_up=False)
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        wanted = info(SMALL) if len(sent) == len(SMALL) else info(LARGE)
        with pytest.raises(DaemonError, match=r"no answer within 0\.2 seconds after|not a whole NAR"):
            await read(store, wanted)
        await store.close()


async def test_time_that_the_reader_takes_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    clock, later = loop.time, 0.0
    monkeypatch.setattr(loop, "time", lambda: clock() + later)
    async with FakeDaemon(infos=[info(LARGE)]) as daemon:
        daemon.nars[PATH.base_name] = LARGE
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        received = b""
        async for chunk in store.nar(info(LARGE)):
            later += 2 * PLENTY
            received += chunk
        assert received == LARGE
        await store.close()


async def test_a_nar_of_unknown_size_is_not_asked_for() -> None:
    async with FakeDaemon() as daemon:
        store = await DaemonStore.open(location(daemon), timeout=PLENTY)
        with pytest.raises(DaemonError, match=f"does not know the size of /nix/store/{PATH}"):
            await read(store, PathInfo(PATH, Hash.of("sha256", b""), 0))
        assert daemon.asked == []
        await store.close()
