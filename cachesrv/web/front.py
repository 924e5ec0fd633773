"""The hot path: a protocol in front of aiohttp's, that answers plain requests by itself.

    client ── transport ── Front ──┬── what `cachesrv.web.fast` can answer: one write
                                   └── everything else: aiohttp's own protocol, untouched and in order

A request is answered here only when nothing of an earlier one is outstanding on the connection, and when it is all that
has arrived: complete, without a body, and plainly understood. Aiohttp's protocol is made on the first demand.
A middleware (`reporting`) tells when aiohttp begins to handle a request and when its answer is written out. If all that
was handed over since the connection was last idle is one plain request, the connection is then as good as new, and the
front answers again. After anything else, what follows on the connection stays with aiohttp: there is no telling here
where its requests end.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.typedefs import Handler

    from cachesrv.web.fast import FastAnswers

IDLE_SECONDS = 75
"""How long a connection is held on which no request is being handled: longer than proxies hold theirs, so that it is
they who close first. It is also the time that a client has to send the head of a request.
"""
_SWEEP_SECONDS = 15


class Front(asyncio.Protocol):
    """One connection."""

    def __init__(self, answers: FastAnswers, make_inner: Callable[[], asyncio.Protocol], fronts: Fronts) -> None:
        self._answers = answers
        self._make_inner = make_inner
        self._fronts = fronts
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # set before anything else is called
        self._inner: asyncio.Protocol | None = None
        self._busy = False
        self._single = False
        self._paused = False
        self._handling = 0
        self.quiet_sweeps = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._fronts.add(self)

    def data_received(self, data: bytes) -> None:
        self.quiet_sweeps = 0
        if not self._busy:
            answer = self._answers.answer(data)
            if answer is not None:
                self._transport.write(answer)
                return
            self._busy = True
            self._single = self._answers.block(data) is not None
        else:
            self._single = False
        if self._inner is None:
            self._inner = self._make_inner()
            self._inner.connection_made(self._transport)
            if self._paused:
                self._inner.pause_writing()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._inner else None

    def connection_lost(self, exc: Exception | None) -> None:
        self._fronts.discard(self)
        if self._inner:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not take what it asked for: it may not ask for more."""
        self._paused = True
        if self._inner:
            self._inner.pause_writing()
        if not self._busy:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        if self._inner:
            self._inner.resume_writing()
        if not self._busy:
            self._transport.resume_reading()

    def begun(self) -> None:
        """Aiohttp handles a request."""
        self._handling += 1

    def finished(self) -> None:
        """Its answer is written out."""
        self._handling -= 1
        self.quiet_sweeps = 0
        if self._single and self._busy:
            self._busy = False
            if self._paused:
                self._transport.pause_reading()

    @property
    def idle(self) -> bool:
        """No request is being handled."""
        return self._handling == 0

    def close(self) -> None:
        """Send what is written, then end the connection."""
        self._transport.close()


class Fronts:
    """All connections of this process."""

    def __init__(self, answers: FastAnswers, make_inner: Callable[[], asyncio.Protocol]) -> None:
        self._answers = answers
        self._make_inner = make_inner
        self._open: set[Front] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def __call__(self) -> Front:
        return Front(self._answers, self._make_inner, self)

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

    def stop(self) -> None:
        """Close the connections on which nothing is under way; aiohttp sees to the others."""
        for task in self._tasks:
            task.cancel()
        for front in [front for front in self._open if front.idle]:
            front.close()

    async def _tick(self) -> None:
        while True:
            self._answers.tick()
            await asyncio.sleep(1)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            for front in [front for front in self._open if front.idle]:
                front.quiet_sweeps += 1
                if front.quiet_sweeps * _SWEEP_SECONDS > IDLE_SECONDS:
                    front.close()


@web.middleware
async def reporting(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost middleware: writes the answer out by itself, to be able to say when that is done."""
    front = request.transport.get_protocol() if request.transport else None
    if not isinstance(front, Front):
        return await handler(request)
    front.begun()
    try:
        response = await handler(request)
        await response.prepare(request)
        await response.write_eof()
    finally:
        front.finished()
    return response
