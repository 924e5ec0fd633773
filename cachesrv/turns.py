"""How many requests a service bears at once: found out from how they end, and kept to.

Additive increase, multiplicative decrease: what was too much halves their number, each full round that goes well raises
it by one. So those who share a service share it fairly, without knowing of each other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Bearing:
    """What is known of the service: a state machine without I/O. At most `most` requests are let in at once.

    A request `streams` when its body is made while it is sent: others may have to end before it can. So that all of
    them come to an end, one that does not stream is let in besides those that do, however few are borne.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._lowered = 0
        self._rests_until = 0.0
        self._streaming = 0
        self._others = 0

    @property
    def limit(self) -> int:
        """How many requests may be under way at present."""
        return int(self._limit)

    def rest(self, now: float) -> float:
        """Seconds from `now` on for which nobody is let in."""
        return max(0.0, self._rests_until - now)

    def lets_in(self, *, streams: bool) -> bool:
        """Whether there is room for one more."""
        return self._streaming + self._others < self.limit or not (streams or self._others)

    def begin(self, *, streams: bool) -> int:
        """One more is under way; what `was_too_much` wants to know."""
        self._count(1, streams=streams)
        return self._lowered

    def end(self, *, streams: bool) -> None:
        """One less is under way."""
        self._count(-1, streams=streams)

    def went_well(self) -> None:
        """One was served."""
        self._limit = min(self._most, self._limit + 1 / self._limit)

    def was_too_much(self, begun: int) -> None:
        """One was turned away, or suffered. Those that were under way together complain together: they count once."""
        if begun == self._lowered:
            self._lowered += 1
            self._limit = max(1.0, self._limit / 2)

    def leave_alone(self, until: float) -> None:
        """Nobody is let in before."""
        self._rests_until = max(self._rests_until, until)

    def _count(self, more: int, *, streams: bool) -> None:
        if streams:
            self._streaming += more
        else:
            self._others += more


class Turn:
    """One request under way: say how it went. What is not said leaves everything as it is."""

    def __init__(self, bearing: Bearing, *, streams: bool) -> None:
        self._bearing = bearing
        self._begun = bearing.begin(streams=streams)

    def went_well(self) -> None:
        """It was served."""
        self._bearing.went_well()

    def was_too_much(self) -> None:
        """It was turned away because there are too many, or suffered from that."""
        self._bearing.was_too_much(self._begun)

    def leave_alone(self, seconds: float) -> None:
        """The service wants no requests for so long; those under way may end."""
        self._bearing.leave_alone(asyncio.get_running_loop().time() + seconds)


@dataclass(slots=True)
class _Waiting:
    streams: bool
    turn: asyncio.Future[Turn]


class Turns:
    """At most `most` requests at once, fewer when the service does not bear them. They are let in as they come."""

    def __init__(self, most: int) -> None:
        self._bearing = Bearing(most)
        self._waiting: deque[_Waiting] = deque()
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def limit(self) -> int:
        """How many requests may be under way at present."""
        return self._bearing.limit

    @asynccontextmanager
    async def turn(self, *, streams: bool = False) -> AsyncIterator[Turn]:
        """For one request, see Bearing. Waits until there is room."""
        waiting = _Waiting(streams, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._let_in()
        try:
            yield await waiting.turn
        finally:
            # Whoever is cancelled may have been let in just then.
            if waiting.turn.done() and not waiting.turn.cancelled():
                self._bearing.end(streams=streams)
            self._let_in()

    def _let_in(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        loop = asyncio.get_running_loop()
        rest = self._bearing.rest(loop.time())
        if rest:
            self._alarm = loop.call_later(rest, self._let_in) if self._waiting else None
            return
        passed: list[_Waiting] = []
        while self._waiting and self._bearing.lets_in(streams=False):
            one = self._waiting.popleft()
            if one.turn.done():
                continue
            if self._bearing.lets_in(streams=one.streams):
                one.turn.set_result(Turn(self._bearing, streams=one.streams))
            else:
                passed.append(one)
        self._waiting.extendleft(reversed(passed))
