"""The hot path: a protocol in front of aiohttp's, that answers plain requests by itself.

    client ── transport ── Front ──┬── what `cachesrv.web.fast` can answer: one write
                                   └── everything else: aiohttp's own protocol, untouched and in order

A request is answered here only when nothing of an earlier one is outstanding on the connection, and when it is all that
has arrived: complete, without a body, and plainly understood; one that ends its connection does so here as well.
Aiohttp's protocol is made on the first demand.
A middleware (`reporting`) tells when aiohttp begins to handle a request and when its answer is written out. If all that
was handed over since the connection was last idle is one plain request, the connection is then as good as new, and the
front answers again. After anything else, what follows on the connection stays with aiohttp: there is no telling here
where its requests end.

A client that sends no more after one whole request is answered, and let go. One that does not take its answers gets no
further ones made: no more is read from it until it has.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from aiohttp import web

from cachesrv.web.fast import MANY_SLOW
from cachesrv.web.objects import FRUGAL, UNSENT
from cachesrv.web.plain import is_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from aiohttp.typedefs import Handler

    from cachesrv.web.fast import FastAnswers

IDLE_SECONDS = 75
"""How long a connection is held on which no request is being handled: longer than proxies hold theirs, so that it is
they who close first. It is also the time that a client has to send the head of a request.
"""
_HEAD_GRACE = 1.0
"""Seconds that the server waits for the rest of a head when it stops."""
_STOP_INTERVAL = 0.02
_SWEEPS = 5
"""Looks at each connection in that time."""


class Front(asyncio.Protocol):
    """One connection."""

    __slots__ = (
        "_answers",
        "_busy",
        "_ended",
        "_fronts",
        "_handling",
        "_head_begun",
        "_inner",
        "_make_inner",
        "_paused",
        "_received",
        "_single",
        "_transport",
        "_whole",
        "quiet_sweeps",
    )

    def __init__(
        self, answers: FastAnswers, make_inner: Callable[[], asyncio.Protocol], fronts: Fronts, received: bytes = b""
    ) -> None:
        self._received = received
        self._answers = answers
        self._make_inner = make_inner
        self._fronts = fronts
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # set before anything else is called
        self._inner: asyncio.Protocol | None = None
        self._busy = False
        self._single = False
        self._whole = False
        self._ended = False
        self._paused = False
        self._handling = 0
        self._head_begun = False
        self.quiet_sweeps = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(UNSENT)
        self._fronts.add(self)
        if self._received:
            self.data_received(self._received)
            self._received = b""

    def data_received(self, data: bytes) -> None:
        if not self._busy:
            answer = None if self._fronts.stopping else self._answers.answer(data)
            if answer is not None:
                self.quiet_sweeps = 0
                self._transport.write(answer)
                return
            if not self._fronts.stopping and (answer := self._answers.last(data)) is not None:
                self._transport.write(answer)
                self._transport.close()
                return
            self._busy = True
            self._single = self._answers.block(data) is not None
            self._whole = self._single or is_whole(data)
        else:
            self._single = self._whole = False
        if not self._head_begun:
            self._head_begun = True
            self.quiet_sweeps = 0
        self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        if self._inner is None:
            self._inner = self._make_inner()
            self._inner.connection_made(self._transport)
            if self._paused:
                self._inner.pause_writing()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        # Under TLS there is no such thing as one half of a connection.
        if self._whole and self._transport.get_extra_info("sslcontext") is None:
            self._ended = True
            return True
        return self._inner.eof_received() if self._inner else None

    def connection_lost(self, exc: Exception | None) -> None:
        self._fronts.discard(self)
        if self._paused:
            self._answers.slow -= 1
        if self._inner:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not take what it asked for: it may not ask for more."""
        self._paused = True
        self._answers.slow += 1
        if self._inner:
            self._inner.pause_writing()
        if not self._busy:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        self._answers.slow -= 1
        if self._inner:
            self._inner.resume_writing()
        if not self._busy:
            self._transport.resume_reading()

    def begun(self) -> None:
        """Aiohttp handles a request."""
        self._handling += 1
        self._fronts.handling += 1
        self._head_begun = False

    def finished(self, *, answered: bool) -> None:
        """Its answer is written out, or will not be."""
        self._handling -= 1
        self._fronts.handling -= 1
        self._head_begun = False
        self._whole = False
        self.quiet_sweeps = 0
        if self._ended:
            self._transport.close()
        elif answered and self._single:
            self._busy = False
            if self._paused:
                self._transport.pause_reading()

    @property
    def idle(self) -> bool:
        """No request is being handled, and all answers are sent."""
        return self._handling == 0 and not self._transport.get_write_buffer_size()

    @property
    def stopping(self) -> bool:
        """The server will answer no more requests on this connection."""
        return self._fronts.stopping

    @property
    def memory_is_dear(self) -> bool:
        """Many clients do not take their answers, or may turn out not to."""
        return self._answers.slow + self._fronts.handling > MANY_SLOW

    @property
    def head_begun(self) -> bool:
        """Something was handed to aiohttp that is not being handled yet: most likely a part of a head."""
        return self._head_begun

    def close(self) -> None:
        """End the connection when all is sent."""
        self._transport.close()

    def abort(self) -> None:
        """End it now."""
        self._transport.abort()


