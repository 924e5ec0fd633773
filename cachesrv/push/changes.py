"""Waiting for something to change in directories, by inotify. Source: inotify(7).

What changed is not told: who waits looks for itself. So nothing is lost when the kernel's queue runs over, and where
there is no inotify (all of a user's instances are taken) it is enough to look from time to time.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

MODIFIED = 0x002
WRITER_GONE = 0x008
MOVED_IN = 0x080
CREATED = 0x100
DELETED = 0x200

POLL = 5.0
"""Seconds between two looks where there is no inotify."""

_MOVED_AWAY = 0x800
_ONLY_DIRECTORIES = 0x01000000
_MANY_EVENTS = 65536


class Changes:
    """A context: from its start on, changes of the kinds given wake whoever waits. Both `add` and `wake` are for the
    thread of the event loop.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._descriptor = -1
        self._unwatched: set[str] = set()

    def __enter__(self) -> Self:
        self._descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor >= 0:
            asyncio.get_running_loop().add_reader(self._descriptor, self._read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)

    def add(self, directory: str, kinds: int) -> None:
        """Watch a directory for `kinds`, added up; one that cannot be watched is looked at every POLL seconds. To be
        called again for one that may have been moved away, which wakes, or deleted and made anew.
        """
        mask = kinds | _MOVED_AWAY | _ONLY_DIRECTORIES
        if _libc.inotify_add_watch(self._descriptor, os.fsencode(directory), mask) < 0:
            self._unwatched.add(directory)
        else:
            self._unwatched.discard(directory)

    def wake(self) -> None:
        """As if something had changed."""
        self._changed.set()

    @property
    def pending(self) -> bool:
        """Whether the next call of `wait` will return at once."""
        return self._changed.is_set()

    async def wait(self, timeout: float | None = None) -> None:
        """Until something has changed since the last call ended, at most `timeout` seconds."""
        if self._unwatched:
            timeout = POLL if timeout is None else min(timeout, POLL)
        with suppress(TimeoutError):  # wait_for would swallow a cancellation at the wrong moment
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        self._changed.clear()

    def _read(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._descriptor, _MANY_EVENTS)
        self._changed.set()


_libc = ctypes.CDLL(None, use_errno=True)
