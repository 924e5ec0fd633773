"""A store path whose files are on this machine."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, NotFound, StoreError
from cachesrv.nix.listing import Directory, Regular, Symlink
from cachesrv.push.members import MAX_LINKS, split
from cachesrv.push.one_line import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cachesrv.nix.listing import ListingNode
    from cachesrv.push.members import Names
    from cachesrv.push.nar_member import Write

_COPIED_AT_ONCE = 1024 * 1024


class LocalPath:
    """A `contents.Contents`. `path`: the full store path; `real`: where its files are. Links are what the system says
    they are: they may lead to other store paths, and nowhere else. What was built has made them, and whoever reads may
    be somebody who may read more than who built it.
    """

    def __init__(self, path: str, real: str) -> None:
        self._path = path
        self._real = Path(real)
        self._store = os.path.realpath(self._real.parent)

    async def find(self, names: Names, *, follow: bool = False, recursive: bool = True) -> tuple[Names, ListingNode]:
        return await asyncio.to_thread(self._find, names, follow=follow, recursive=recursive)

    async def copy(self, names: Names, write: Write) -> None:
        await asyncio.to_thread(self._copy, names, write)

    def _find(self, names: Names, *, follow: bool, recursive: bool) -> tuple[Names, ListingNode]:
        try:
            return names, _node(self._reached(names, follow=follow), -1 if recursive else 1)
        except OSError as error:
            raise self._failed(names, error) from error

    def _copy(self, names: Names, write: Write) -> None:
        try:
            descriptor = os.open(self._reached(names, follow=True), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise self._failed(names, error) from error
        try:
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISDIR(mode):
                raise BadInput(f"{self._full(names)} is a directory: `cachesrv ls` shows what is in it")
            for data in self._pieces(descriptor, names):
                write(data)
        finally:
            os.close(descriptor)

    def _pieces(self, descriptor: int, names: Names) -> Iterator[bytes]:
        try:
            while data := os.read(descriptor, _COPIED_AT_ONCE):
                yield data
        except OSError as error:
            raise self._failed(names, error) from error

    def _reached(self, names: Names, *, follow: bool) -> Path:
        """Where that is, when links were followed: the last one only if `follow`. Raises NotFound, OSError."""
        here = self._store
        pending = deque([self._real.name, *names])
        links = 0
        while pending:
            step = pending.popleft()
            if step == "..":
                here = os.path.dirname(here)  # noqa: PTH120  text, of which the most is never a file
            elif not (pending or follow) or not os.path.islink(f"{here}/{step}"):  # noqa: PTH114  see above
                here = f"{here.rstrip('/')}/{step}"
            elif (links := links + 1) > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            else:
                target = os.readlink(f"{here}/{step}")  # noqa: PTH115  see above
                if target.startswith("/"):
                    here, target = self._root_of(target)
                pending.extendleft(reversed(split(target)))
        if not here.startswith(f"{self._store}/"):
            raise NotFound(f"{one_line(self._full(names))} leads out of the store, to {one_line(here)}")
        return Path(here)

    def _root_of(self, target: str) -> tuple[str, str]:
        """From where to follow an absolute target, and what of it: the store of a chroot is not where links say."""
        inside = target.removeprefix(f"{self._path.rpartition('/')[0]}/")
        return (self._store, inside) if inside != target else ("/", target)

    def _full(self, names: Names) -> str:
        return "/".join([self._path, *names])

    def _failed(self, names: Names, error: OSError) -> Exception:
        """Names the nearest parent that is there."""
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            return StoreError(f"{self._full(names)} cannot be read: {error.strerror}")
        for number, name in enumerate(names):
            parent = self._real.joinpath(*names[:number])
            if not parent.is_dir():
                return NotFound(f"{self._full(names[:number])} is a file, there is no {name} in it")
            if not os.path.lexists(parent / name):
                return NotFound(f"there is no {name} in {self._full(names[:number])}")
        return NotFound(f"{self._full(names)} is a link to what is not here")


def _node(file: Path, levels: int) -> ListingNode:
    """A listing of so many levels; of all for a negative number. Raises OSError."""
    status = file.lstat()
    if stat.S_ISLNK(status.st_mode):
        return Symlink(str(file.readlink()))
    if stat.S_ISDIR(status.st_mode):
        entries = sorted(file.iterdir()) if levels else ()
        return Directory({entry.name: _node(entry, levels - 1) for entry in entries})
    return Regular(status.st_size, executable=bool(status.st_mode & stat.S_IXUSR))
