"""HTTP as bytes: what a server sends back for what it is sent, cut anywhere."""

from __future__ import annotations

import asyncio
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

PATIENCE = 30.0
"""Seconds after which an answer is taken not to come."""

_ANSWER = re.compile(rb"(?=HTTP/1\.[01] \d{3} )")
_LENGTH = re.compile(rb"\r\nContent-Length: (\d+)\r\n", re.IGNORECASE)
_DATE = re.compile(rb"Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\Z")


@dataclass(frozen=True)
class Answer:
    """Header fields are lines, sorted, the date without its value."""

    status: bytes
    fields: tuple[bytes, ...]
    body: bytes


@dataclass(frozen=True)
class Outcome:
    """All that came back, and whether the server ended the connection."""

    answers: tuple[Answer, ...]
    ended: bool


def parse(data: bytes) -> tuple[Answer, ...]:
    """All answers in `data`; no body may look like the beginning of one."""
    return tuple(_parse_one(part) for part in _ANSWER.split(data) if part)


def _parse_one(data: bytes) -> Answer:
    head, _, body = data.partition(b"\r\n\r\n")
    status, *fields = head.split(b"\r\n")
    return Answer(status, tuple(sorted(b"Date" if _DATE.match(field) else field for field in fields)), body)


def end_of_answer(data: bytearray, start: int, method: str) -> int | None:
    """Where the answer ends that begins there, to a request with this method; None while it is not complete."""
    while True:
        end = data.find(b"\r\n\r\n", start)
        if end < 0:
            return None
        head = bytes(data[start : end + 2])
        if not head.startswith(b"HTTP/1.1 100 "):
            break
        start = end + 4
    length = _LENGTH.search(head)
    size = int(length[1]) if length and method != "HEAD" and b" 304 " not in head[:16] else 0
    return end + 4 + size if len(data) >= end + 4 + size else None


class Connection:
    """A client's side, that can tell one segment from the next."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = bytearray()
        self.ended = False
        self._seen = 0
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, port: int, *, receive_buffer: int | None = None) -> Connection:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(sock)

    async def send(self, *segments: bytes) -> None:
        """Send each so that a server in this event loop reads it by itself."""
        with suppress(BrokenPipeError, ConnectionResetError):
            for segment in segments:
                await self._loop.sock_sendall(self.sock, segment)
                for _ in range(3):
                    await asyncio.sleep(0)

    async def receive(self, patience: float) -> bool:
        """Take what comes next; False when nothing comes for so many seconds, or nothing more at all."""
        if self.ended:
            return False
        data = b""
        try:
            async with asyncio.timeout(patience):
                data = await self._loop.sock_recv(self.sock, 2**20)
        except TimeoutError:
            return False
        except ConnectionResetError:
            self.ended = True
            return False
        self.received += data
        self.ended = not data
        return bool(data)

    async def receive_answers(self, methods: Sequence[str]) -> None:
        """Wait for the answers to further requests, by their methods."""
        for method in methods:
            while (end := end_of_answer(self.received, self._seen, method)) is None:
                if not await self.receive(PATIENCE):
                    assert self.ended, "no answer"
                    return
            self._seen = end

    async def ask(self, *requests: bytes) -> bytes:
        """Send requests, each when the one before it is answered; all that came back."""
        before = len(self.received)
        for request in requests:
            await self.send(request)
            await self.receive_answers([request.split(b" ", 1)[0].decode()])
        return bytes(self.received[before:])

    async def ends(self, patience: float = PATIENCE) -> bool:
        """Whether the server ends the connection within so many seconds."""
        until = monotonic() + patience
        while await self.receive(max(0.01, until - monotonic())):
            pass
        return self.ended

    async def receive_all(self, quiet: float) -> Outcome:
        """All answers, until the server ends the connection, or sends nothing for so many seconds."""
        while await self.receive(quiet):
            pass
        return Outcome(parse(bytes(self.received)), self.ended)

    def close(self) -> None:
        self.sock.close()
