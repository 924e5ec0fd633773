"""Work that may take longer than a client waits for an answer: one for each upload, which it can ask for again."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cachesrv.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from cachesrv.services.part_store import Place

_REMEMBERED = 60.0
"""Seconds for which it is remembered that a NAR could not be made of what was sent."""

Outcome = TypeVar("Outcome")


class Completing(Generic[Outcome]):
    """To be used from one event loop."""

    def __init__(self) -> None:
        self._tasks: dict[Place, asyncio.Task[Outcome]] = {}

    async def outcome(
        self, place: Place, work: Callable[[], Coroutine[Any, Any, Outcome]], *, patience: float
    ) -> Outcome | None:
        """What came of the work for an upload, which is begun unless it is under way; None when that is not known after
        `patience` seconds. Raises what the work does; BadInput for a while, to whoever asks again.
        """
        task = self._tasks.get(place)
        if task is None:
            task = self._tasks[place] = asyncio.create_task(work())
            task.add_done_callback(partial(self._done, place))
        await asyncio.wait([task], timeout=patience)
        return task.result() if task.done() else None

    def forget_failure(self, place: Place) -> None:
        """What was sent before is not asked for any more."""
        task = self._tasks.get(place)
        if task and task.done():
            self._forget(place, task)

    async def close(self) -> None:
        """Stop what is under way."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _done(self, place: Place, task: asyncio.Task[Outcome]) -> None:
        """Who asks again is to hear what was wrong, if anything was."""
        if not task.cancelled() and isinstance(task.exception(), BadInput):
            asyncio.get_running_loop().call_later(_REMEMBERED, self._forget, place, task)
        else:
            self._forget(place, task)

    def _forget(self, place: Place, task: asyncio.Task[Outcome]) -> None:
        if self._tasks.get(place) is task:
            del self._tasks[place]
