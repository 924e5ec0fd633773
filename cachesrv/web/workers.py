"""Several processes on one port: the first one opens the sockets, starts the workers, and keeps them running.

Each worker has listening sockets of its own on the same addresses (SO_REUSEPORT), so that the kernel deals connections
out. They stay open in the first process: what waits in the queue of a worker that died is answered by the one that
takes its place.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from cachesrv import systemd
from cachesrv.limits import no_thread

if TYPE_CHECKING:
    from collections.abc import Callable

_log = structlog.get_logger()

_STOP = (signal.SIGTERM, signal.SIGINT)
_WAITED_FOR = {*_STOP, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM}
_SHORTEST = 0.001
"""Seconds; a timer of none would never go off."""
_SHORT_LIFE = 5.0
"""Seconds. A worker that dies sooner is not replaced at once: a new one will hardly do better."""
_PAUSE = 1.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class _Worker:
    number: int
    started: float


class Supervisor:
    """Runs `work(number)` in `count` processes until it is told to stop by SIGTERM or SIGINT. SIGHUP is passed on if
    `reload` says that there is something new.

    It forks: nothing that does not survive a fork (threads, an event loop, an open index) may exist in this process.
    """

    def __init__(self, count: int, work: Callable[[int], None], reload: Callable[[], bool]) -> None:
        self._count = count
        self._work = work
        self._reload = reload
        self._workers: dict[int, _Worker] = {}
        self._to_start: dict[int, float] = {}
        self._stopping = False

    def run(self) -> None:
        """Return when all workers have stopped."""
        # Signals are waited for instead of handled, so that none is lost between a look and a sleep.
        signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
        self._to_start = dict.fromkeys(range(self._count), 0.0)
        watchdog = systemd.watchdog_interval(os.environ)
        while self._workers or not self._stopping:
            self._start_due()
            systemd.notify("WATCHDOG=1", os.environ)
            # By a timer, and not by sigtimedwait: of a process that was stopped meanwhile, and went on when the time
            # was over, CPython makes a signal out of memory that nobody has written to.
            signal.setitimer(signal.ITIMER_REAL, max(_SHORTEST, self._patience(watchdog)))
            self._handle(signal.sigwaitinfo(_WAITED_FOR).si_signo)
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _patience(self, watchdog: float | None) -> float:
        """Seconds until there is something to do even without a signal."""
        due = min(self._to_start.values(), default=time.monotonic() + 3600)
        return min(max(0.0, due - time.monotonic()), watchdog or 3600)

    def _handle(self, number: int) -> None:
        if number == signal.SIGALRM:
            return
        if number == signal.SIGCHLD:
            self._reap()
            return
        if number == signal.SIGHUP and not self._reload():
            return
        if number in _STOP:
            self._stopping = True
            self._to_start = {}
            systemd.notify("STOPPING=1", os.environ)
        for pid in self._workers:
            os.kill(pid, number)

    def _reap(self) -> None:
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            worker = self._workers.pop(pid, None)
            if worker is None or self._stopping:
                continue
            lived = time.monotonic() - worker.started
            _log.error("a worker died and is replaced", worker=worker.number, status=os.waitstatus_to_exitcode(status))
            self._to_start[worker.number] = time.monotonic() + (_PAUSE if lived < _SHORT_LIFE else 0)

    def _start_due(self) -> None:
        now = time.monotonic()
        for number in [number for number, due in self._to_start.items() if due <= now]:
            del self._to_start[number]
            self._start(number)

    def _start(self, number: int) -> None:
        supervisor = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            # The others go on answering.
            _log.error("a worker cannot be started at present", worker=number, error=str(error))
            self._to_start[number] = time.monotonic() + _PAUSE
            return
        if pid:
            self._workers[pid] = _Worker(number, time.monotonic())
            return
        status = 1
        try:
            _die_with(supervisor)
            os.environ.pop("NOTIFY_SOCKET", None)
            # To be told to read the configuration again before it can be done is no reason to die: it is done then.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITED_FOR - {signal.SIGHUP})
            self._work(number)
            status = 0
        except BaseException as error:  # noqa: BLE001  whatever it was, it must not run on as a second supervisor
            if refused := no_thread(error):
                _log.error("a worker failed", worker=number, error=refused)
            else:
                _log.exception("a worker failed", worker=number)
        finally:
            os._exit(status)


def _die_with(supervisor: int) -> None:
    """A worker must not outlive the process that owns its sockets, however that ended. Source: prctl(2)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != supervisor:
        os._exit(1)
