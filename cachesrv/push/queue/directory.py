"""Where a queue lies, and what is in it.

    incoming/        what hooks have written and nobody has taken in yet (`spool`)
    queue.sqlite     what waits, is on its way or has failed (`entries`)
    lock             held by the process that pushes
    wake             if it is there, a FIFO, or a link to one, that hooks write a byte to

Only its owner can read it. What root makes in the directory of somebody else is theirs, so that the hook of a daemon
that runs as root serves the queue of any user.
"""

from __future__ import annotations

import os

from cachesrv.errors import ConfigError

TYPE_CHECKING = False  # importing typing would take a hook longer than all else
if TYPE_CHECKING:
    from collections.abc import Mapping

SYSTEM_QUEUE = "/var/lib/cachesrv-queue"
"""Of root, whatever its environment: the daemon has none, `sudo` that of somebody else."""

INCOMING = "incoming"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def queue_directory(given: str | None, environ: Mapping[str, str]) -> str:
    """The queue: given, `$CACHESRV_QUEUE_DIR`, root's, `$XDG_STATE_HOME/cachesrv/queue`, or
    `~/.local/state/cachesrv/queue`. Raises ConfigError where there is no home, or nothing to be relative to.
    """
    if chosen := given or environ.get("CACHESRV_QUEUE_DIR"):
        try:
            return os.path.abspath(chosen)  # noqa: PTH100  pathlib takes longer to import than a hook may run
        except FileNotFoundError:
            raise ConfigError(f"no queue: {chosen} is relative, and the working directory is gone") from None
    if os.geteuid() == 0:
        return SYSTEM_QUEUE
    if (state := environ.get("XDG_STATE_HOME", "")).startswith("/"):
        return f"{state}/cachesrv/queue"
    if (home := environ.get("HOME", "")).startswith("/"):
        return f"{home}/.local/state/cachesrv/queue"
    raise ConfigError("no queue: give --queue, or set $CACHESRV_QUEUE_DIR or $HOME")


def open_incoming(queue: str) -> int:
    """A descriptor of `incoming`, made if it was not there. Raises OSError."""
    try:
        return _open_incoming(queue)
    except FileNotFoundError:
        make_private(queue)
        make_private(f"{queue}/{INCOMING}")
        return _open_incoming(queue)


def make_private(path: str) -> None:
    """A directory that only its owner may enter, and those above it, on disk; one that is there stays as it is."""
    if os.path.isdir(path):  # noqa: PTH112  see above
        return
    above = os.path.dirname(path)  # noqa: PTH120  see above
    make_private(above)
    parent = os.open(above, _DIRECTORY)
    try:
        name = os.path.basename(path)  # noqa: PTH119  see above
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:  # another hook was first
            return
        made = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        give_to_owner(made, parent)
        os.close(made)
        os.fsync(parent)
    finally:
        os.close(parent)


def give_to_owner(file: int, directory: int) -> None:
    """Let the owner of the directory own what root has just made in it; both are descriptors."""
    if os.geteuid() == 0:
        owner = os.fstat(directory)
        if owner.st_uid:
            os.fchown(file, owner.st_uid, owner.st_gid)


def _open_incoming(queue: str) -> int:
    # Whoever owns the queue may not lead root elsewhere by a link.
    return os.open(f"{queue}/{INCOMING}", _DIRECTORY | os.O_NOFOLLOW)