class Fronts:
    """All connections of this process; one is closed when it was idle for `idle_timeout` seconds, or when the head of a
    request takes longer to come. `handling`: how many requests aiohttp handles at present.
    """

    def __init__(
        self, answers: FastAnswers, make_inner: Callable[[], asyncio.Protocol], *, idle_timeout: float = IDLE_SECONDS
    ) -> None:
        self._answers = answers
        self._make_inner = make_inner
        self._interval = idle_timeout / _SWEEPS
        self._open: set[Front] = set()
        self.stopping = False
        self.handling = 0
        self._tasks: list[asyncio.Task[None]] = []

    def __call__(self, received: bytes = b"") -> Front:
        """The protocol of a new connection, from which some bytes may have been read already."""
        return Front(self._answers, self._make_inner, self, received)

    def __len__(self) -> int:
        return len(self._open)

    def add(self, front: Front) -> None:
        """A connection was made."""
        self._open.add(front)

    def discard(self, front: Front) -> None:
        """A connection was lost."""
        self._open.discard(front)

    def start(self) -> None:
        """Begin to keep the time."""
        self._tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._sweep())]

    async def stop(self, timeout: float) -> None:
        """End each connection as soon as nothing is under way on it; return when all have ended, or after `timeout`
        seconds. (Aiohttp, told to stop, would take in no more of the bodies that are on their way.)
        """
        self.stopping = True
        for task in self._tasks:
            task.cancel()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        # What has come on connections that are idle is read first.
        await asyncio.sleep(_STOP_INTERVAL)
        while under_way := [front for front in self._open if not front.idle or front.head_begun]:
            waited = loop.time() - begun
            if waited > timeout or (waited > _HEAD_GRACE and all(front.idle for front in under_way)):
                return
            self._close(self._open.difference(under_way))
            await asyncio.sleep(_STOP_INTERVAL)
        self._close(self._open)

    def abort(self) -> None:
        """End the connections that are left."""
        for front in list(self._open):
            front.abort()

    def _close(self, fronts: Collection[Front]) -> None:
        for front in list(fronts):
            front.close()

    async def _tick(self) -> None:
        while True:
            self._answers.tick()
            await asyncio.sleep(1)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            quiet = [front for front in self._open if front.idle]
            for front in quiet:
                front.quiet_sweeps += 1
            self._close([front for front in quiet if front.quiet_sweeps > _SWEEPS])


@web.middleware
async def reporting(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost middleware: writes the answer out by itself, to be able to say when that is done."""
    front = request.transport.get_protocol() if request.transport else None
    if not isinstance(front, Front):
        # The client has gone already; what it sent may have an effect all the same.
        with suppress(ConnectionError):
            return await handler(request)
        return web.Response()
    front.begun()
    if front.memory_is_dear:
        request[FRUGAL] = True
    answered = False
    try:
        response = await handler(request)
        if front.stopping:
            response.force_close()
        await response.prepare(request)
        await response.write_eof()
        answered = True
    except ConnectionError:
        # The client has gone, or was cut off in the middle of its answer: no defect, as aiohttp would have it.
        if request.transport is not None:
            request.transport.abort()
        response = web.Response()
    finally:
        front.finished(answered=answered)
    return response
