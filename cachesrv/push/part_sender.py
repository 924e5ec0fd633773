"""Single parts on their way, and whether the server's storage can be one of the ways."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cachesrv.push.events import Noted, Sent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cachesrv.push.connection import Chunk
    from cachesrv.push.events import Emit
    from cachesrv.push.nar_upload import NarUpload
    from cachesrv.push.parts import Part
    from cachesrv.push.pipeline import Pipeline
    from cachesrv.push.ways import NoStorage, Way

_SENT_TOGETHER = 256 * 1024


class PartSender:
    """`direct`: whether parts may go to the server's storage."""

    def __init__(self, pipeline: Pipeline, *, direct: bool, emit: Emit) -> None:
        self.direct = direct
        self._pipeline = pipeline
        self._emit = emit

    def leave_storage(self, error: NoStorage) -> None:
        """From now on all go through the server."""
        if self.direct:
            self.direct = False
            self._emit(Noted(f"{error}: NARs go through the server instead"))

    async def digest(self, way: Way, part: Part) -> bytes:
        """What the way knows the part by."""
        return await asyncio.get_running_loop().run_in_executor(self._pipeline.threads, way.digest, part.data)

    async def put(self, upload: NarUpload, way: Way, part: Part, digest: bytes) -> None:
        """Send a part of an upload. Raises as `NarUpload.put`."""
        name = upload.info.store_path.base_name
        with self._pipeline.load.leaving():
            await upload.put(way, part.number, digest, part.size, lambda: self.leaving(name, part))

    async def leaving(self, name: str, part: Part) -> AsyncIterator[Chunk]:
        """The bytes of a part of the path with this name, as they are sent."""
        for start in range(0, part.size, _SENT_TOGETHER):
            piece = part.data[start : start + _SENT_TOGETHER]
            yield piece
            self._emit(Sent(name, 0, len(piece)))
