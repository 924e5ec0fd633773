"""Small NARs on their way, many in one request: read, checked and compressed in one turn of a thread, sent together."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cachesrv import pack
from cachesrv.api import PackedNar, PackHead
from cachesrv.errors import CachesrvError
from cachesrv.nix.seekable import Frames
from cachesrv.push.compressed_nar import check
from cachesrv.push.events import Sending, Sent, Stored
from cachesrv.push.failure import Failure
from cachesrv.push.nar_source import LocalNar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from cachesrv.api import PackAnswer, PackLimits, PathToPublish
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.nix.store_path import StorePath
    from cachesrv.push.delivery import OpenNar
    from cachesrv.push.events import Emit
    from cachesrv.push.nar_source import NarSource
    from cachesrv.push.pipeline import Pipeline
    from cachesrv.push.plan import Nar
    from cachesrv.push.server import Server

PACK_NARS = 500
"""NARs in one pack, at most: a second of the server's work, and not much to send again."""

PACKS_AT_ONCE = 2
"""While one is on its way, the next one is made."""

STREAMS_AT_ONCE = 8
"""NARs that are asked for before the first one has come: a few more than a daemon is asked for at once."""

PACK_SIZE = 4 * 1024 * 1024
"""Bytes of the NARs in one pack, at most, before compression."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A NAR that can be sent: the path that it was read from, and the compressed file."""

    nar: Nar
    info: PathInfo
    file: bytes


@dataclass(frozen=True, slots=True)
class Pack:
    """`level`: of the compression; `failed`: paths whose NARs cannot be had, and why; `others`: NARs that have to be
    read by somebody else.
    """

    level: int
    ready: list[Ready] = field(default_factory=list)
    failed: dict[StorePath, Failure] = field(default_factory=dict)
    others: list[Nar] = field(default_factory=list)

    @property
    def paths(self) -> Iterator[StorePath]:
        """Those whose NARs are in it."""
        return (info.store_path for ready in self.ready for info in ready.nar.infos)

    def halves(self) -> Iterator[Pack]:
        """What can be sent, in two packs."""
        half = len(self.ready) // 2
        return (Pack(self.level, ready) for ready in (self.ready[:half], self.ready[half:]))


