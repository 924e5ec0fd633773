"""A NAR that goes to the server in parts, as `cachesrv.api` describes it."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec

from cachesrv.api import BegunAnswer, BegunRequest, CompleteAnswer, CompleteRequest, UploadAnswer, UploadRequest
from cachesrv.errors import Refused
from cachesrv.push.refusal import NotThere
from cachesrv.push.retry import TryAgain, retry

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Sequence
    from collections.abc import Set as AbstractSet

    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.events import Emit
    from cachesrv.push.server import Server

_PAUSE = 0.5
"""Seconds between two questions whether the server has come to an end."""

Body = Callable[[], "AsyncIterable[bytes | memoryview]"]
"""The bytes of a part, each time from the start."""


def upload_name(nar_hash: Hash, recipe: str, part_size: int) -> str:
    """The name of an upload: the same for all who send the same bytes cut in the same way."""
    return sha256(f"{nar_hash.nix32} in parts of {part_size}: {recipe}".encode()).hexdigest()[:40]


async def begun_uploads(server: Server, names: Sequence[str]) -> AbstractSet[str]:
    """Which of these the server has begun; none for a server that does not know the question. Raises TryAgain,
    ServerError, NotAllowed.
    """
    question = msgspec.json.encode(BegunRequest(list(names)))
    try:
        return frozenset((await server.ask("POST", "uploads", question, BegunAnswer)).begun)
    except (NotThere, Refused):
        return frozenset()


class NarUpload:
    """The upload of one NAR, called `name`. What may pass is tried again here, part by part."""

    def __init__(self, server: Server, info: PathInfo, name: str, *, emit: Emit) -> None:
        self._server = server
        self._info = info
        self._action = f"uploads/{name}"
        self._emit = emit

    async def begin(self) -> UploadAnswer:
        """Begin it or take it up again; what is there."""
        question = UploadRequest(self._info.nar_hash.nix32, self._info.nar_size)
        return await self._server.ask("PUT", self._action, msgspec.json.encode(question), UploadAnswer)

    async def put(self, number: int, digest: bytes, size: int, body: Body) -> None:
        """Send a part of `size` bytes with this sha256; `body` gives its bytes, each time anew. It is there when this
        returns. Raises TryAgain when it has to be begun anew as well.
        """
        url = self._server.address.api(f"{self._action}/parts/{number}")
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(size),
            "Content-Digest": f"sha-256=:{b64encode(digest).decode()}:",
        }
        what = f"sending part {number} of {self._info.store_path.base_name}"
        try:
            await retry(lambda: self._server.put(url, body(), headers), what, self._server.backoff, self._emit)
        except NotThere as error:
            # Somebody else may have completed it, or it was removed as stale.
            raise TryAgain(str(error)) from error

    async def complete(self, digests: Sequence[bytes]) -> None:
        """Have the NAR made of the parts with these sha256, in order; it is there, checked, when this returns.

        Raises TryAgain when parts are not there any more, or the server does not come forward; Refused.
        """
        question = CompleteRequest(self._info.nar_hash.nix32, [digest.hex() for digest in digests])
        body = msgspec.json.encode(question)
        now = asyncio.get_running_loop().time
        verified, since = -1, now()
        while True:
            answer = await self._server.ask("POST", f"{self._action}/complete", body, CompleteAnswer)
            if answer.state == "stored":
                return
            if answer.state == "incomplete":
                raise TryAgain(f"{len(answer.missing)} of {len(digests)} parts are not at the server any more")
            if answer.verified > verified:
                verified, since = answer.verified, now()
            elif now() - since > self._server.timeouts.store:
                raise TryAgain(f"{self._server.address} has the whole NAR and does not come to an end with it")
            await asyncio.sleep(_PAUSE)

    async def abort(self) -> None:
        """Have the parts forgotten. Raises as `Server.delete` does."""
        await self._server.delete(self._action)
