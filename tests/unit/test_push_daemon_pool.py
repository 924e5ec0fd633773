"""The pool of connections: bounded, and nothing leaks when a task is cancelled in the middle."""

import asyncio

import pytest

from cachesrv.errors import DaemonError
from cachesrv.nix.hashes import Hash
from cachesrv.nix.path_info import PathInfo
from cachesrv.nix.store_path import StorePath
from cachesrv.nix.worker_protocol import Op
from cachesrv.push.daemon import ConnectionPool, DaemonStore
from cachesrv.push.store_location import StoreLocation, locate
from tests.fake_daemon import FakeDaemon, Peer
from tests.waiting import PLENTY, until

INFOS = [PathInfo(StorePath(f"{number:032d}", "x"), Hash.of("sha256", b""), 120) for number in range(20)]
PATHS = [info.store_path for info in INFOS]


def location(daemon: FakeDaemon) -> StoreLocation:
    return locate(f"unix://{daemon.socket}", {})


async def test_questions_beyond_the_bound_wait_for_a_connection() -> None:
    async with FakeDaemon(infos=INFOS) as daemon:
        asked = asyncio.Semaphore(0)
        go_on = asyncio.Event()

        async def wait(peer: Peer) -> None:
            asked.release()
            await go_on.wait()
            await daemon.path_info(peer)

        daemon.answers[Op.QUERY_PATH_INFO] = wait
        store = await DaemonStore.open(location(daemon), connections=2, timeout=PLENTY)
        questions = [asyncio.ensure_future(store.path_info(path)) for path in PATHS]
        for _ in range(2):
            await asked.acquire()
        await asyncio.sleep(0.02)
        assert asked.locked()  # nobody else has asked
        assert daemon.connections == 2
        go_on.set()
        assert await asyncio.gather(*questions) == INFOS
        assert daemon.connections == 2
        await store.close()


async def test_connections_are_made_when_needed_and_kept() -> None:
    async with FakeDaemon(infos=INFOS) as daemon:
        store = await DaemonStore.open(location(daemon), connections=8, timeout=PLENTY)
        for path in PATHS:
            await store.path_info(path)
        assert daemon.connections == 1
        await store.close()


async def test_a_cancelled_question_gives_its_connection_up_and_its_place_free() -> None:
    async with FakeDaemon(infos=INFOS) as daemon:
        asked = asyncio.Event()
        gone = asyncio.Event()

        async def never_answer(peer: Peer) -> None:
            asked.set()
            await peer.hung_up()
            gone.set()

        store = await DaemonStore.open(location(daemon), connections=1, timeout=PLENTY)
        for connections in (1, 2, 3):
            daemon.answers[Op.QUERY_PATH_INFO] = never_answer
            question = asyncio.ensure_future(store.path_info(PATHS[0]))
            await asked.wait()
            question.cancel()
            with pytest.raises(asyncio.CancelledError):
                await question
            async with asyncio.timeout(PLENTY):
                await gone.wait()
            daemon.answers[Op.QUERY_PATH_INFO] = daemon.path_info
            assert await store.path_info(PATHS[1]) == INFOS[1]
            assert daemon.connections == connections + 1
            asked.clear()
            gone.clear()
        await store.close()


async def test_a_question_cancelled_during_the_handshake_leaves_no_connection() -> None:
    gone = asyncio.Event()

    async def say_nothing(peer: Peer) -> None:
        await peer.hung_up()
        gone.set()

    async with FakeDaemon(greeting=say_nothing) as daemon:
        opening = asyncio.ensure_future(DaemonStore.open(location(daemon), timeout=PLENTY))
        await until(lambda: daemon.open == 1)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        async with asyncio.timeout(PLENTY):
            await gone.wait()


async def test_a_cancelled_wait_for_a_place_takes_none() -> None:
    async with FakeDaemon(infos=INFOS) as daemon:
        pool = ConnectionPool(daemon.socket, size=1, timeout=PLENTY)
        async with pool.connection():
            waiting = asyncio.ensure_future(pool.connection().__aenter__())
            await asyncio.sleep(0.02)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        async with asyncio.timeout(PLENTY), pool.connection():
            assert daemon.connections == 1
        await pool.close()


async def test_a_failure_of_the_user_alone_does_not_cost_the_connection() -> None:
    async with FakeDaemon(infos=INFOS) as daemon:
        pool = ConnectionPool(daemon.socket, size=1, timeout=PLENTY)
        with pytest.raises(ZeroDivisionError):
            async with pool.connection():
                raise ZeroDivisionError
        async with pool.connection():
            assert daemon.connections == 1
        await pool.close()


async def test_close_ends_all_connections_and_questions_under_way() -> None:
    async with FakeDaemon(infos=INFOS) as daemon:
        asked = asyncio.Event()
        gone = asyncio.Event()

        async def never_answer(peer: Peer) -> None:
            asked.set()
            await peer.hung_up()
            gone.set()

        store = await DaemonStore.open(location(daemon), connections=2, timeout=PLENTY)
        daemon.answers[Op.QUERY_PATH_INFO] = never_answer
        question = asyncio.ensure_future(store.path_info(PATHS[0]))
        await asked.wait()
        await store.close()
        with pytest.raises(DaemonError, match="hung up"):
            await question
        async with asyncio.timeout(PLENTY):
            await gone.wait()
        await store.close()  # once more does no harm
        with pytest.raises(DaemonError, match=f"{daemon.socket} have been closed"):
            await store.path_info(PATHS[0])
        assert not daemon.open
