"""Large NARs to the server in parts, several at once; an interrupted one goes on where it was.

A NAR is dumped and compressed again when it is taken up, which gives the same bytes; parts that the server has are
known by their sha256 and not sent. So nothing has to be kept here, and what is resumed is verified. Where the level of
compression is not the same for all NARs, the server is asked with which one a NAR was begun.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from cachesrv.errors import CachesrvError, Mismatch, TooLarge
from cachesrv.nix.seekable import largest_file
from cachesrv.push.events import Noted, Resumed, Sent
from cachesrv.push.foremost import foremost
from cachesrv.push.nar_upload import NarUpload, NoStorage, begun_uploads, upload_name
from cachesrv.push.part_memory import PartMemory
from cachesrv.push.parts import cut
from cachesrv.push.pipeline import recipe
from cachesrv.push.retry import TryAgain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from concurrent.futures import Executor

    from cachesrv.api import CacheAnswer, DirectAnswer
    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.connection import Chunk
    from cachesrv.push.events import Emit
    from cachesrv.push.nar_upload import Parts
    from cachesrv.push.part_memory import Share
    from cachesrv.push.parts import Part
    from cachesrv.push.pipeline import CompressedNar, Pipeline
    from cachesrv.push.server import Server

_LARGEST = 8 * 2**20
_SMALLEST = 2**20
"""Bytes of a part. Larger ones would cost memory, and more when they are lost; smaller ones cost requests."""

_SMALLEST_DIRECT = 5 * 2**20
_MOST_DIRECT = 10_000
"""What S3 takes: bytes of a part, and parts of an object."""

_AT_ONCE = 3
"""Parts that should fit into memory together."""

_SENT_TOGETHER = 256 * 1024


def part_memory(total: int) -> PartMemory:
    """Of about `total` bytes."""
    fitting = total // _AT_ONCE // _SMALLEST * _SMALLEST
    size = min(_LARGEST, max(_SMALLEST, fitting))
    return PartMemory(size, max(1, total // size))


class InParts:
    """Sends NARs in parts: of at most `part_size` bytes through the server, or to its storage where it offers that and
    we can reach it.
    """

    def __init__(self, server: Server, pipeline: Pipeline, cache: CacheAnswer, *, emit: Emit) -> None:
        self._server = server
        self._threads: Executor = pipeline.threads
        self._pipeline = pipeline
        self._emit = emit
        self.memory = part_memory(pipeline.shares.parts)
        self._largest = min(cache.part_size, self.memory.size)
        self._direct = cache.direct and self.memory.size >= _SMALLEST_DIRECT
        self._not_direct: set[Hash] = set()

    @property
    def _part_size(self) -> int:
        return self._server.bodies.within(self._largest)

    def is_for(self, nar_size: int) -> bool:
        """Whether a NAR of so many bytes may become more than one part; 0 if its size is not known."""
        return not nar_size or largest_file(nar_size) > self._part_size

    async def level(self, info: PathInfo) -> int:
        """That with which the NAR was begun, by whomever, else the one that is chosen for what begins now."""
        chosen, levels = self._pipeline.choose_level(), self._pipeline.levels
        if len(levels) == 1:
            return chosen
        names = {level: self._name(info, level) for level in levels}
        begun = await begun_uploads(self._server, list(names.values()))
        # the higher, the more work has gone into it
        return max((level for level, name in names.items() if name in begun), default=chosen)

    def _goes_direct(self, info: PathInfo) -> bool:
        """Not where its size is not known, or the server has not offered it."""
        fits = info.nar_size > 0 and largest_file(info.nar_size) <= self.memory.size * _MOST_DIRECT
        return self._direct and fits and info.nar_hash not in self._not_direct

    def _size(self, info: PathInfo) -> int:
        """Bytes of its parts."""
        return self.memory.size if self._goes_direct(info) else self._part_size

    def _name(self, info: PathInfo, level: int) -> str:
        return upload_name(info.nar_hash, recipe(level), self._size(info), direct=self._goes_direct(info))

    async def send(self, nar: CompressedNar, share: Share) -> bool:
        """The NAR is at the server when this returns; False when it was there and not all of it was read here.

        Raises what the NAR does, what the server says, and TryAgain, with `tried` unset where it helps to begin anew.
        """
        upload = NarUpload(self._server, nar.info, self._name(nar.info, nar.level), emit=self._emit)
        direct = self._goes_direct(nar.info)
        async with aclosing(cut(nar, share, self._size(nar.info))) as parts:
            first = await anext(parts)
            if first.last and first.size <= self._part_size:
                await self._send_whole(nar, first)
                return True
            way = await upload.begin(direct=direct)
            if way is None:
                return False
            if direct and not self._fits(nar.info, way.direct):
                await self._begin_otherwise(upload)
            transfer = _Transfer(nar.info.store_path.base_name, share, upload, way)
            await self._send_all(transfer, first, parts)
        if transfer.resumed:
            self._emit(Resumed(transfer.name, transfer.resumed))
        await upload.complete(way)
        return True

    def _fits(self, info: PathInfo, offered: DirectAnswer | None) -> bool:
        """Whether what was cut to go to the server's storage can go the way that the server says."""
        size = self.memory.size
        if offered is None:
            return size <= self._part_size
        return offered.least <= size and largest_file(info.nar_size) <= offered.most * size

    async def _begin_otherwise(self, upload: NarUpload) -> NoReturn:
        self._not_direct.add(upload.nar_hash)
        with suppress(CachesrvError):
            await upload.abort()
        raise TryAgain("the server does not take it in these parts in its storage: it goes through the server")

    async def _send_whole(self, nar: CompressedNar, part: Part) -> None:
        name = nar.info.store_path.base_name
        with self._pipeline.load.leaving():
            await self._server.put_nar(nar.info.nar_hash, self._leaving(name, part), part.size)
        self._emit(Sent(name, part.nar_bytes, 0))

    async def _send_all(self, transfer: _Transfer, first: Part, parts: AsyncIterator[Part]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._send_part(transfer, first))
                async for part in parts:
                    tasks.create_task(self._send_part(transfer, part))
        except BaseExceptionGroup as group:
            error = foremost(group)
            if isinstance(error, Mismatch | TooLarge):
                # Nobody can go on with these parts.
                with suppress(CachesrvError):
                    await transfer.upload.abort()
            raise error from None

    async def _send_part(self, transfer: _Transfer, part: Part) -> None:
        way = transfer.way
        digest = await asyncio.get_running_loop().run_in_executor(self._threads, way.digest, part.data)
        if way.has(part.number, digest):
            transfer.resumed += part.size
        else:
            try:
                with self._pipeline.load.leaving():
                    await transfer.upload.put(
                        way, part.number, digest, part.size, lambda: self._leaving(transfer.name, part)
                    )
            except NoStorage as error:
                await self._leave_storage(transfer, error)
        transfer.share.give(part.buffer)
        self._emit(Sent(transfer.name, part.nar_bytes, 0))

    async def _leave_storage(self, transfer: _Transfer, error: NoStorage) -> NoReturn:
        """From now on all go through the server."""
        if self._direct:
            self._direct = False
            self._emit(Noted(f"{error}: NARs go through the server instead"))
        with suppress(CachesrvError):
            await transfer.upload.abort()
        raise TryAgain(str(error)) from error

    async def _leaving(self, name: str, part: Part) -> AsyncIterator[Chunk]:
        for start in range(0, part.size, _SENT_TOGETHER):
            piece = part.data[start : start + _SENT_TOGETHER]
            yield piece
            self._emit(Sent(name, 0, len(piece)))


@dataclass(slots=True)
class _Transfer:
    """One NAR on its way; `resumed`: bytes of parts that were there and were not sent."""

    name: str
    share: Share
    upload: NarUpload
    way: Parts
    resumed: int = 0
