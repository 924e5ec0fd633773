"""Daemons that die, stall or talk nonsense: a clear error that names them, in time, never a hang."""

import asyncio
import contextlib
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cachesrv.errors import DaemonError
from cachesrv.nix.daemon_messages import Frame
from cachesrv.nix.hashes import Hash
from cachesrv.nix.path_info import PathInfo
from cachesrv.nix.store_path import StorePath
from cachesrv.nix.wire import encode_string, encode_u64
from cachesrv.nix.worker_protocol import DAEMON_MAGIC, Op
from cachesrv.push.daemon import LARGEST_BATCH, DaemonStore
from cachesrv.push.store_location import StoreLocation, locate
from tests.fake_daemon import LAST, Answer, FakeDaemon, Peer, encode_error, encode_path_info
from tests.waiting import PLENTY, until

INFOS = [PathInfo(StorePath(f"{number:032d}", "x"), Hash.of("sha256", b""), 120) for number in range(4 * LARGEST_BATCH)]
PATHS = [info.store_path for info in INFOS]
PATIENCE = 0.3


def location(socket_file: Path) -> StoreLocation:
    return locate(f"unix://{socket_file}", {})


async def error_of(work: Awaitable[Any]) -> str:
    """The message of the DaemonError that `work` raises."""
    async with asyncio.timeout(PLENTY):
        with pytest.raises(DaemonError) as caught:
            await work
    return str(caught.value)


def says(*data: bytes, then: Callable[[Peer], Awaitable[None]] | None = None) -> Answer:
    """A peer that says this whatever it is asked, and hangs up unless it is told what to do next."""

    async def answer(peer: Peer) -> None:
        await peer.write(*data)
        if then is None:
            raise ConnectionAbortedError
        await then(peer)

    return answer


async def chatter(peer: Peer) -> None:
    while True:
        await peer.write(encode_u64(Frame.NEXT), encode_string("still here\n"))
        await asyncio.sleep(0)


WELCOME = encode_u64(DAEMON_MAGIC) + encode_u64(0x0122)


@pytest.mark.parametrize(
    ("greeting", "expected"),
    [
        (says(), r": it hung up, as it does with users that it does not allow \(during the handshake\)$"),
        (says(WELCOME), r": it hung up.* \(during the handshake\)$"),
        (says(WELCOME[:12]), r": it hung up.* \(during the handshake\)$"),
        (says(then=Peer.hung_up), r": no answer within 0\.3 seconds \(during the handshake\)$"),
        (says(WELCOME, then=Peer.hung_up), r": no answer within 0\.3 seconds \(during the handshake\)$"),
        (says(WELCOME, encode_string("2.8.0"), then=chatter), r": no answer within 0\.3 seconds \(during the hands"),
        (says(b"HTTP/1.1 400 Bad Request\r\n\r\n", then=Peer.hung_up), r" does not keep to the protocol: .*HTTP/1\.1"),
        (says(bytes(100), then=Peer.hung_up), r" does not keep to the protocol: it greets with "),
        (says(WELCOME, encode_u64(2**60), then=Peer.hung_up), r" does not keep .* a string of 1152921504606846976 byt"),
        (says(WELCOME, encode_string("2"), b"garbage!", then=Peer.hung_up), r" does not keep to the protocol: a frame"),
        (says(WELCOME, encode_string("2"), encode_error("no store")), r": no store$"),
    ],
)
async def test_a_daemon_that_fails_in_the_handshake(greeting: Answer, expected: str) -> None:
    async with FakeDaemon(greeting=greeting) as daemon:
        patience = PATIENCE if "no answer" in expected else PLENTY
        message = await error_of(DaemonStore.open(location(daemon.socket), timeout=patience))
        assert re.search(f"^the Nix daemon at {daemon.socket}{expected}", message), message


async def test_no_daemon_at_all(tmp_path: Path) -> None:
    absent = tmp_path / "socket"
    message = await error_of(DaemonStore.open(location(absent)))
    assert message == f"the Nix daemon at {absent} cannot be reached: No such file or directory"


async def test_a_socket_that_nobody_listens_on(tmp_path: Path) -> None:
    async with FakeDaemon() as daemon:
        left = daemon.socket.with_name("left")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(left))
        message = await error_of(DaemonStore.open(location(left)))
        assert message == f"the Nix daemon at {left} cannot be reached: Connection refused"


async def test_a_name_that_is_too_long_for_a_socket() -> None:
    message = await error_of(DaemonStore.open(location(Path("/tmp") / ("x" * 200))))
    assert "cannot be reached: AF_UNIX path too long" in message


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (says(), r": it hung up.* \(asked for path infos\)$"),
        (says(LAST, encode_path_info(INFOS[0])[:100]), r": it hung up.* \(asked for path infos\)$"),
        (says(encode_error("Nix daemon out of memory")), r": Nix daemon out of memory"),
        (says(encode_error("interrupted")[:-20]), r": it hung up.* \(asked for path infos\)$"),
        (says(then=Peer.hung_up), r": no answer within 0\.3 seconds \(asked for path infos\)$"),
        (says(then=chatter), r": no answer within 0\.3 seconds \(asked for path infos\)$"),
        (says(LAST, encode_u64(1), then=Peer.hung_up), r": no answer within 0\.3 seconds \(asked for path infos\)$"),
        (says(b"\xff" * 4096, then=Peer.hung_up), r" does not keep to the protocol: a frame of unknown kind "),
        (says(LAST, b"\xff" * 4096, then=Peer.hung_up), r" does not keep to the protocol: a string of "),
        (says(encode_u64(Frame.READ), bytes(8), then=Peer.hung_up), r" does not keep to the protocol: it wants to "),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
