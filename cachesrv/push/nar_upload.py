"""A NAR that goes to the server in parts, as `cachesrv.api` describes it: through the server, or to its storage."""

from __future__ import annotations

import asyncio
import hashlib
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import msgspec

from cachesrv.api import (
    BegunAnswer,
    BegunRequest,
    CompleteAnswer,
    CompleteRequest,
    DirectAnswer,
    SignAnswer,
    SignRequest,
    UploadAnswer,
    UploadedPart,
    UploadRequest,
)
from cachesrv.errors import BadInput, Refused, ServerError
from cachesrv.push.refusal import NotThere
from cachesrv.push.retry import TryAgain, Unreachable, retry

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.connection import Chunk
    from cachesrv.push.events import Emit
    from cachesrv.push.server import Server
    from cachesrv.turns import Turn

_FIRST_ATTEMPTS = 3
"""To send a part to storage that none has reached yet: there is another way."""

_PAUSE = 0.5
"""Seconds between two questions whether the server has come to an end."""

_SIGNED_HEADERS = ("content-md5", "x-amz-")
"""What headers begin with that a server may have us send to its storage."""

Body = Callable[[], "AsyncIterable[Chunk]"]
"""The bytes of a part, each time from the start."""


def upload_name(nar_hash: Hash, recipe: str, part_size: int, *, direct: bool = False) -> str:
    """The name of an upload: the same for all who send the same bytes cut in the same way."""
    text = f"{nar_hash.nix32} in parts of {part_size}{' elsewhere' if direct else ''}: {recipe}"
    return hashlib.sha256(text.encode()).hexdigest()[:40]


class NoStorage(TryAgain):
    """The server's storage does not take parts from us."""


class StorageOutOfReach(NoStorage, Unreachable):
    """There is no connection to it any more."""


class Parts(Protocol):
    """The way that parts of one NAR go, each known by a digest. `direct`: to the server's storage, within these limits;
    `proven`: it is known to work.
    """

    @property
    def direct(self) -> DirectAnswer | None: ...

    @property
    def proven(self) -> bool: ...

    def digest(self, data: memoryview) -> bytes:
        """Of a part; takes its time."""

    def has(self, number: int, digest: bytes) -> bool:
        """Whether that part is there already."""

    def recall(self, number: int, digest: bytes, tag: str) -> bool:
        """Whether a part is still there that was sent before with this digest and got this tag; if so, it is one of the
        NAR.
        """

    def tag(self, number: int) -> str:
        """What a part is called that is there."""

    async def put(self, number: int, digest: bytes, size: int, body: Body) -> None:
        """Send a part, once."""

    def making(self, nar_hash: str) -> CompleteRequest:
        """Names the parts that make up the NAR."""


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

    async def begin(self, *, direct: bool) -> Parts | None:
        """Begin it or take it up again; None when the NAR is there. `direct`: parts may go to the server's storage."""
        question = UploadRequest(self.info.nar_hash.nix32, self.info.nar_size, direct)
        answer = await self._server.ask("PUT", self._action, msgspec.json.encode(question), UploadAnswer)
        if answer.stored:
            return None
        if answer.direct is None:
            return _Through(self._server, self._action, answer.parts)
        return _Direct(self._server, self._action, answer.direct)

    async def put(self, parts: Parts, number: int, digest: bytes, size: int, body: Body) -> None:
        """Send a part of `size` bytes. It is there when this returns. Raises TryAgain, with `tried` unset when it has
        to be begun anew, and NoStorage.
        """
        what = f"sending part {number} of {self.info.store_path.base_name}"
        backoff, proven = self._server.backoff, parts.proven
        if not proven:
            backoff = replace(backoff, attempts=min(_FIRST_ATTEMPTS, backoff.attempts))
        try:
            await retry(lambda: parts.put(number, digest, size, body), what, backoff, self._emit)
        except NotThere as error:
            # Somebody else may have completed it, or it was removed as stale.
            raise TryAgain(str(error)) from error
        except NoStorage:
            if proven or not parts.proven:
                raise
            await self.put(parts, number, digest, size, body)  # others got through meanwhile

    async def complete(self, parts: Parts) -> None:
        """Have the NAR made of the parts; it is there, checked, when this returns.

        Raises TryAgain when parts are not there any more, or the server does not come forward; Refused.
        """
        question = parts.making(self.info.nar_hash.nix32)
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


