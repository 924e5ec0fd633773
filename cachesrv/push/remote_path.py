"""A store path in a remote cache: what is in it, and its files.

A small NAR is read whole, so that its hash can be checked before anything is given away. Of a large one only as much
is read as is needed: from the middle, where the listing says where a file lies and the NAR is uncompressed or in the
zstd seekable format, else from the beginning up to the file. Then only the server vouches for what is read.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, NotFound
from cachesrv.nix.seekable import FrameIndex, Span, seek_table_size
from cachesrv.push import members, nar_member
from cachesrv.push.nar_member import HEAD_SIZE, Complete, DoesNotFit
from cachesrv.push.remote import NoRanges
from cachesrv.services.in_thread import consumed

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from cachesrv.nix.listing import ListingNode, Regular
    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.push.members import Names
    from cachesrv.push.nar_member import ReadNar, Write
    from cachesrv.push.remote import RemoteCache

SMALL = 1024 * 1024
"""Bytes of a compressed NAR that is read whole in any case."""

_HELD_IN_MEMORY = 8 * 1024 * 1024
_COPIED_AT_ONCE = 1024 * 1024
_TAIL = 64 * 1024


class RemotePath:
    """A `contents.Contents`. `check_all`: trust no listing, read NARs whole, and give nothing away unchecked."""

    def __init__(self, cache: RemoteCache, info: NarInfo, executor: Executor, *, check_all: bool) -> None:
        self._cache = cache
        self._info = info
        self._executor = executor
        self._use_listing = not check_all
        self._read_whole = check_all or (info.file_size is not None and info.file_size <= SMALL)

    async def find(self, names: Names, *, follow: bool = False, recursive: bool = True) -> tuple[Names, ListingNode]:  # noqa: ARG002  all is known at once
        root = await self._listing()
        if root is None:
            root = self._root(await self._read(None, _drop, to_end=True))
        return members.find(root, names, self._info.full_path, follow=follow)

    async def copy(self, names: Names, write: Write) -> None:
        root = await self._listing()
        for _ in range(2):  # again when the NAR turned out to have a link there, or its listing to be wrong
            if root is not None:
                names, node = members.find_file(root, names, self._info.full_path)
                if not self._read_whole and await self._copy_part(node, write):
                    return
            nar = await (self._copy_checked if self._read_whole else self._copy_streaming)(names, write)
            if nar is None:
                return
            root = self._root(nar)
        raise NotFound(f"there is no {'/'.join(names)} in {self._info.full_path}")

    async def _listing(self) -> ListingNode | None:
        return await self._cache.listing(self._info.store_path.hash_part) if self._use_listing else None

    def _root(self, nar: ReadNar) -> ListingNode:
        if nar.root is None:
            raise BadInput(f"{self._info.full_path} holds too many files to list them")
        return nar.root

    async def _copy_checked(self, names: Names, write: Write) -> ReadNar | None:
        """None when the file was there; else what is there."""
        with SpooledTemporaryFile(_HELD_IN_MEMORY) as file:
            nar = await self._read(names, file.write, to_end=True)
            if not nar.found:
                return nar
            file.seek(0)
            while data := file.read(_COPIED_AT_ONCE):
                await asyncio.get_running_loop().run_in_executor(self._executor, write, data)
        return None

    async def _copy_streaming(self, names: Names, write: Write) -> ReadNar | None:
        """None when the file was there; else what is there."""
        try:
            return await self._read(names, write, to_end=False)
        except Complete:
            return None

    async def _copy_part(self, node: Regular, write: Write) -> bool:
        """Whether the file could be had without what comes before it; otherwise nothing was written."""
        start, end = node.nar_offset - HEAD_SIZE, node.nar_offset + node.size
        if not 0 < start < end <= self._info.nar_size:
            return False
        try:
            span = await self._span(start, end)
            if span is None:
                return False
            consume = partial(nar_member.read_part, self._info.compression, span.skip, node.size, write)
            async with aclosing(self._cache.part(self._info, span.start, span.end)) as chunks:
                await consumed(self._executor, consume, chunks)
        except Complete:
            return True
        except (NoRanges, DoesNotFit):
            return False
        raise AssertionError("read_part always raises")

    async def _span(self, start: int, end: int) -> Span | None:
        """Where these bytes of the NAR lie in its file, if they can be had one by one."""
        if self._info.compression == "none":
            return Span(start, end, 0)
        if self._info.compression != "zstd" or self._info.file_size is None:
            return None
        try:
            return (await self._frames(self._info.file_size)).frames_for(start, end)
        except BadInput:
            return None

    async def _frames(self, file_size: int) -> FrameIndex:
        """Raises BadInput when the file has no seek table that fits it."""
        tail = await self._part(max(0, file_size - _TAIL), file_size)
        table_size = seek_table_size(tail)
        if table_size > file_size:
            raise BadInput("a seek table that is larger than its file")
        if table_size > len(tail):
            tail = await self._part(file_size - table_size, file_size)
        frames = FrameIndex.parse(tail)
        if (frames.frames_size + table_size, frames.content_size) != (file_size, self._info.nar_size):
            raise BadInput("a seek table of another file")
        return frames

    async def _part(self, start: int, end: int) -> bytes:
        return b"".join([chunk async for chunk in self._cache.part(self._info, start, end)])

    async def _read(self, names: Names | None, write: Write, *, to_end: bool) -> ReadNar:
        file = None if names is None else tuple(name.encode("utf-8", "surrogateescape") for name in names)
        consume = partial(nar_member.read, self._info, file, write, to_end=to_end)
        async with aclosing(self._cache.nar(self._info)) as chunks:
            return await consumed(self._executor, consume, chunks)


def _drop(_data: bytes | memoryview) -> None:
    """For who wants the listing only."""
