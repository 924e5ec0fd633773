"""NARs that are a single part: in one request, straight to the server's storage or through the server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.push.events import Sent
from cachesrv.push.ways import NoStorage, NotOffered

if TYPE_CHECKING:
    from cachesrv.push.compressed_nar import CompressedNar
    from cachesrv.push.events import Emit
    from cachesrv.push.nar_upload import NarUpload
    from cachesrv.push.part_memory import Share
    from cachesrv.push.part_sender import PartSender
    from cachesrv.push.parts import Part
    from cachesrv.push.pipeline import Pipeline
    from cachesrv.push.server import Server


class Alone:
    """Sends them; to the storage as long as the server has them sent there, and it can be reached."""

    def __init__(self, server: Server, pipeline: Pipeline, sender: PartSender, *, emit: Emit) -> None:
        self._server = server
        self._load = pipeline.load
        self._sender = sender
        self._refused = False
        self._emit = emit

    @property
    def to_storage(self) -> bool:
        """Whether they are to go there."""
        return self._sender.direct and not self._refused

    async def to_the_storage(self, upload: NarUpload, part: Part, share: Share) -> bool | None:
        """Send it there; False when it turned out to be at the server, None where it cannot go there. Raises what the
        server says, and TryAgain.
        """
        way = upload.in_one_piece()
        try:
            await self._sender.put(upload, way, part, await self._sender.digest(way, part))
        except NotOffered:
            self._refused = True
            return None
        except NoStorage as error:
            self._sender.leave_storage(error)
            return None
        if way.stored:
            return False
        self._emit(Sent(upload.info.store_path.base_name, part.nar_bytes, 0))
        share.leave()
        await upload.complete(way)
        return True

    async def through_the_server(self, nar: CompressedNar, part: Part) -> None:
        """Raises what the server says, and TryAgain."""
        name = nar.info.store_path.base_name
        with self._load.leaving():
            await self._server.put_nar(nar.info.nar_hash, lambda: self._sender.leaving(name, part), part.size)
        self._emit(Sent(name, part.nar_bytes, 0))
