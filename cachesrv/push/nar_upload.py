"""A NAR that goes to the server in parts, as `cachesrv.api` describes it: through the server, or to its storage."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from cachesrv.api import BegunAnswer, BegunRequest, CompleteAnswer, UploadAnswer, UploadRequest
from cachesrv.errors import Refused
from cachesrv.push.refusal import NotThere
from cachesrv.push.retry import TryAgain, retry
from cachesrv.push.ways import Direct, InOnePiece, NoStorage, Through

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.connection import Body
    from cachesrv.push.events import Emit
    from cachesrv.push.server import Server
    from cachesrv.push.ways import Way, WayOfParts

_FIRST_ATTEMPTS = 3
"""To send a part to storage that none has reached yet: there is another way."""

_PAUSE = 0.5
"""Seconds between two questions whether the server has come to an end."""


def upload_name(nar_hash: Hash, recipe: str, part_size: int, *, direct: bool = False) -> str:
    """The name of an upload: the same for all who send the same bytes cut in the same way."""
    text = f"{nar_hash.nix32} in parts of {part_size}{' elsewhere' if direct else ''}: {recipe}"
    return hashlib.sha256(text.encode()).hexdigest()[:40]


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
        self.name = name
        self._server = server
        self.info = info
        self._action = f"uploads/{name}"
        self._emit = emit

    def in_one_piece(self) -> InOnePiece:
        """The way of a NAR that is not begun."""
        return InOnePiece(self._server, self._action, self.info.nar_hash.nix32)

    async def begin(self, *, direct: bool) -> WayOfParts | None:
        """Begin it or take it up again; None when the NAR is there. `direct`: parts may go to the server's storage."""
        question = UploadRequest(self.info.nar_hash.nix32, self.info.nar_size, direct)
        answer = await self._server.ask("PUT", self._action, msgspec.json.encode(question), UploadAnswer)
        if answer.stored:
            return None
        if answer.direct is None:
            return Through(self._server, self._action, answer.parts)
        return Direct(self._server, self._action, answer.direct)

    async def put(self, way: Way, number: int, digest: bytes, size: int, body: Body) -> None:
        """Send a part of `size` bytes. It is there when this returns. Raises TryAgain, with `tried` unset when it has
        to be begun anew, and NoStorage; what its way does.
        """
        what = f"sending part {number} of {self.info.store_path.base_name}"
        backoff, proven = self._server.backoff, way.proven
        if not proven:
            backoff = replace(backoff, attempts=min(_FIRST_ATTEMPTS, backoff.attempts))
        try:
            await retry(lambda: way.put(number, digest, size, body), what, backoff, self._emit)
        except NotThere as error:
            # Somebody else may have completed it, or it was removed as stale.
            raise TryAgain(str(error)) from error
        except NoStorage:
            if proven or not way.proven:
                raise
            await self.put(way, number, digest, size, body)  # others got through meanwhile

    async def complete(self, way: Way) -> None:
        """Have the NAR made of the parts; it is there, checked, when this returns.

        Raises TryAgain when parts are not there any more, or the server does not come forward; Refused.
        """
        question = way.making(self.info.nar_hash.nix32)
        body = msgspec.json.encode(question)
        now = asyncio.get_running_loop().time
        verified, since = -1, now()
        while True:
            answer = await self._server.ask("POST", f"{self._action}/complete", body, CompleteAnswer)
            if answer.state == "stored":
                return
            if answer.state == "incomplete":
                raise TryAgain(f"{len(answer.missing)} of {len(question.parts)} parts are not at the server any more")
            if answer.verified > verified:
                verified, since = answer.verified, now()
            elif now() - since > self._server.timeouts.store:
                raise TryAgain(f"{self._server.address} has the whole NAR and does not come to an end with it")
            await asyncio.sleep(_PAUSE)

    async def abort(self) -> None:
        """Have the parts forgotten. Raises as `Server.delete` does."""
        await self._server.delete(self._action)