async def test_a_daemon_that_fails_in_an_operation(answer: Answer, expected: str, count: int) -> None:
    async with FakeDaemon(infos=INFOS) as daemon:
        store = await DaemonStore.open(location(daemon.socket), timeout=PLENTY)
        if "no answer" in expected:  # on this connection, that shook hands in time
            for connection in store._pool._open:
                connection._timeout = PATIENCE
        daemon.answers[Op.QUERY_PATH_INFO] = answer
        message = await error_of(store.closure(PATHS[:count]))
        assert re.search(f"^the Nix daemon at {daemon.socket}{expected}", message), message
        daemon.answers[Op.QUERY_PATH_INFO] = daemon.path_info
        assert await store.closure(PATHS[:count]) == INFOS[:count]  # over a new connection
        assert daemon.connections == 2
        await store.close()


async def test_running_out_of_memory_among_many_questions_is_what_is_reported() -> None:
    async with FakeDaemon(infos=INFOS) as daemon:
        store = await DaemonStore.open(location(daemon.socket), timeout=PLENTY)
        asked = 0

        async def fail_at_the_third(peer: Peer) -> None:
            nonlocal asked
            asked += 1
            if asked == 3:
                await says(encode_error("Nix daemon out of memory"))(peer)
            await daemon.path_info(peer)

        daemon.answers[Op.QUERY_PATH_INFO] = fail_at_the_third
        message = await error_of(store.closure(PATHS[:10]))
        assert message == f"the Nix daemon at {daemon.socket}: Nix daemon out of memory (asked for path infos)"
        await store.close()


async def test_when_one_of_many_batches_fails_the_others_are_given_up() -> None:
    async with FakeDaemon(infos=INFOS) as daemon:
        store = await DaemonStore.open(location(daemon.socket), timeout=PLENTY)

        async def fail_or_wait(peer: Peer) -> None:
            if await peer.string() >= f"/nix/store/{PATHS[-LARGEST_BATCH]}":
                await peer.write(encode_error("no more"))
            else:
                await peer.hung_up()

        daemon.answers[Op.QUERY_PATH_INFO] = fail_or_wait
        assert "no more" in await error_of(store.closure(PATHS))
        assert not [task for task in asyncio.all_tasks() if "DaemonStore._ask" in repr(task.get_coro())]
        daemon.answers[Op.QUERY_PATH_INFO] = daemon.path_info
        assert await store.closure(PATHS) == INFOS
        assert daemon.most_open <= 4
        await store.close()


async def test_a_daemon_that_was_restarted_between_questions_is_not_noticed() -> None:
    async with FakeDaemon(infos=INFOS) as daemon:
        store = await DaemonStore.open(location(daemon.socket), timeout=PLENTY)

        async def answer_and_die(peer: Peer) -> None:
            await daemon.path_info(peer)
            raise ConnectionAbortedError

        daemon.answers[Op.QUERY_PATH_INFO] = answer_and_die
        for number in range(3):
            assert await store.path_info(PATHS[number]) == INFOS[number]
            await until(lambda: not (store._pool._open or daemon.open))
        assert daemon.connections == 3
        await store.close()


async def test_a_connection_on_which_more_came_than_was_asked_for_is_given_up() -> None:
    async with FakeDaemon(infos=INFOS) as daemon:
        store = await DaemonStore.open(location(daemon.socket), timeout=PLENTY)

        async def say_too_much(peer: Peer) -> None:
            await daemon.path_info(peer)
            await peer.write(LAST, encode_u64(0))

        daemon.answers[Op.QUERY_PATH_INFO] = say_too_much
        for number in range(3):
            assert await store.path_info(PATHS[number]) == INFOS[number]
            await until(lambda: not any(connection.reusable for connection in store._pool._idle))
        assert daemon.connections == 3
        await store.close()


async def test_a_daemon_too_busy_to_accept_is_waited_for_but_not_forever() -> None:
    async with FakeDaemon(infos=INFOS) as daemon:
        crowded = daemon.socket.with_name("crowded")
        with contextlib.ExitStack() as sockets:
            listener = sockets.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(crowded))
            listener.listen(0)
            waiting = sockets.enter_context(socket.socket(socket.AF_UNIX))
            waiting.connect(str(crowded))
            message = await error_of(DaemonStore.open(location(crowded), timeout=PATIENCE))
            assert message == f"the Nix daemon at {crowded} accepts no connection for 0.3 seconds"

            opening = asyncio.ensure_future(DaemonStore.open(location(crowded), timeout=PLENTY))
            await asyncio.sleep(0.1)
            server = await asyncio.start_unix_server(daemon._accept, sock=listener.dup())
            store = await opening
            assert await store.path_info(PATHS[0]) == INFOS[0]
            await store.close()
            server.close()
