"""A file of the user's replaced by a new version of it, whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from cachesrv.errors import StoreError

_OTHERS = 0o007


def replace_file(path: Path, data: bytes, *, mode: int, secret: bool = False) -> None:
    """Put `data` into the file at `path`, or at the end of the links that begin there.

    A file that is there keeps its mode and owner, but a `secret` one is closed to others; a new one gets `mode`,
    whatever the umask. Who reads it sees the old or the new contents, also after power loss. Raises StoreError.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{token_hex(8)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _fill(fd, data, target, mode, ~_OTHERS if secret else ~0)
            temporary.replace(target)
        except BaseException:
            temporary.unlink()
            raise
        sync_folder(target.parent)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error


def _fill(fd: int, data: bytes, target: Path, mode: int, allowed: int) -> None:
    with open(fd, "wb") as file:
        with suppress(FileNotFoundError):
            present = target.stat()
            mode = present.st_mode & 0o7777
            if (present.st_uid, present.st_gid) != (os.geteuid(), os.getegid()):
                with suppress(PermissionError):  # only root gives files away
                    os.fchown(fd, present.st_uid, present.st_gid)
        os.fchmod(fd, mode & allowed)
        file.write(data)
        file.flush()
        os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Have the names of what is in it on disk. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
