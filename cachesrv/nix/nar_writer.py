"""Writes the canonical NAR of what lies on disk, as `nix-store --dump` does.

The only module of the formats that touches files. Every entry is opened relative to the descriptor of the
directory that holds it and without following links, so that a tree that changes meanwhile can make the
dump fail but never lead it elsewhere.
"""

import errno
import os
import stat
from collections.abc import Generator, Iterator
from typing import NamedTuple

from cachesrv.errors import BadInput, CachesrvError, NotFound, StoreError
from cachesrv.nix.listing import MAX_DEPTH
from cachesrv.nix.nar import CLOSE, CONTENTS, DIRECTORY, ENTRY, EXECUTABLE, MAGIC, NODE, REGULAR, SYMLINK, token

# O_NONBLOCK: a pipe that takes the place of a file must not make the dump wait for its writer.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_OPEN_DIRECTORY = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECTORY
_THE_TREE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO))


def dump(path: str | bytes | os.PathLike[str], *, chunk_size: int = 256 * 1024) -> Generator[bytes, None, None]:
    """The NAR of the file, directory or symbolic link at `path`.

    Every chunk but the last has `chunk_size` bytes or a name or link more; chunks are the caller's to keep.
    Memory is two chunks and the names in the directories that are open. A dump that is not read to its end
    is to be closed, which closes the files.
    Raises NotFound if nothing is at `path`; BadInput, naming the path, for what no NAR can hold (sockets,
    devices, pipes, more than MAX_DEPTH levels), for what may not be read and for what changes while it is
    read; StoreError where the disk fails.
    """
    chunk = _Chunk(chunk_size)
    for item in _walk(_root(path), 0):
        for piece in _file(item, chunk) if isinstance(item, _Entry) else (item,):
            if chunk.add(piece):
                yield chunk.take()
    if chunk.parts:
        yield chunk.take()


def nar_size(path: str | bytes | os.PathLike[str]) -> int:
    """The size in bytes of what `dump` would write, found without opening files; raises what `dump` does."""
    return sum(_file_size(item) if isinstance(item, _Entry) else len(item) for item in _walk(_root(path), 0))


class _Entry(NamedTuple):
    """Something on disk: how to reach it, what it is (an `S_IF…` value) and how messages call it."""

    directory: int | None
    name: bytes
    kind: int
    path: bytes

    def failed(self, error: OSError) -> CachesrvError:
        reason = f"cannot read {os.fsdecode(self.path)!r}: {error.strerror}"
        return BadInput(reason) if error.errno in _THE_TREE else StoreError(reason)

    def changed(self) -> BadInput:
        return BadInput(f"{os.fsdecode(self.path)!r} changed while it was read")


class _Chunk:
    """Gathers pieces until there are `size` bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.room = size
        self.parts: list[bytes] = []

    def add(self, piece: bytes) -> bool:
        """Whether there is no room left."""
        self.parts.append(piece)
        self.room -= len(piece)
        return self.room <= 0

    def take(self) -> bytes:
        whole = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        self.parts = []
        self.room = self._size
        return whole


def _root(path: str | bytes | os.PathLike[str]) -> _Entry:
    name = os.fsencode(path)
    name = name.rstrip(b"/") or name[:1]  # with a slash behind it a link would be followed
    if b"\0" in name:
        raise BadInput(f"no path: {name!r}")
    try:
        mode = os.lstat(name).st_mode
    except FileNotFoundError as error:
        raise NotFound(f"nothing is at {os.fsdecode(name)!r}") from error
    except OSError as error:
        raise _Entry(None, name, 0, name).failed(error) from error
    return _Entry(None, name, stat.S_IFMT(mode), name)


def _walk(entry: _Entry, depth: int) -> Iterator[bytes | _Entry]:
    """The NAR of `entry` in pieces, a regular file's node being left to the caller to write."""
    if depth == 0:
        yield MAGIC
    if depth >= MAX_DEPTH:
        raise BadInput(f"{os.fsdecode(entry.path)!r} is deeper than {MAX_DEPTH} levels")
    if entry.kind == stat.S_IFREG:
        yield entry
    elif entry.kind == stat.S_IFLNK:
        yield SYMLINK + token(_target(entry)) + CLOSE
    elif entry.kind == stat.S_IFDIR:
        yield from _directory(entry, depth)
    else:
        raise BadInput(f"{os.fsdecode(entry.path)!r} is neither file, directory nor symbolic link")


def _directory(entry: _Entry, depth: int) -> Iterator[bytes | _Entry]:
    try:
        descriptor = os.open(entry.name, _OPEN_DIRECTORY, dir_fd=entry.directory)
    except OSError as error:
        raise entry.failed(error) from error
    try:
        yield DIRECTORY
        for child in _children(entry, descriptor):
            yield ENTRY + token(child.name) + NODE
            yield from _walk(child, depth + 1)
            yield CLOSE
        yield CLOSE
    finally:
        os.close(descriptor)


def _children(entry: _Entry, descriptor: int) -> list[_Entry]:
    try:
        with os.scandir(descriptor) as found:
            return sorted(
                _Entry(descriptor, name, _kind(child), entry.path + b"/" + name)
                for child in found
                for name in (os.fsencode(child.name),)
            )
    except OSError as error:
        raise entry.failed(error) from error


def _kind(entry: "os.DirEntry[str]") -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return stat.S_IFREG if entry.is_file(follow_symlinks=False) else 0


def _target(entry: _Entry) -> bytes:
    try:
        return os.readlink(entry.name, dir_fd=entry.directory)
    except OSError as error:
        raise entry.failed(error) from error


def _file(entry: _Entry, chunk: _Chunk) -> Iterator[bytes]:
    """The node of a regular file, read in pieces that fill `chunk`."""
    try:
        descriptor = os.open(entry.name, _OPEN_FILE, dir_fd=entry.directory)
        try:
            status = os.fstat(descriptor)
            yield _file_head(entry, status)
            yield from _contents(entry, descriptor, status.st_size, chunk)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise entry.failed(error) from error
    yield bytes(-status.st_size % 8) + CLOSE


def _contents(entry: _Entry, descriptor: int, size: int, chunk: _Chunk) -> Iterator[bytes]:
    left = size
    while True:
        wanted = min(left + 1, max(chunk.room, 1))  # one byte more than there may be, to notice growth
        data = os.read(descriptor, wanted)
        left -= len(data)
        if left < 0 or (left and not data):
            raise entry.changed()
        if data:
            yield data
        if len(data) < wanted and not left:
            return


def _file_size(entry: _Entry) -> int:
    try:
        status = os.stat(entry.name, dir_fd=entry.directory, follow_symlinks=False)
    except OSError as error:
        raise entry.failed(error) from error
    size = status.st_size
    return len(_file_head(entry, status)) + size + -size % 8 + len(CLOSE)


def _file_head(entry: _Entry, status: os.stat_result) -> bytes:
    if not stat.S_ISREG(status.st_mode):
        raise entry.changed()
    executable = EXECUTABLE if status.st_mode & stat.S_IXUSR else b""
    return REGULAR + executable + CONTENTS + status.st_size.to_bytes(8, "little")
