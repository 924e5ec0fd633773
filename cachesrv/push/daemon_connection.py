"""One connection to the Nix daemon: runs the exchanges of the worker protocol over its socket, never waits forever.

Every error is a `DaemonError` that names the daemon by its socket and tells what really failed: whether it could
not be reached, hung up, said nothing, said no, or did not speak the protocol.
"""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from cachesrv.errors import BadInput, DaemonError
from cachesrv.nix.daemon_messages import TAIL, HungUp, NarTail, OperationFailed
from cachesrv.nix.worker_protocol import Session, Steps, handshake

T = TypeVar("T")

READ_AHEAD = 512 << 10
"""Bytes that wait to be consumed before the socket is left alone."""
REST_PATIENCE = 5.0
"""Seconds to wait for the rest of what a daemon says in place of the end of a NAR."""
FULL_BACKLOG_PAUSE = 0.02
"""Seconds between attempts while the daemon has too many connections to accept."""


async def connect(path: Path, *, timeout: float) -> "Connection":
    """Reaches the daemon at the socket `path` and shakes hands; `timeout` is of each exchange, in seconds."""
    name = f"the Nix daemon at {path}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await _reach(sock, path, name, timeout)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_unix_connection(lambda: Connection(name, timeout), sock=sock)
    except BaseException:
        sock.close()
        raise
    try:
        connection.session = await connection.run(handshake(), "during the handshake")
    except BaseException:
        connection.abort()
        raise
    return connection


async def _reach(sock: socket.socket, path: Path, name: str, timeout: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while True:
        try:
            sock.connect(str(path))
        except BlockingIOError:
            # A full backlog; the event loop would take it for a connection under way, and then for a connection.
            if loop.time() > deadline:
                raise DaemonError(f"{name} accepts no connection for {timeout:g} seconds") from None
            await asyncio.sleep(FULL_BACKLOG_PAUSE)
        except OSError as error:
            raise DaemonError(f"{name} cannot be reached: {error.strerror or error}") from None
        else:
            return


class Connection(asyncio.Protocol):
    """A connection after the handshake, for one task at a time.

    `reusable` tells whether another exchange may follow: the last one was read to its end, and nothing came after.
    A task that is cancelled or fails in the middle of an exchange leaves a connection that is not. `lost` is done
    when either side has ended it.
    """

    session: Session
    _transport: asyncio.Transport

    def __init__(self, name: str, timeout: float) -> None:
        self._name = name
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._in_step = True
        self._end: str | None = None
        self.lost: asyncio.Future[None] = self._loop.create_future()

    @property
    def reusable(self) -> bool:
        return self._in_step and not self._buffer and self._end is None

    async def run(self, steps: Steps[T], doing: str) -> T:
        """Runs one exchange to its end; `doing` tells in errors when they happened."""
        self._in_step = False
        deadline = self._loop.time() + self._timeout
        try:
            wanted = next(steps)
            while True:
                if isinstance(wanted, bytes):
                    self._transport.write(wanted)
                    wanted = next(steps)
                    continue
                if len(self._buffer) < wanted:
                    await self._need_for(steps, wanted, deadline)
                wanted = steps.send(self._take(wanted))
        except StopIteration as stop:
            self._in_step = True
            result: T = stop.value
            return result
        except OperationFailed as failure:
            self._in_step = True
            raise OperationFailed(f"{self._name}: {failure}") from None
        except DaemonError as error:
            raise DaemonError(f"{self._name}: {error} ({doing})") from None
        except BadInput as error:
            raise DaemonError(f"{self._name} does not keep to the protocol: {error} ({doing})") from error

    async def nar(self, size: int) -> AsyncGenerator[bytes, None]:
        """The `size` bytes of the NAR that comes next.

        The consumer may take its time: the bytes wait in the daemon then. Raises `DaemonError` unless they are
        a NAR to its end; a daemon that fails on the way says why among them.
        """
        self._in_step = False
        tail = NarTail(size)
        while tail.left:
            try:
                await self._need(1, self._loop.time() + self._timeout)
            except DaemonError as end:
                said = tail.error() or f"{end} after {size - tail.left} of {size} bytes"
                raise DaemonError(f"{self._name}: {said} (while sending a NAR)") from None
            chunk = self._take(min(tail.left, len(self._buffer)))
            tail.feed(chunk)
            if not tail.left and not tail.whole:
                said = tail.error(await self._rest()) or f"its {size} bytes are not a whole NAR"
                raise DaemonError(f"{self._name}: {said} (while sending a NAR)")
            yield chunk
        self._in_step = True

    def abort(self) -> None:
        """Ends the connection, whatever it is doing."""
        self._transport.abort()

    async def _need_for(self, steps: Steps[T], count: int, deadline: float) -> None:
        try:
            await self._need(count, deadline)
        except DaemonError as error:
            steps.throw(error)
            raise

    async def _need(self, count: int, deadline: float) -> None:
        """Returns when at least `count` bytes are here; raises `DaemonError` without name when none come."""
        while len(self._buffer) < count:
            if self._end is not None:
                raise HungUp(self._end)
            self._transport.resume_reading()
            self._waiter = self._loop.create_future()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._waiter
            except TimeoutError:
                raise DaemonError(f"no answer within {self._timeout:g} seconds") from None
            finally:
                self._waiter = None

    async def _rest(self) -> bytes:
        with suppress(DaemonError):
            await self._need(TAIL, self._loop.time() + min(self._timeout, REST_PATIENCE))
        return bytes(self._buffer)

    def _take(self, count: int) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > READ_AHEAD:
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        gone = exc is None or isinstance(exc, ConnectionError)
        self._end = "it hung up" if gone else f"the connection broke: {exc}"
        self.lost.set_result(None)
        self._wake()
