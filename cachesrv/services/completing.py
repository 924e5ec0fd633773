"""Work that may take longer than a client waits for an answer: one for each key, which it can ask for again."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cachesrv.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable

_REMEMBERED = 60.0
"""Seconds for which it is remembered that a NAR could not be made of what was sent."""

Outcome = TypeVar("Outcome")


class Completing(Generic[Outcome]):
    """What has the same key has the same outcome. To be used from one event loop."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[Outcome]] = {}

    async def outcome(
        self, key: Hashable, work: Callable[[], Coroutine[Any, Any, Outcome]], *, patience: float
    ) -> Outcome | None:
        """What came of the work with this key, which is begun unless it is under way; None when that is not known after
        `patience` seconds. Raises what the work does; BadInput for a while, to whoever asks again.
        """
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(work())
            task.add_done_callback(partial(self._done, key))
        await asyncio.wait([task], timeout=patience)
        return task.result() if task.done() else None

    def has_failed(self, key: Hashable) -> bool:
        """Whether it is remembered that this was bad."""
        task = self._tasks.get(key)
        return task is not None and task.done()

    def forget_failure(self, key: Hashable) -> None:
        """What was sent before is not asked for any more."""
        if self.has_failed(key):
            del self._tasks[key]

    async def close(self) -> None:
        """Stop what is under way."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _done(self, key: Hashable, task: asyncio.Task[Outcome]) -> None:
        """Who asks again is to hear what was wrong, if anything was."""
        if not task.cancelled() and isinstance(task.exception(), BadInput):
            asyncio.get_running_loop().call_later(_REMEMBERED, self._forget, key, task)
        else:
            self._forget(key, task)

    def _forget(self, key: Hashable, task: asyncio.Task[Outcome]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
