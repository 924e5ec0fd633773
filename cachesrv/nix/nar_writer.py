"""Writes the canonical NAR of what lies on disk, as `nix-store --dump` does.

The only module of the formats that touches files. Every entry is opened relative to the descriptor of the
directory that holds it and without following links, so that a tree that changes meanwhile can make the
dump fail but never lead it elsewhere.
"""

import errno
import os
import stat
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

from cachesrv.errors import BadInput, CachesrvError, NotFound, StoreError
from cachesrv.nix.listing import MAX_DEPTH
from cachesrv.nix.nar import CLOSE, CONTENTS, DIRECTORY, ENTRY, EXECUTABLE, MAGIC, NODE, REGULAR, SYMLINK, token

# O_NONBLOCK: a pipe that takes the place of a file must not make the dump wait for its writer.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_OPEN_DIRECTORY = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_DIRECTORY
_TOGETHER = 8 * 1024
"""Bytes of names and links that are gathered, about."""
_THE_TREE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO))


def dump(path: str | bytes | os.PathLike[str], *, chunk_size: int = 256 * 1024) -> Generator[bytes, None, None]:
    """The NAR of the file, directory or symbolic link at `path`.

    Every chunk but the last has `chunk_size` bytes; chunks are the caller's to keep. Memory is two chunks and what
    NarDump takes. A dump that is not read to its end is to be closed. Raises what NarDump does.
    """
    with closing(NarDump(path)) as nar:
        buffer = memoryview(bytearray(chunk_size))
        while size := nar.read_into(buffer):
            yield bytes(buffer[:size])


def nar_size(path: str | bytes | os.PathLike[str]) -> int:
    """The size in bytes of what `dump` would write, found without opening files; raises what `dump` does."""
    return sum(len(step.before) + (step.file.left if step.file else 0) for step in _tree(path, _looked_at))


class NarDump:
    """The NAR of the file, directory or symbolic link at `path`, read once, into buffers.

    Contents of files go there straight from the system; other memory is the names in the directories that are open. It
    is to be closed, which closes the files.

    Reading raises NotFound if nothing is at `path`; BadInput, naming the path, for what no NAR can hold (sockets,
    devices, pipes, more than MAX_DEPTH levels), for what may not be read and for what changes while it is read;
    StoreError where the disk fails.
    """

    def __init__(self, path: str | bytes | os.PathLike[str]) -> None:
        self._steps = _tree(path, _opened)
        self._before = memoryview(b"")
        self._file: _File | None = None

    def read_into(self, buffer: memoryview) -> int:
        """Fill the buffer with what comes next; how many bytes there were, which is less than it holds only at the
        end.
        """
        free = buffer
        while free:
            if self._before:
                size = min(len(self._before), len(free))
                free[:size] = self._before[:size]
                self._before, free = self._before[size:], free[size:]
            elif self._file is not None:
                free = self._contents(self._file, free)
            elif step := next(self._steps, None):
                self._before, self._file = memoryview(step.before), step.file
            else:
                break
        return len(buffer) - len(free)

    def close(self) -> None:
        """Nothing can be read any more."""
        self._before, self._file = memoryview(b""), None
        self._steps.close()

    def _contents(self, file: "_File", free: memoryview) -> memoryview:
        """What is free after some more of the contents."""
        wanted = min(file.left + 1, len(free))  # one byte more than there may be, to notice growth
        try:
            size = os.readv(file.descriptor, [free[:wanted]])
        except OSError as error:
            raise file.entry.failed(error) from error
        file.left -= size
        if file.left < 0 or (file.left and not size):
            raise file.entry.changed()
        if size < wanted and not file.left:
            self._file = None
        return free[size:]


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


@dataclass(slots=True)
class _File:
    """A regular file, of which `left` bytes are still to be read by `descriptor`."""

    entry: _Entry
    descriptor: int
    left: int


class _Step(NamedTuple):
    """Bytes of a NAR, and the file whose contents follow."""

    before: bytes
    file: _File | None


_Steps = Generator[_Step, None, bytes]
"""A part of a NAR; what it returns is still to be written after it."""

_OnFile = Callable[[_Entry, bytes], _Steps]
"""A regular file's node, after these bytes."""


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


def _tree(path: str | bytes | os.PathLike[str], on_file: _OnFile) -> Generator[_Step, None, None]:
    """All of a NAR."""
    yield _Step((yield from _node(_root(path), 0, MAGIC, on_file)), None)


def _node(entry: _Entry, depth: int, before: bytes, on_file: _OnFile) -> _Steps:
    if depth >= MAX_DEPTH:
        raise BadInput(f"{os.fsdecode(entry.path)!r} is deeper than {MAX_DEPTH} levels")
    if entry.kind == stat.S_IFREG:
        return (yield from on_file(entry, before))
    if entry.kind == stat.S_IFLNK:
        return before + SYMLINK + token(_target(entry)) + CLOSE
    if entry.kind == stat.S_IFDIR:
        return (yield from _directory(entry, depth, before, on_file))
    raise BadInput(f"{os.fsdecode(entry.path)!r} is neither file, directory nor symbolic link")


def _directory(entry: _Entry, depth: int, before: bytes, on_file: _OnFile) -> _Steps:
    try:
        descriptor = os.open(entry.name, _OPEN_DIRECTORY, dir_fd=entry.directory)
    except OSError as error:
        raise entry.failed(error) from error
    try:
        before += DIRECTORY
        for child in _children(entry, descriptor):
            before += ENTRY + token(child.name) + NODE
            before = (yield from _node(child, depth + 1, before, on_file)) + CLOSE
            if len(before) > _TOGETHER:
                yield _Step(before, None)
                before = b""
        return before + CLOSE
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


def _opened(entry: _Entry, before: bytes) -> _Steps:
    """With its contents, which are to be read before the next step."""
    try:
        descriptor = os.open(entry.name, _OPEN_FILE, dir_fd=entry.directory)
        try:
            status = os.fstat(descriptor)
            size = status.st_size
            yield _Step(before + _file_head(entry, status), _File(entry, descriptor, size))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise entry.failed(error) from error
    return bytes(-size % 8) + CLOSE


def _looked_at(entry: _Entry, before: bytes) -> _Steps:
    """With nothing but the size of its contents."""
    try:
        status = os.stat(entry.name, dir_fd=entry.directory, follow_symlinks=False)
    except OSError as error:
        raise entry.failed(error) from error
    size = status.st_size
    yield _Step(before + _file_head(entry, status), _File(entry, -1, size))
    return bytes(-size % 8) + CLOSE


def _file_head(entry: _Entry, status: os.stat_result) -> bytes:
    if not stat.S_ISREG(status.st_mode):
        raise entry.changed()
    executable = EXECUTABLE if status.st_mode & stat.S_IXUSR else b""
    return REGULAR + executable + CONTENTS + status.st_size.to_bytes(8, "little")
