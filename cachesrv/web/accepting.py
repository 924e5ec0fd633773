"""Taking in connections. Those under TLS and those of sockets in the file system go straight to asyncio.

What does not fit among the open files waits. Asyncio's own servers would try again thousands of times in a row, and log
each time.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from cachesrv.web.listen import BACKLOG

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Iterator, Sequence

_log = structlog.get_logger()

PAUSE = 1.0
"""Seconds without new connections, when there is no descriptor or memory left for one."""
AT_ONCE = 64
"""Connections that are taken in before others have their turn."""
_GRACE = 1.0
"""Seconds that the server waits for those who are just coming in when it stops."""


def waiting(listening: socket.socket, most: int = AT_ONCE) -> Iterator[socket.socket]:
    """Connections that wait at a socket. Raises OSError when there is no descriptor or memory left for the next one."""
    for _ in range(most):
        try:
            sock, _address = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        sock.setblocking(False)
        yield sock


def no_room(error: OSError) -> None:
    """Tell that new connections have to wait for a moment."""
    _log.error("no new connections for a moment", error=str(error))


class Accepting:
    """Has the event loop take in connections, which `make_front` gives protocols for; under TLS when it is given."""

    def __init__(self, make_front: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None) -> None:
        self._make_front = make_front
        self._tls = tls
        self._listening: Sequence[socket.socket] = ()
        self._pause: asyncio.TimerHandle | None = None
        self._coming: set[asyncio.Task[None]] = set()

    def start(self, sockets: Sequence[socket.socket]) -> None:
        """Take them in at these listening sockets."""
        for sock in sockets:
            sock.setblocking(False)
        self._listening = sockets
        self._listen()

    async def stop(self) -> None:
        """Take in what waits, and no more; the sockets are closed."""
        for sock in self._listening:
            self._accept(sock, BACKLOG)
        self._listen_no_more()
        if self._pause:
            self._pause.cancel()
        for sock in self._listening:
            sock.close()
        if self._coming:
            await asyncio.wait(self._coming, timeout=_GRACE)

    def _listen(self) -> None:
        self._pause = None
        for sock in self._listening:
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _listen_no_more(self) -> None:
        for sock in self._listening:
            asyncio.get_running_loop().remove_reader(sock)

    def _accept(self, listening: socket.socket, most: int = AT_ONCE) -> None:
        if self._pause:
            return
        loop = asyncio.get_running_loop()
        try:
            for sock in waiting(listening, most):
                task = loop.create_task(self._welcome(sock))
                self._coming.add(task)
                task.add_done_callback(self._coming.discard)
        except OSError as error:
            no_room(error)
            self._listen_no_more()
            self._pause = loop.call_later(PAUSE, self._listen)

    async def _welcome(self, sock: socket.socket) -> None:
        # The connection is closed by then; a client that has other ideas of TLS is no defect.
        with suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(self._make_front, sock, ssl=self._tls)
