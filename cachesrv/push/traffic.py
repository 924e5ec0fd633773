"""Requests on their way to one server: no more at once than it bears, and none while it wants to be left alone."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from cachesrv.push.retry import Overloaded, TryAgain, Unreachable
from cachesrv.turns import Turns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager

    from cachesrv.turns import Turn


class Traffic:
    """At most `most` requests. A server that asks for more than `patience` seconds is not waited for."""

    def __init__(self, most: int, *, patience: float) -> None:
        self._turns = Turns(most)
        self._patience = patience

    @property
    def limit(self) -> int:
        """How many requests may be under way at present."""
        return self._turns.limit

    @asynccontextmanager
    async def request(self, *, streams: bool = False) -> AsyncIterator[None]:
        """One request: waits for its turn, and hears from its errors how it went; `streams` as `turns.Bearing` says."""
        async with self.turn(streams=streams) as turn:
            with self.heard(turn):
                yield

    def turn(self, *, streams: bool = False) -> AbstractAsyncContextManager[Turn]:
        """The turn of one request, for who has something to do before it leaves."""
        return self._turns.turn(streams=streams)

    @contextmanager
    def heard(self, turn: Turn) -> Iterator[None]:
        """That request: how it went is heard from its errors."""
        try:
            yield
        except TryAgain as error:
            if isinstance(error, Overloaded | Unreachable):
                turn.was_too_much()
            if error.retry_after <= self._patience:
                turn.leave_alone(error.retry_after)
            raise
        turn.went_well()