class _Through:
    """Parts through the server, known by their sha256."""

    direct = None
    proven = True

    def __init__(self, server: Server, action: str, there: Sequence[UploadedPart]) -> None:
        self._server = server
        self._action = action
        self._there = {(part.number, part.sha256) for part in there}
        self._digests: dict[int, str] = {}

    def digest(self, data: memoryview) -> bytes:
        return hashlib.sha256(data).digest()

    def has(self, number: int, digest: bytes) -> bool:
        self._digests[number] = digest.hex()
        return (number, digest.hex()) in self._there

    def recall(self, number: int, digest: bytes, tag: str) -> bool:
        there = tag == digest.hex() and (number, tag) in self._there
        if there:
            self._digests[number] = tag
        return there

    def tag(self, number: int) -> str:
        return self._digests[number]

    async def put(self, number: int, digest: bytes, size: int, body: Body) -> None:
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Digest": f"sha-256=:{b64encode(digest).decode()}:",
        }
        await self._server.put(self._server.address.api(f"{self._action}/parts/{number}"), body, size, headers)

    def making(self, nar_hash: str) -> CompleteRequest:
        return CompleteRequest(nar_hash, _in_order(self._digests))


class _Direct:
    """Parts to the server's storage, which knows them by their MD5, or calls them something else when it has them."""

    def __init__(self, server: Server, action: str, answer: DirectAnswer) -> None:
        self.direct = answer
        self._server = server
        self._action = action
        self._there = {part.number: part.etag for part in answer.parts}
        self._tags: dict[int, str] = {}
        self._digests: dict[int, str] = {}

    @property
    def proven(self) -> bool:
        return self._server.elsewhere.proven

    def digest(self, data: memoryview) -> bytes:
        return hashlib.md5(data, usedforsecurity=False).digest()

    def has(self, number: int, digest: bytes) -> bool:
        self._tags[number] = self._digests[number] = digest.hex()
        return self._there.get(number) == digest.hex()

    def recall(self, number: int, digest: bytes, tag: str) -> bool:
        there = self._there.get(number) == tag
        if there:
            self._tags[number], self._digests[number] = tag, digest.hex()
        return there

    def tag(self, number: int) -> str:
        return self._tags[number]

    async def put(self, number: int, digest: bytes, size: int, body: Body) -> None:
        async with self._server.elsewhere.turn() as turn:
            await self._put(turn, number, digest, size, body)

    async def _put(self, turn: Turn, number: int, digest: bytes, size: int, body: Body) -> None:
        question = msgspec.json.encode(SignRequest(digest.hex()))
        signed = await self._server.ask_once("POST", f"{self._action}/parts/{number}", question, SignAnswer)
        headers = {name: value for name, value in signed.headers.items() if name.lower().startswith(_SIGNED_HEADERS)}
        headers["Content-Length"] = str(size)
        try:
            self._tags[number] = await self._server.elsewhere.put(turn, signed.url, headers, body)
        except NotThere:
            raise
        except Unreachable as error:
            raise (StorageOutOfReach if self.proven else NoStorage)(str(error)) from error
        except TryAgain as error:
            raise NoStorage(str(error), error.retry_after) from error
        except (BadInput, ServerError) as error:
            refused = NoStorage(str(error))
            refused.tried = True
            raise refused from error

    def making(self, nar_hash: str) -> CompleteRequest:
        return CompleteRequest(nar_hash, _in_order(self._tags), _in_order(self._digests))


def _in_order(names: Mapping[int, str]) -> list[str]:
    return [names[number] for number in sorted(names)]
