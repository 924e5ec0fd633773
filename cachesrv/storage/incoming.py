"""Files on their way to their names.

A file is written under a temporary name in the folder where it is to appear, `.incoming-` and random digits, which is
no key. While it is open it is locked (flock), so that a sweep by any process tells a slow writer from a dead one. Once
it is on disk it gets its name by `link`, which is atomic and refuses to replace, or by `rename`, which replaces.

All of this blocks and raises OSError, StoreFull and StoreError.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError, StoreFull
from cachesrv.storage import syncing
from cachesrv.storage.base import ObjectInfo
from cachesrv.storage.tree import is_file, split

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping
    from typing import BinaryIO

    from cachesrv.storage.tree import Found, Tree

_PREFIX = ".incoming-"
_MODE = 0o644
MOST_WAITING = 8 * 2**20
"""Bytes of a file that are only in memory, about, before the disk is told to begin with them."""
_NO_RESERVATIONS = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class IncomingFile:
    """One file, to be used by one thread at a time: `create`, `write`…, `finish`, and in any case `discard`."""

    def __init__(self, tree: Tree, key: str) -> None:
        self.key = key
        self.folder_path, self._name = split(key)
        self._tree = tree
        self._temporary = _PREFIX + secrets.token_hex(12)
        self._folder = -1
        self._file = -1
        self._end = 0
        self._begun = 0

    @property
    def descriptor(self) -> int:
        """Of the file, once it was created."""
        return self._file

    def create(self, size: int | None, folder: int | None = None) -> None:
        """Make the file, and reserve `size` bytes for it if that is known; `folder` is a descriptor of the one that it
        is in, where there is one already. Raises StoreFull.
        """
        self._folder = self._tree.make_folder(self.folder_path) if folder is None else os.dup(folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self._file = os.open(self._temporary, flags, _MODE, dir_fd=self._folder)
        _lock(self._file)
        if size:
            self.reserve(size)

    def reserve(self, size: int) -> None:
        """Take room for `size` bytes in all; the file has that size from now on. Raises StoreFull."""
        # First a look: a reservation that fails half-way takes the room from all other writers for a moment.
        free, more = self._tree.free(), size - os.fstat(self._file).st_size
        if more > free:
            message = f"no room for {self.key}: {more} bytes are needed, {free} are free"
            raise StoreFull(message, missing=more - free)
        try:
            os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            if error.errno not in _NO_RESERVATIONS:
                raise
            os.ftruncate(self._file, size)

    def write(self, *buffers: bytes | bytearray | memoryview) -> None:
        for buffer in buffers:
            rest = memoryview(buffer).cast("B")
            while rest:
                # Readers share the description, and with it the position.
                written = os.pwrite(self._file, rest, self._end)
                self._end += written
                rest = rest[written:]
        waiting = self._end - self._begun
        if waiting >= MOST_WAITING:
            syncing.begin_writing(self._file, self._begun, waiting)
            self._begun = self._end

    def truncate(self, size: int) -> None:
        """Give back the room that was reserved beyond `size` bytes."""
        os.ftruncate(self._file, size)

    def read(self, position: int, length: int) -> bytes:
        """What was written there, which may be less than `length` bytes."""
        return os.pread(self._file, length, position)

    def reopened(self) -> BinaryIO:
        """A descriptor for somebody else, who may close it later than this one; to be read by position only."""
        return os.fdopen(os.dup(self._file), "rb", buffering=0)

    def finish(self, last: bytes | bytearray, *, replace: bool) -> bool:
        """Write the last bytes, have all on disk and give the file its name; False when there is a file of that name
        and `replace` is not set: then that one's name is on disk.
        """
        self.write(last)
        self.sync()
        revealed = self.reveal(replace=replace)
        self.sync_folder()
        return revealed

    def sync(self) -> None:
        """Have the contents on disk."""
        os.fsync(self._file)

    def reveal(self, *, replace: bool) -> bool:
        """Give it its name; False as for `finish`. Either is on disk only after `sync_folder`."""
        folder = self._folder
        if replace:
            os.rename(self._temporary, self._name, src_dir_fd=folder, dst_dir_fd=folder)
        elif self._link():
            os.unlink(self._temporary, dir_fd=folder)
        else:
            return False
        self._temporary = ""
        return True

    def _link(self) -> bool:
        """Give it its name besides the temporary one; False when an object has it."""
        folder = self._folder
        while True:
            try:
                os.link(self._temporary, self._name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                with suppress(FileNotFoundError):  # it was deleted just now: the name is to be had after all
                    if is_file(os.stat(self._name, dir_fd=folder, follow_symlinks=False), self.key):
                        return False
                    message = f"cannot write {self.key}: something that is no object is in the way"
                    raise StoreError(message) from None
            else:
                return True

    def sync_folder(self) -> None:
        """Have the names in its folder on disk; once for all files of the folder is enough."""
        os.fsync(self._folder)

    def discard(self) -> None:
        """Remove the temporary name and close all; what cannot be removed is left to the next sweep."""
        if self._file >= 0:
            if self._temporary:
                with suppress(OSError):
                    os.unlink(self._temporary, dir_fd=self._folder)
            os.close(self._file)
        if self._folder >= 0:
            os.close(self._folder)
        self._folder = self._file = -1


def put(file: IncomingFile, data: bytes, *, replace: bool) -> bool:
    """A file in one go; answers as `finish` does."""
    try:
        file.create(len(data))
        return file.finish(data, replace=replace)
    finally:
        file.discard()


class Together:
    """Files that are put in one go, made durable together; for one thread at a time. `discard` it in any case."""

    def __init__(self, tree: Tree, objects: Mapping[str, bytes]) -> None:
        self._tree = tree
        self._objects = objects
        self.files = [IncomingFile(tree, key) for key in objects]

    def fill(self) -> None:
        """Write the contents, still under their temporary names. Raises StoreFull."""
        size, free = sum(map(len, self._objects.values())), self._tree.free()
        if size > free:
            raise StoreFull(f"no room for {len(self.files)} objects: {size} bytes are needed, {free} are free")
        with ExitStack() as stack:
            folders: dict[str, int] = {}
            for file in self.files:
                if file.folder_path not in folders:
                    folders[file.folder_path] = self._tree.make_folder(file.folder_path)
                    stack.callback(os.close, folders[file.folder_path])
                file.create(None, folders[file.folder_path])
                file.write(self._objects[file.key])

    def reveal(self, *, replace: bool) -> set[str]:
        """Give them their names, in their order; the keys of those that got them. Each folder is synced once."""
        revealed = {file.key for file in self.files if file.reveal(replace=replace)}
        for file in {file.folder_path: file for file in self.files}.values():
            file.sync_folder()
        return revealed

    def discard(self) -> None:
        """Let go of all of them."""
        for file in self.files:
            file.discard()


def sync(files: Iterable[IncomingFile]) -> None:
    """Have the contents of each on disk."""
    for file in files:
        file.sync()


def abandoned(tree: Tree, *, older_than: float, remove: bool) -> Generator[ObjectInfo | None, None, None]:
    """For each file met, what is known of it if it was abandoned `older_than` seconds ago or earlier; such a one may be
    removed on the way.
    """
    for found in tree.walk(""):
        ours = found.entry.name.startswith(_PREFIX) and found.entry.is_file(follow_symlinks=False)
        yield _if_abandoned(found, older_than, remove=remove) if ours else None


def _if_abandoned(found: Found, older_than: float, *, remove: bool) -> ObjectInfo | None:
    name = found.entry.name
    descriptor = _opened(found)
    if descriptor is None:
        return None
    try:
        about = os.fstat(descriptor)
        if time.time() - about.st_mtime < older_than or not _lock(descriptor):
            return None
        if remove:
            os.unlink(name, dir_fd=found.folder)
    except (FileNotFoundError, PermissionError):
        return None
    finally:
        os.close(descriptor)
    return ObjectInfo(found.key, about.st_size, about.st_mtime)


def _opened(found: Found) -> int | None:
    """A descriptor to lock it by; None where it has gone, or is somebody else's: it must not keep all others from being
    swept.
    """
    for way in (os.O_RDWR, os.O_RDONLY):  # locks that a network keeps are for who may write
        with suppress(PermissionError):
            try:
                return os.open(found.entry.name, way | os.O_NOFOLLOW, dir_fd=found.folder)
            except FileNotFoundError:
                return None
    return None


def _lock(descriptor: int) -> bool:
    """False when somebody else holds it. Where there are no locks, age alone tells the living from the dead."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
