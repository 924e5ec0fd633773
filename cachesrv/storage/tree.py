"""A folder tree below which no symbolic link is followed.

Every path is walked from the root's descriptor, one component at a time: a link that somebody plants below the root is
refused with a StoreError, wherever it points to. (The path of the root itself may lead over links: that is the
administrator's choice.) All methods block; paths are validated keys, or empty for the root itself.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError
from cachesrv.storage.base import MAX_KEY_LENGTH, is_segment

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
# A pipe that somebody planted must not hold up the thread that opens it.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK

_FOLDER_MODE = 0o755
_MAX_REMEMBERED = 10_000


def split(key: str) -> tuple[str, str]:
    """The folder of a key ("" for the root) and its name there."""
    folder, _, name = key.rpartition("/")
    return folder, name


def _folder(key: str) -> str:
    return split(key)[0]


@dataclass(slots=True)
class Found:
    """A name met by `Tree.walk`: its folder's descriptor, open until the walk goes on; its key; its entry."""

    folder: int
    key: str
    entry: os.DirEntry[str]


class Tree:
    """The tree below `root`, which is made when it is missing; `descriptor` is the root's. Raises OSError."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        _make_durably(self.root)
        self.descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        # Folders whose entry in their parent is known to be on disk.
        self._durable: set[str] = set()

    @contextmanager
    def folder(self, path: str) -> Iterator[int]:
        """A descriptor of a folder. Raises FileNotFoundError, StoreError for a link on the way."""
        descriptor = self.open_folder(path)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def open_folder(self, path: str) -> int:
        """A descriptor of a folder, for the caller to close. Raises FileNotFoundError also when there is a file in the
        way, StoreError for a link.
        """
        return self._descend(path, _open_child)

    def make_folder(self, path: str) -> int:
        """As `open_folder`, but makes what is missing, and has all that leads there on disk before it returns."""
        walked: list[str] = []

        def open_or_make(parent: int, name: str) -> int:
            walked.append(name)
            return self._make_child(parent, name, "/".join(walked))

        return self._descend(path, open_or_make)

    def _descend(self, path: str, step: Callable[[int, str], int]) -> int:
        descriptor = os.dup(self.descriptor)
        try:
            for name in path.split("/") if path else ():
                child = step(descriptor, name)
                os.close(descriptor)
                descriptor = child
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _make_child(self, parent: int, name: str, path: str) -> int:
        if path in self._durable:
            with suppress(FileNotFoundError):
                return _open_child(parent, name)
        with suppress(FileExistsError):
            os.mkdir(name, _FOLDER_MODE, dir_fd=parent)
        # Also when it was there: another process may have made it just now, and be killed before it syncs it.
        os.fsync(parent)
        if len(self._durable) >= _MAX_REMEMBERED:
            self._durable.clear()
        self._durable.add(path)
        try:
            return _open_child(parent, name)
        except FileNotFoundError as error:
            raise StoreError(f"{path} is in the way: it is not a folder") from error

    def stat(self, key: str) -> os.stat_result | None:
        """What is known of a file; None when there is none of that name. Raises StoreError for a link."""
        folder, name = split(key)
        try:
            with self.folder(folder) as descriptor:
                found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return found if is_file(found, key) else None

    def existing(self, keys: Iterable[str]) -> set[str]:
        """Those of them that are files. Raises StoreError for a link."""
        found = set()
        for path, together in groupby(sorted(keys, key=split), key=_folder):
            with suppress(FileNotFoundError), self.folder(path) as folder:
                for key in together:
                    with suppress(FileNotFoundError):
                        if is_file(os.stat(split(key)[1], dir_fd=folder, follow_symlinks=False), key):
                            found.add(key)
        return found

    def open_file(self, key: str) -> tuple[int, int] | None:
        """A descriptor to read a file by, for the caller to close, and the file's size; None when there is none of that
        name. Raises StoreError for a link.
        """
        folder, name = split(key)
        try:
            with self.folder(folder) as parent:
                return open_in(parent, name, key)
        except FileNotFoundError:
            return None

    def open_many(self, keys: Iterable[str]) -> Generator[tuple[str, int, int], None, None]:
        """Those of them that are there, one after the other: key, descriptor and size as `open_file` gives them. Each
        descriptor is closed when the next one is asked for.
        """
        for path, together in groupby(sorted(keys, key=split), key=lambda key: split(key)[0]):
            with suppress(FileNotFoundError), self.folder(path) as folder:
                for key in together:
                    if opened := open_in(folder, split(key)[1], key):
                        try:
                            yield key, *opened
                        finally:
                            os.close(opened[0])

    def remove(self, keys: Sequence[str]) -> None:
        """Remove files, those of one folder in the given order, and have that on disk; those that are not there are
        passed over.
        """
        for folder, together in groupby(sorted(keys, key=_folder), key=_folder):
            with suppress(FileNotFoundError), self.folder(folder) as descriptor:
                for key in together:
                    with suppress(FileNotFoundError, IsADirectoryError):
                        os.unlink(split(key)[1], dir_fd=descriptor)
                os.fsync(descriptor)

    def walk(self, path: str) -> Iterator[Found]:
        """All that lies below a folder and is no folder itself (links too), in no order. One folder of each level is
        open at a time, and read bit by bit. Folders whose name cannot stand in a key are left out.
        """
        try:
            levels = [_Level.open(self.open_folder(path), path)]
        except FileNotFoundError:
            return
        try:
            while levels:
                level = levels[-1]
                entry = next(level.entries, None)
                if entry is None:
                    levels.pop().opened.close()
                    continue
                key = f"{level.path}/{entry.name}" if level.path else entry.name
                if not entry.is_dir(follow_symlinks=False):
                    yield Found(level.descriptor, key, entry)
                elif is_segment(entry.name) and len(key) < MAX_KEY_LENGTH:
                    with suppress(FileNotFoundError):
                        levels.append(_Level.open(_open_child(level.descriptor, entry.name), key))
        finally:
            for level in levels:
                level.opened.close()

    def free(self) -> int:
        """Bytes that can still be written."""
        room = os.fstatvfs(self.descriptor)
        return room.f_bavail * room.f_frsize

    def close(self) -> None:
        os.close(self.descriptor)


@dataclass(slots=True)
class _Level:
    path: str
    descriptor: int
    entries: Iterator[os.DirEntry[str]]
    opened: ExitStack

    @classmethod
    def open(cls, descriptor: int, path: str) -> _Level:
        with ExitStack() as opened:
            opened.callback(os.close, descriptor)
            entries = opened.enter_context(os.scandir(descriptor))
            return cls(path, descriptor, entries, opened.pop_all())


def open_in(folder: int, name: str, key: str) -> tuple[int, int] | None:
    """A file in a folder, given by its descriptor, as `Tree.open_file` gives it."""
    try:
        if not is_file(os.stat(name, dir_fd=folder, follow_symlinks=False), key):
            return None
        descriptor = os.open(name, _FILE, dir_fd=folder)
    except FileNotFoundError:
        return None
    return descriptor, os.fstat(descriptor).st_size


def _open_child(parent: int, name: str) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=parent)
    except NotADirectoryError:
        # A link counts as no folder here.
        is_file(os.stat(name, dir_fd=parent, follow_symlinks=False), name)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None


def is_file(found: os.stat_result, name: str) -> bool:
    """Whether that is a regular file. Raises StoreError for a link."""
    if stat.S_ISLNK(found.st_mode):
        raise StoreError(f"{name} is a symbolic link; none is followed inside the object store")
    return stat.S_ISREG(found.st_mode)


def _make_durably(path: Path) -> None:
    """Make a folder and what is missing above it, each with its entry on disk."""
    if path.is_dir():
        return
    _make_durably(path.parent)
    path.mkdir(_FOLDER_MODE, exist_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
