"""Large NARs to the server in parts, several at once; an interrupted one goes on where it was.

A NAR is dumped and compressed again when it is taken up, which gives the same bytes; parts that the server has are
known by their sha256 and not sent. So nothing has to be kept here, and what is resumed is verified. Where the level of
compression is not the same for all NARs, the server is asked with which one a NAR was begun.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING

from cachesrv.errors import CachesrvError, Mismatch, TooLarge
from cachesrv.push.events import Resumed, Sent
from cachesrv.push.foremost import foremost
from cachesrv.push.nar_upload import NarUpload, begun_uploads, upload_name
from cachesrv.push.part_memory import PartMemory
from cachesrv.push.parts import cut
from cachesrv.push.pipeline import recipe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from collections.abc import Set as AbstractSet
    from concurrent.futures import Executor

    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.events import Emit
    from cachesrv.push.part_memory import Share
    from cachesrv.push.parts import Part
    from cachesrv.push.pipeline import CompressedNar, Pipeline
    from cachesrv.push.server import Server

_LARGEST = 8 * 2**20
_SMALLEST = 2**20
"""Bytes of a part. Larger ones would cost memory, and more when they are lost; smaller ones cost requests."""

_AT_ONCE = 3
"""Parts that should fit into memory together."""

_SENT_TOGETHER = 256 * 1024


def part_memory(total: int, part_size: int) -> PartMemory:
    """Of about `total` bytes, for a server that takes parts of at most `part_size`."""
    fitting = total // _AT_ONCE // _SMALLEST * _SMALLEST
    size = min(part_size, _LARGEST, max(_SMALLEST, fitting))
    return PartMemory(size, max(1, total // size))


class InParts:
    """Sends NARs in parts of at most `part_size` bytes."""

    def __init__(self, server: Server, pipeline: Pipeline, part_size: int, *, emit: Emit) -> None:
        self._server = server
        self._threads: Executor = pipeline.readers
        self._pipeline = pipeline
        self._emit = emit
        self.memory = part_memory(pipeline.shares.parts, part_size)

    def is_for(self, nar_size: int) -> bool:
        """Whether a NAR of so many bytes may become more than one part; 0 if its size is not known."""
        # Of what does not compress, zstd makes a little more.
        return not 0 < nar_size + nar_size // 64 + 1024 <= self.memory.size

    async def level(self, info: PathInfo) -> int:
        """That with which the NAR was begun, by whomever, else the one that is chosen for what begins now."""
        chosen, levels = self._pipeline.choose_level(), self._pipeline.levels
        if len(levels) == 1:
            return chosen
        names = {level: self._name(info.nar_hash, level) for level in levels}
        begun = await begun_uploads(self._server, list(names.values()))
        # the higher, the more work has gone into it
        return max((level for level, name in names.items() if name in begun), default=chosen)

    def _name(self, nar_hash: Hash, level: int) -> str:
        return upload_name(nar_hash, recipe(level), self.memory.size)

    async def send(self, nar: CompressedNar, share: Share) -> bool:
        """The NAR is at the server when this returns; False when it was there and not all of it was read here.

        Raises what the NAR does, what the server says, and TryAgain, with `tried` unset where it helps to begin anew.
        """
        async with aclosing(cut(nar, share, share.size)) as parts:
            first = await anext(parts)
            if not first.last:
                return await self._send_all(nar, share, first, parts)
            name = nar.info.store_path.base_name
            with self._pipeline.load.leaving():
                await self._server.put_nar(nar.info.nar_hash, self._leaving(name, first), first.size)
            self._emit(Sent(name, first.nar_bytes, 0))
            return True

    async def _send_all(self, nar: CompressedNar, share: Share, first: Part, parts: AsyncIterator[Part]) -> bool:
        name = self._name(nar.info.nar_hash, nar.level)
        upload = NarUpload(self._server, nar.info, name, emit=self._emit)
        answer = await upload.begin()
        if answer.stored:
            return False
        there = {(part.number, part.sha256) for part in answer.parts}
        transfer = _Transfer(nar.info.store_path.base_name, share, upload, there)
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
                    await upload.abort()
            raise error from None
        if transfer.resumed:
            self._emit(Resumed(transfer.name, transfer.resumed))
        await upload.complete([transfer.digests[number] for number in sorted(transfer.digests)])
        return True

    async def _send_part(self, transfer: _Transfer, part: Part) -> None:
        digest = await asyncio.get_running_loop().run_in_executor(self._threads, _sha256, part.data)
        transfer.digests[part.number] = digest
        if (part.number, digest.hex()) in transfer.there:
            transfer.resumed += part.size
        else:
            with self._pipeline.load.leaving():
                await transfer.upload.put(part.number, digest, part.size, lambda: self._leaving(transfer.name, part))
        transfer.share.give(part.buffer)
        self._emit(Sent(transfer.name, part.nar_bytes, 0))

    async def _leaving(self, name: str, part: Part) -> AsyncIterator[bytes | memoryview]:
        for start in range(0, part.size, _SENT_TOGETHER):
            piece = part.data[start : start + _SENT_TOGETHER]
            yield piece
            self._emit(Sent(name, 0, len(piece)))


@dataclass(slots=True)
class _Transfer:
    """One NAR on its way: `there` are the numbers and sha256 of parts that the server has, `digests` the sha256 of all
    parts so far, `resumed` the bytes of those that were not sent.
    """

    name: str
    share: Share
    upload: NarUpload
    there: AbstractSet[tuple[int, str]]
    digests: dict[int, bytes] = field(default_factory=dict)
    resumed: int = 0


def _sha256(data: memoryview) -> bytes:
    return sha256(data).digest()
