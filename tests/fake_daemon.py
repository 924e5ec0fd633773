"""A Nix daemon for tests that speaks any version of the worker protocol and misbehaves on demand.

Reads with the same `wire` readers as the real client. What it answers to an operation can be replaced:

    async with FakeDaemon(version=(1, 35), infos=[info]) as daemon:
        daemon.answers[Op.QUERY_PATH_INFO] = my_answer     # async (peer) -> None, reads its arguments itself
        ... connect to daemon.socket ...
"""

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Self, TypeAlias, TypeVar

from cachesrv.nix import wire
from cachesrv.nix.daemon_messages import Frame
from cachesrv.nix.path_info import PathInfo
from cachesrv.nix.store_path import DEFAULT_STORE_DIR
from cachesrv.nix.wire import encode_string, encode_strings, encode_u64
from cachesrv.nix.worker_protocol import CLIENT_MAGIC, DAEMON_MAGIC, Op, Version

T = TypeVar("T")

LAST = encode_u64(Frame.LAST)


def encode_error(message: str | bytes, *traces: str) -> bytes:
    """An ERROR frame, kind included."""
    parts = [encode_u64(Frame.ERROR), encode_string("Error"), encode_u64(0), encode_string("Error")]
    parts += [encode_string(message), encode_u64(0), encode_u64(len(traces))]
    parts += [encode_u64(0) + encode_string(trace) for trace in traces]
    return b"".join(parts)


def encode_path_info(info: PathInfo, store_dir: str = DEFAULT_STORE_DIR) -> bytes:
    """The result of QUERY_PATH_INFO for a valid path."""
    return b"".join(
        (
            encode_u64(1),
            encode_string(info.deriver.full(store_dir) if info.deriver else ""),
            encode_string(info.nar_hash.digest.hex()),
            encode_strings([path.full(store_dir) for path in info.references]),
            encode_u64(info.registration_time),
            encode_u64(info.nar_size),
            encode_u64(info.ultimate),
            encode_strings(info.signatures),
            encode_string(info.ca or ""),
        )
    )


class Peer:
    """One client, from the daemon's side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.version: Version = (0, 0)

    async def read(self, reading: wire.Reading[T]) -> T:
        wanted = next(reading)
        while True:
            data = await self.reader.readexactly(wanted)
            try:
                wanted = reading.send(data)
            except StopIteration as stop:
                value: T = stop.value
                return value

    async def string(self) -> str:
        return await self.read(wire.read_string())

    async def write(self, *data: bytes) -> None:
        self.writer.write(b"".join(data))
        await self.writer.drain()

    async def hung_up(self) -> None:
        """Returns when the client has gone."""
        while await self.reader.read(1 << 16):
            pass


Answer: TypeAlias = Callable[[Peer], Awaitable[None]]


class FakeDaemon:
    """`version` and `features` are what it announces, `infos` the valid paths, `nars` their NARs by base name.

    `greeting`, if given, replaces the whole conversation. `connections` counts those that were made, `open` those
    that are, `most_open` the most at one time, `asked` the paths of all operations in order.
    """

    def __init__(
        self,
        *,
        version: Version = (1, 38),
        features: Iterable[str] = (),
        nix_version: str = "2.99.0",
        oldest_client: Version = (1, 18),
        infos: Iterable[PathInfo] = (),
        store_dir: str = DEFAULT_STORE_DIR,
        greeting: Answer | None = None,
    ) -> None:
        self.version = version
        self.features = sorted(features)
        self.nix_version = nix_version
        self.oldest_client = oldest_client
        self.infos = {info.store_path.full(store_dir): info for info in infos}
        self.nars: dict[str, bytes] = {}
        self.store_dir = store_dir
        self.greeting = greeting
        self.answers: dict[int, Answer] = {Op.QUERY_PATH_INFO: self.path_info, Op.NAR_FROM_PATH: self.nar}
        self.connections = self.open = self.most_open = 0
        self.asked: list[str] = []
        self.failures: list[BaseException] = []

    async def __aenter__(self) -> Self:
        # Not under tmp_path: the names of sockets are limited to 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="daemon-"))
        self.socket = self._folder / "socket"
        self._peers: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_unix_server(self._accept, self.socket)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._peers:
            task.cancel()
        if self._peers:
            await asyncio.wait(self._peers)
        shutil.rmtree(self._folder)
        assert not self.failures

    async def path_info(self, peer: Peer) -> None:
        path = await peer.string()
        self.asked.append(path)
        info = self.infos.get(path)
        await peer.write(LAST, encode_path_info(info, self.store_dir) if info else encode_u64(0))

    async def nar(self, peer: Peer) -> None:
        path = await peer.string()
        self.asked.append(path)
        await peer.write(LAST, self.nars[Path(path).name])

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._peers.add(task)
        self.connections += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await (self.greeting or self._serve)(Peer(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the test is over
        except Exception as failure:  # noqa: BLE001 - a bug of the test, which is shown when it ends
            self.failures.append(failure)
        finally:
            self.open -= 1
            self._peers.discard(task)
            writer.close()

    async def _serve(self, peer: Peer) -> None:
        await self.shake_hands(peer)
        while True:
            op = await peer.read(wire.read_u64())
            await self.answers[op](peer)

    async def shake_hands(self, peer: Peer) -> None:
        assert await peer.read(wire.read_u64()) == CLIENT_MAGIC
        await peer.write(encode_u64(DAEMON_MAGIC), encode_u64(self.version[0] << 8 | self.version[1]))
        number = await peer.read(wire.read_u64())
        peer.version = min(self.version, (number >> 8, number & 0xFF))
        if peer.version < self.oldest_client:
            raise ConnectionAbortedError
        if peer.version >= (1, 38):
            await peer.read(wire.read_strings())
            await peer.write(encode_strings(self.features))
        assert await peer.read(wire.read_u64()) == 0
        assert await peer.read(wire.read_u64()) == 0
        if peer.version >= (1, 33):
            await peer.write(encode_string(self.nix_version))
        if peer.version >= (1, 35):
            await peer.write(encode_u64(1))
        await peer.write(LAST)
