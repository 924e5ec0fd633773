"""A process that pushes a queue: alone, for as long as it is told to, or until the queue is empty."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from cachesrv import systemd
from cachesrv.errors import PeerError, StoreError
from cachesrv.push.changes import DELETED, MODIFIED, WRITER_GONE, Changes
from cachesrv.push.queue.directory import INCOMING
from cachesrv.push.queue.entries import TROUBLE, Entries
from cachesrv.push.queue.intake import Incoming, written
from cachesrv.push.queue.lock import QueueLock, holder
from cachesrv.push.queue.queue_file import FILE
from cachesrv.push.queue.runner import Service, Trouble, drain
from cachesrv.push.queue.spool import put
from cachesrv.push.queue.work import Work

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cachesrv.push.queue.entries import Counts, Entry
    from cachesrv.push.queue.pusher import Way
    from cachesrv.push.queue.report import Report
    from cachesrv.push.queue.work import Source

_log = structlog.get_logger()

_IDLE_WHEN_STARTED_BY_HOOKS = 60.0
_LOOK = 2.0
"""Seconds from one look at what another process does to the next, if there is no sign of it."""


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue and how it is pushed; `more` are sources beside the hooks. Methods block; they raise ConfigError,
    StoreError, and where they drain what concerns all paths.
    """

    directory: str
    way: Way
    report: Report
    figures: Path | None = None
    more: Sequence[Source] = ()

    def serve(self, *, idle: float | None = None, gather: float = 0.0) -> None:
        """Until SIGTERM; SIGINT raises KeyboardInterrupt. If another process serves it, wait for that to end. `idle`
        is for how many seconds there has to be nothing to do, to end by itself; started by systemd because of a hook,
        it has a default. What is new is looked at `gather` seconds after there was a sign of it.
        """
        self.way.check()
        fifos = systemd.inherited_descriptors(os.environ)
        if fifos and idle is None:
            idle = _IDLE_WHEN_STARTED_BY_HOOKS
        with self._locked() as lock:
            if not lock.take():
                _log.warning("another process pushes this queue: waiting for its end", process=holder(self.directory))
                asyncio.run(_stand_by(self.directory, lock))
            with self._work() as work, suppress(asyncio.CancelledError):
                asyncio.run(_serve(Service(work, idle=idle, gather=gather), fifos))

    def drain(self) -> list[Entry]:
        """Push all there is, or wait until another process has; what could not be pushed is returned, and stays."""
        self.way.check()
        with self._locked() as lock, self._work() as work:
            if lock.take():
                return asyncio.run(drain(work))
            return asyncio.run(_wait_for_other(self.directory, lock, work))

    @contextmanager
    def _locked(self) -> Iterator[QueueLock]:
        try:
            lock = QueueLock(self.directory)
        except OSError as error:
            raise StoreError(f"the queue {self.directory} cannot be used: {error.strerror}") from error
        with lock:
            yield lock

    @contextmanager
    def _work(self) -> Iterator[Work]:
        with closing(Entries.open(self.directory)) as entries:
            sources = (Incoming(self.directory), *self.more)
            yield Work(entries, sources, self.way, self.report, figures=self.figures)


def retry(queue: str, paths: Sequence[str]) -> int:
    """Let these paths, or all that have failed, be tried again at once. How many that are. Raises StoreError."""
    try:
        if not Path(queue, FILE).exists():
            return 0
    except OSError as error:
        raise StoreError(f"the queue {queue} cannot be used: {error.strerror}") from error
    with closing(Entries.open(queue)) as entries:
        number = entries.retry(paths or None)
    wake(queue)
    return number


def forget(queue: str, paths: Sequence[str]) -> int:
    """Give up these paths, of those that have failed. How many that are. Raises StoreError."""
    with closing(Entries.open(queue)) as entries:
        return entries.forget(paths)


def wake(queue: str) -> None:
    """Let the process that pushes it look at it. Raises StoreError."""
    try:
        put(queue, ())
    except OSError as error:
        raise StoreError(f"the queue {queue} cannot be written: {error.strerror}") from error


async def _stand_by(queue: str, lock: QueueLock) -> None:
    """Until the lock is ours. Hooks are served meanwhile, by another process: to systemd we are ready."""
    systemd.notify("READY=1\nSTATUS=Waiting for another process to end", os.environ)
    watchdog = asyncio.create_task(systemd.feed_watchdog(os.environ))
    try:
        with Changes() as changes:
            changes.add(queue, WRITER_GONE)
            while not lock.take():
                await changes.wait(_LOOK)
    finally:
        watchdog.cancel()


async def _serve(service: Service, fifos: Sequence[int]) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    watchdog = asyncio.create_task(systemd.feed_watchdog(os.environ))
    try:
        await service.run(fifos=fifos, ready=lambda: systemd.notify("READY=1", os.environ), show=_show)
    finally:
        systemd.notify("STOPPING=1", os.environ)
        watchdog.cancel()


def _show(counts: Counts) -> None:
    systemd.notify(f"STATUS={counts.waiting} paths waiting, {counts.failed} failed", os.environ)


async def _wait_for_other(queue: str, lock: QueueLock, work: Work) -> list[Entry]:
    begun = time.time()
    work.entries.retry()
    wake(queue)
    with Changes() as changes:
        changes.add(queue, MODIFIED)
        changes.add(f"{queue}/{INCOMING}", DELETED)
        while not _is_done(queue, work.entries, begun):
            if lock.take():  # it has ended
                return await drain(work)
            await changes.wait(_LOOK)
    return work.entries.those_failed()


def _is_done(queue: str, entries: Entries, begun: float) -> bool:
    """Whether all has been tried. Raises PeerError for what keeps the other process from it."""
    if trouble := entries.fact(TROUBLE):
        raise PeerError(f"nothing can be pushed: {msgspec.json.decode(trouble, type=Trouble).reason}")
    if written(queue):  # looked at before the database, into which it moves meanwhile
        return False
    counts = entries.counts()
    due = counts.next_try is not None and counts.next_try <= begun
    return not (counts.waiting or counts.pushing or due)
