"""Of several processes that would push what one queue holds, one does."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from cachesrv.push.queue.directory import INCOMING, give_to_owner, make_private

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_DIGITS = 20


class QueueLock:
    """A context that holds the lock; `flock` frees it when the process ends, however it does. Raises OSError."""

    def __init__(self, queue: str) -> None:
        make_private(queue)
        make_private(f"{queue}/{INCOMING}")
        self._file = os.open(f"{queue}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        directory = os.open(queue, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        give_to_owner(self._file, directory)
        os.close(directory)

    def take(self) -> bool:
        """Whether it is ours now."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, b"%d\n" % os.getpid(), 0)
        return True

    def close(self) -> None:
        """Let others have it."""
        with suppress(OSError):
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def holder(queue: str) -> int | None:
    """The process that has the lock of a queue, None if there is none. Raises OSError."""
    try:
        file = os.open(f"{queue}/lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(file, _DIGITS, 0).strip()
        return int(pid) if pid.isdigit() else 0
    finally:
        os.close(file)
    return None