class Packing:
    """Packs for a server that takes them within `limits`."""

    def __init__(
        self, server: Server, pipeline: Pipeline, open_nar: OpenNar, limits: PackLimits, *, emit: Emit
    ) -> None:
        self._server = server
        self._pipeline = pipeline
        self._open_nar = open_nar
        self._limits = limits
        self._emit = emit
        self._size = min(PACK_SIZE, limits.size // 2, pipeline.budget.total)
        self._nars = min(PACK_NARS, limits.nars)
        # Who streams a NAR may have to wait for memory, while it has what we wait for.
        self._may_wait = PACKS_AT_ONCE * self._size + pipeline.shares.bound <= pipeline.budget.total

    def takes(self, nar: Nar) -> bool:
        """Whether it is small, and known to be."""
        return 0 < nar.size <= min(self._size, self._limits.nar_size)

    def groups(self, nars: Iterable[Nar]) -> Iterator[list[Nar]]:
        """Those that it takes, in their order, as many at a time as one pack can hold."""
        group: list[Nar] = []
        size = 0
        for nar in filter(self.takes, nars):
            most = self._server.bodies.within(self._size)
            if group and (len(group) == self._nars or size + nar.size > most):
                yield group
                group, size = [], 0
            group.append(nar)
            size += nar.size
        if group:
            yield group

    @asynccontextmanager
    async def packed(self, nars: Sequence[Nar]) -> AsyncIterator[Pack]:
        """What becomes of one group; it takes memory until this is left."""
        lease = self._pipeline.budget.lease()
        try:
            await lease.take(sum(nar.size for nar in nars))
            level = self._pipeline.choose_level()
            with self._pipeline.load.compressing():
                reading = asyncio.get_running_loop().run_in_executor(self._pipeline.threads, self._read, nars, level)
                made = await reading
            if self._may_wait:
                made = await self._with_streamed(made)
            yield made
        finally:
            lease.close()

    async def _with_streamed(self, packed: Pack) -> Pack:
        """With those of the others that come from a daemon."""
        waiting = enumerate(packed.others)
        came: dict[int, Ready] = {}

        async def take() -> None:
            for number, nar in waiting:
                if ready := await self._take(nar, packed):
                    came[number] = ready

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(STREAMS_AT_ONCE, len(packed.others))):
                tasks.create_task(take())
        return replace(packed, ready=[*packed.ready, *(came[number] for number in sorted(came))], others=[])

    async def _take(self, nar: Nar, packed: Pack) -> Ready | None:
        loop, threads = asyncio.get_running_loop(), self._pipeline.threads
        for info in nar.infos:
            source = self._open_nar(info)
            buffer = _room(info)
            try:
                try:
                    await source.gather(buffer)
                    file = await loop.run_in_executor(threads, _file, source, info, buffer, packed.level)
                finally:
                    await source.close()
                return Ready(nar, info, file)
            except CachesrvError as error:
                packed.failed[info.store_path] = Failure.of(error)
        return None

    def request(self, packed: Pack, paths: Sequence[PathToPublish]) -> tuple[PackHead, bytes] | None:
        """Head and body of what can be sent; None when there is no room in it for these paths."""
        head = PackHead(
            [PackedNar(one.info.nar_hash.nix32, one.info.nar_size, len(one.file)) for one in packed.ready], list(paths)
        )
        body = pack.encode(head, [one.file for one in packed.ready])
        size = len(body) - sum(nar.file_size for nar in head.nars)
        fits = size <= self._limits.head_size and self._server.bodies.within(len(body)) == len(body)
        return (head, body) if fits or not paths else None

    async def send(self, packed: Pack, head: PackHead, body: bytes) -> PackAnswer:
        """What the server says, asked again where that may help. Raises what `Server.send_pack` raises."""
        for one in packed.ready:
            self._emit(Sending(one.info.store_path.base_name, one.info.nar_size))
        started = time.monotonic()
        with self._pipeline.load.leaving():
            answer = await self._server.send_pack(head, body)
        seconds = round(time.monotonic() - started, 3)
        for one, outcome in zip(packed.ready, answer.nars, strict=True):
            name, size = one.info.store_path.base_name, one.info.nar_size
            self._emit(Sent(name, size, len(one.file)))
            if outcome.error is None:
                self._emit(Stored(name, size, len(one.file), seconds, packed.level))
        return answer

    def _read(self, nars: Iterable[Nar], level: int) -> Pack:
        packed, frames = Pack(level), Frames(level)
        for nar in nars:
            for info in nar.infos:
                source = self._open_nar(info)
                if not isinstance(source, LocalNar):
                    packed.others.append(nar)
                    break
                try:
                    packed.ready.append(Ready(nar, info, frames.file(_checked(source, info, _room(info)))))
                    break
                except CachesrvError as error:  # a path that turns out to be damaged may have an intact twin
                    packed.failed[info.store_path] = Failure.of(error)
                finally:
                    source.close_now()
        return packed


def _room(info: PathInfo) -> memoryview:
    """For its NAR, and for one byte more than there may be, to notice it."""
    return memoryview(bytearray(info.nar_size + 1))


def _checked(source: NarSource, info: PathInfo, buffer: memoryview) -> memoryview:
    """The NAR. Raises Mismatch when it is not that of the path, and what the source does."""
    size = source.fill(buffer)
    check(info, source.digest(), size)
    source.accept()
    return buffer[:size]


def _file(source: NarSource, info: PathInfo, buffer: memoryview, level: int) -> bytes:
    return Frames(level).file(_checked(source, info, buffer))
