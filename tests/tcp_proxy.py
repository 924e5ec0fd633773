"""A proxy with limits of its own. Of HTTP it knows only that an answer begins when the request before it is over."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_PIECE = 64 * 1024
_TOO_LARGE = b"HTTP/1.1 413 Too Large\r\nContent-Length: 9\r\nConnection: close\r\n\r\ntoo large"
_AT_ONCE = struct.pack("ii", 1, 0)


class End(Enum):
    """How a connection ends on which too much has come: with a reset, which leaves no answer; or after an answer, with
    one, since what comes is not read any more.
    """

    RESET = "reset"
    ANSWER = "answer"


@dataclass
class TcpProxy:
    """In front of a server at a port of this machine; in an event loop.

    takes: bytes of a request, 0 for any number; what is more ends its connection, as `end` says.
    in_time: bytes that the link carries, of all requests together, in the time that one may take; 0 for any time.
    requests: that may come on one connection, 0 for any number; the next one ends it.
    one_at_a_time: no connection is looked at before the one that came first has ended.
    ended: how many connections it has ended.
    """

    upstream: int
    takes: int = 0
    end: End = End.RESET
    in_time: int = 0
    requests: int = 0
    one_at_a_time: bool = False
    ended: int = 0
    port: int = 0
    _listening: asyncio.Server | None = None
    _served: dict[asyncio.Task[None], asyncio.StreamWriter] = field(default_factory=dict)
    _looked_at: asyncio.Lock = field(default_factory=asyncio.Lock)
    _carried: int = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[TcpProxy]:
        """Listens meanwhile, on `port`."""
        await self.up()
        try:
            yield self
        finally:
            await self.down()

    async def up(self) -> None:
        """Listen, where it was before."""
        self._listening = await asyncio.start_server(self._begin, "127.0.0.1", self.port)
        self.port = self._listening.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Refuse connections, and end those that there are."""
        assert self._listening is not None
        self._listening.close()
        served, self._served = self._served, {}
        for task, writer in served.items():
            task.cancel()
            writer.transport.abort()
        await asyncio.gather(*served, return_exceptions=True)
        await asyncio.sleep(0)  # connections close in the next round of the loop

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._served[asyncio.create_task(self._serve(reader, writer))] = writer

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            if not self.one_at_a_time:
                await self._connect(reader, writer)
                return
            async with self._looked_at:
                await self._connect(reader, writer)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, out = await asyncio.open_connection("127.0.0.1", self.upstream)
        connection = _Connection()
        ways = [
            asyncio.create_task(self._requests(connection, reader, writer, out)),
            asyncio.create_task(self._answers(connection, answers, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            out.transport.abort()

    async def _requests(
        self,
        connection: _Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        out: asyncio.StreamWriter,
    ) -> None:
        with suppress(ConnectionError):
            while piece := await reader.read(_PIECE):
                connection.add(len(piece), self._carried)
                self._carried += len(piece)
                if self._is_too_much(connection):
                    self._end(writer)
                    return
                out.write(piece)
                await out.drain()

    async def _answers(
        self, connection: _Connection, answers: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(ConnectionError):
            while piece := await answers.read(_PIECE):
                connection.size = 0
                writer.write(piece)
                await writer.drain()

    def _is_too_much(self, connection: _Connection) -> bool:
        meanwhile = self._carried - connection.begun
        return (
            0 < self.takes < connection.size or 0 < self.in_time < meanwhile or 0 < self.requests < connection.requests
        )

    def _end(self, writer: asyncio.StreamWriter) -> None:
        self.ended += 1
        if self.end is End.ANSWER:
            writer.write(_TOO_LARGE)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        writer.transport.abort()


@dataclass
class _Connection:
    """The request that comes on it: how much of it has come, what the link had carried before, how many there were."""

    size: int = 0
    begun: int = 0
    requests: int = 0

    def add(self, size: int, carried: int) -> None:
        """More of it has come."""
        if not self.size:
            self.begun = carried
            self.requests += 1
        self.size += size
