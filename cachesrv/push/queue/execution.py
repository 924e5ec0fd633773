"""A command that runs while what it builds is pushed, by way of a queue of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from cachesrv.errors import CachesrvError, StoreError
from cachesrv.push.queue.entries import PATH, Entries
from cachesrv.push.queue.registered import GATHER
from cachesrv.push.queue.runner import Service, drain
from cachesrv.push.queue.work import Work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachesrv.push.queue.pusher import Way
    from cachesrv.push.queue.registered import Registered
    from cachesrv.push.queue.report import Report

CANNOT_RUN, NOT_FOUND = 126, 127
"""Exit statuses, as those of a shell. Source: POSIX, Shell Command Language, 2.8.2."""

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_OTHERS = (signal.SIGUSR1, signal.SIGUSR2)
_BY_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


@dataclass(slots=True)
class _State:
    """`asked` is how often we were told to end; `status` is that of the command, once it has ended."""

    process: subprocess.Popen[bytes] | None = None
    asked: int = 0
    status: int | None = None


class Execution:
    """To be run once; what is told to people goes to `err`."""

    def __init__(self, words: Sequence[str], source: Registered, way: Way, report: Report, err: TextIO) -> None:
        self._words = words
        self._source = source
        self._way = way
        self._report = report
        self._err = err
        self._state = _State()

    def run(self) -> int:
        """The exit status, that of the command if it was started. Raises, before that, ConfigError and StoreError."""
        self._way.check()
        with _temporary_directory() as queue, closing(Entries.open(queue)) as entries:
            work = Work(entries, [self._source], self._way, self._report)
            with suppress(asyncio.CancelledError):
                asyncio.run(self._run(work))
            self._tell_what_is_left(entries)
        status = self._state.status
        return 128 + signal.SIGINT if status is None else status

    async def _run(self, work: Work) -> None:
        await work.take_in()  # from here on
        main = asyncio.current_task()
        assert main is not None
        loop = asyncio.get_running_loop()
        for number in (*_ENDING, *_OTHERS):
            loop.add_signal_handler(number, self._hear, number, main)
        service = Service(work, gather=GATHER)
        pushing = asyncio.create_task(service.run())
        try:
            self._state.status = await self._execute()
            service.end()
            await asyncio.gather(pushing, return_exceptions=True)
            await drain(work)
        except CachesrvError as error:
            self._report.trouble(str(error), 0.0)
        finally:
            pushing.cancel()
            await asyncio.gather(pushing, return_exceptions=True)

    async def _execute(self) -> int:
        """The exit status of the command."""
        try:
            self._state.process = process = subprocess.Popen(self._words)  # noqa: ASYNC220  it does not block
        except OSError as error:
            self._print(f"{self._words[0]}: {error.strerror}")
            return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN
        ended = asyncio.Event()
        descriptor = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
        status = process.wait()
        return 128 - status if status < 0 else status

    def _hear(self, number: signal.Signals, main: asyncio.Task[None]) -> None:
        process = self._state.process
        runs = process is not None and self._state.status is None
        if process is not None and not (number in _BY_TERMINAL and _terminal_tells_all()):
            process.send_signal(number)  # to nobody if it has ended
        if number not in _ENDING:
            return
        self._state.asked += 1
        if self._state.asked > 1 or process is None:
            if process is not None:
                process.terminate()
            main.cancel()
        elif not runs:
            self._print("pushing what was built; once more to end at once")

    def _tell_what_is_left(self, entries: Entries) -> None:
        try:
            with suppress(StoreError):  # what is new may be unknown, what is queued is not
                asyncio.run(self._source.take_in(entries))
            left = [*entries.due(PATH, -1, again=False, now=0), *entries.those_failed()]
        except StoreError as error:
            self._print(f"it is not known what was not pushed: {error}")
            return
        for entry in left:
            self._print(f"not pushed: {entry.path}{f': {entry.reason}' if entry.reason else ''}")

    def _print(self, line: str) -> None:
        self._err.write(f"cachesrv: {line}\n")
        self._err.flush()


def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="cachesrv-")
    except OSError as error:
        raise StoreError(f"no directory can be made for the queue: {error.strerror}: set $TMPDIR") from error


def _terminal_tells_all() -> bool:
    """Whether a key on the terminal sends a signal to the command as well as to us: in the foreground it does."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
