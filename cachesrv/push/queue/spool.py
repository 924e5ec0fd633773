"""What hooks write: a file for each, whole and on disk before the hook returns, without a lock or a database.

    drv <store path>      what was built, if it is known
    out <store path>      for each path to push; with none of them it is what came out of `drv`

The name begins with the time in nanoseconds, so that names are in order of age; while a file is written, with a dot.
"""

from __future__ import annotations

import os
import stat
import time

from cachesrv.push.queue.directory import give_to_owner, open_incoming

TYPE_CHECKING = False  # see directory
if TYPE_CHECKING:
    from collections.abc import Sequence

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def put(queue: str, outputs: Sequence[bytes], deriver: bytes = b"") -> None:
    """Write paths down, safe from a power failure when this returns. Raises OSError, and then nothing is left."""
    lines = [b"drv %s\n" % deriver] if deriver else []
    lines += [b"out %s\n" % path for path in outputs]
    incoming = open_incoming(queue)
    try:
        _write(incoming, f"{time.time_ns():020}-{os.getpid()}-{os.urandom(4).hex()}", b"".join(lines))
    finally:
        os.close(incoming)


def wake(queue: str) -> None:
    """Let a queue that is started by hooks know of one. What cannot be woken finds out by itself."""
    try:
        # looked at before it is opened for writing: the queue may be of somebody whom root should not trust
        link = os.open(f"{queue}/wake", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if stat.S_ISFIFO(os.fstat(link).st_mode):
            fifo = os.open(f"/proc/self/fd/{link}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.write(fifo, b"\n")
            os.close(fifo)
    except OSError:  # nobody reads it, or it is full: there is nobody to wake, or no need
        return
    finally:
        os.close(link)


def _write(incoming: int, name: str, data: bytes) -> None:
    temporary = f".{name}"
    file = os.open(temporary, _NEW, 0o600, dir_fd=incoming)
    try:
        give_to_owner(file, incoming)
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
        os.rename(temporary, name, src_dir_fd=incoming, dst_dir_fd=incoming)
    except BaseException:
        os.unlink(temporary, dir_fd=incoming)
        raise
    finally:
        os.close(file)
    os.fsync(incoming)
