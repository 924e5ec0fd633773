"""One NAR to the server: in one go and from the start again after each failure that may pass, or in parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cachesrv.push.body_limit import BodyTooLarge, LengthWanted
from cachesrv.push.events import Sending, Sent, Stored
from cachesrv.push.in_parts import InParts
from cachesrv.push.plan import wanted
from cachesrv.push.retry import TryAgain, retry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cachesrv.api import CacheAnswer
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.compressed_nar import CompressedNar
    from cachesrv.push.events import Emit
    from cachesrv.push.nar_source import NarSource
    from cachesrv.push.pipeline import Pipeline
    from cachesrv.push.server import Server
    from cachesrv.push.transfers import Transfers

OpenNar = Callable[["PathInfo"], "NarSource"]
"""The NAR of a path, to be read once; may raise what a store does."""

_NOTHING = (0, 0)


class Delivery:
    """Brings NARs from a store to a server, whose cache says what it takes."""

    def __init__(
        self,
        server: Server,
        pipeline: Pipeline,
        open_nar: OpenNar,
        cache: CacheAnswer,
        transfers: Transfers,
        *,
        emit: Emit,
    ) -> None:
        self._server = server
        self._pipeline = pipeline
        self._open_nar = open_nar
        self._max_file_size = cache.max_nar_size
        self._in_parts = InParts(server, pipeline, cache, transfers, emit=emit) if cache.part_size else None
        self._emit = emit

    async def bring(self, info: PathInfo) -> None:
        """The NAR is at the server when this returns. Raises Mismatch when it is not what the path info says, what
        the store or the server raise, and the last TryAgain.
        """
        name = info.store_path.base_name
        started = time.monotonic()
        attempts = 0

        async def attempt() -> tuple[int, int]:
            nonlocal attempts
            attempts += 1
            # the answer to the attempt before may be all that was lost
            if attempts > 1 and await self._server.has_nar(wanted(info)):
                return _NOTHING
            return await self._send(info)

        sent_bytes, level = await retry(attempt, f"sending {name}", self._server.backoff, self._emit)
        if self._in_parts:
            await self._in_parts.over(info)
        self._emit(Stored(name, info.nar_size, sent_bytes, round(time.monotonic() - started, 3), level))

    async def _send(self, info: PathInfo) -> tuple[int, int]:
        """Bytes of the file, and the level of its compression."""
        while True:
            try:
                if self._in_parts and self._in_parts.is_for(info.nar_size):
                    return await self._send_in_parts(info, self._in_parts)
                return await self._send_whole(info)
            except (BodyTooLarge, LengthWanted):  # in smaller parts, then
                if self._in_parts is None:
                    raise

    async def _send_whole(self, info: PathInfo) -> tuple[int, int]:
        async with self._server.streaming() as send:
            self._emit(Sending(info.store_path.base_name, info.nar_size))
            async with self._pipeline.nar(self._open_nar(info), info, limit=self._max_file_size) as nar:
                try:
                    await send(info.nar_hash, self._counted(nar))
                except TryAgain as error:
                    if nar.failure is not None:
                        raise nar.failure from error
                    raise
                return nar.file_size, nar.level

    async def _send_in_parts(self, info: PathInfo, in_parts: InParts) -> tuple[int, int]:
        """The same, nothing when it turned out to be there."""
        async with in_parts.share(info) as share:
            self._emit(Sending(info.store_path.base_name, info.nar_size))
            taken_up = await in_parts.take_up(info)
            if taken_up is None:
                return _NOTHING
            async with self._pipeline.nar(
                self._open_nar(info),
                info,
                limit=self._max_file_size,
                level=taken_up.level,
                arrived=taken_up.arrived.frames,
            ) as nar:
                return (nar.file_size, nar.level) if await in_parts.send(nar, share, taken_up) else _NOTHING

    async def _counted(self, nar: CompressedNar) -> AsyncIterator[bytes]:
        name, told = nar.info.store_path.base_name, 0
        async for chunk in nar:
            yield chunk
            self._emit(Sent(name, nar.nar_sent - told, len(chunk)))
            told = nar.nar_sent
        nar.leaving.start()  # until the answer: much of it may still wait in buffers of the system
