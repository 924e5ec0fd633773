"""The ways that a compressed NAR goes to the server: parts through it, or to its storage parts or a single piece."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from typing import TYPE_CHECKING, Protocol

import msgspec

from cachesrv.api import CompleteRequest, DirectAnswer, FileAnswer, FileRequest, SignAnswer, SignRequest, UploadedPart
from cachesrv.errors import BadInput, CachesrvError, ServerError
from cachesrv.push.refusal import NotThere
from cachesrv.push.retry import TryAgain, Unreachable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cachesrv.push.connection import Body
    from cachesrv.push.server import Server
    from cachesrv.turns import Turn

_SIGNED_HEADERS = ("content-md5", "x-amz-")
"""What headers begin with that a server may have us send to its storage."""


class NoStorage(TryAgain):
    """The server's storage does not take parts from us."""


class StorageOutOfReach(NoStorage, Unreachable):
    """There is no connection to it any more."""


class NotOffered(CachesrvError):
    """The server does not have NARs sent to its storage in one piece, or has no room there."""


class Way(Protocol):
    """How one NAR goes, in parts each known by a digest; `proven`: this is known to work."""

    @property
    def proven(self) -> bool: ...

    def digest(self, data: memoryview) -> bytes:
        """Of a part; takes its time."""

    async def put(self, number: int, digest: bytes, size: int, body: Body) -> None:
        """Send a part, once; what the server is asked before that is asked as other questions are."""

    def making(self, nar_hash: str) -> CompleteRequest:
        """Names the parts that make up the NAR."""


class WayOfParts(Way, Protocol):
    """Several parts, of an upload that was begun. `direct`: they go to the server's storage, within these limits."""

    @property
    def direct(self) -> DirectAnswer | None: ...

    def has(self, number: int, digest: bytes) -> bool:
        """Whether that part is there already."""

    def recall(self, number: int, digest: bytes, tag: str) -> bool:
        """Whether a part is still there that was sent before with this digest and got this tag; if so, it is one of the
        NAR.
        """

    def tag(self, number: int) -> str:
        """What a part is called that is there."""


class Through:
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


class _ToStorage:
    """What goes to the server's storage, and is known by its MD5."""

    def __init__(self, server: Server, action: str) -> None:
        self._server = server
        self._action = action

    @property
    def proven(self) -> bool:
        return self._server.elsewhere.proven

    def digest(self, data: memoryview) -> bytes:
        return hashlib.md5(data, usedforsecurity=False).digest()

    async def _put(self, turn: Turn, signed: SignAnswer, size: int, body: Body) -> str:
        """Send to the storage what was signed; its tag. Raises NoStorage, and NotThere when what it belongs to is not
        there.
        """
        headers = {name: value for name, value in signed.headers.items() if name.lower().startswith(_SIGNED_HEADERS)}
        headers["Content-Length"] = str(size)
        try:
            return await self._server.elsewhere.put(turn, signed.url, headers, body)
        except NotThere:
            raise
        except Unreachable as error:
            raise (StorageOutOfReach if self.proven else NoStorage)(str(error)) from error
        except TryAgain as error:
            raise NoStorage(str(error), error.retry_after) from error
        except (BadInput, ServerError) as error:
            raise _for_good(NoStorage(str(error))) from error


class Direct(_ToStorage):
    """Parts to the server's storage, which knows them by their MD5, or calls them something else when it has them."""

    def __init__(self, server: Server, action: str, answer: DirectAnswer) -> None:
        super().__init__(server, action)
        self.direct = answer
        self._there = {part.number: part.etag for part in answer.parts}
        self._tags: dict[int, str] = {}
        self._digests: dict[int, str] = {}

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
        question = msgspec.json.encode(SignRequest(digest.hex()))
        async with self._server.elsewhere.turn() as turn:
            signed = await self._server.ask("POST", f"{self._action}/parts/{number}", question, SignAnswer)
            self._tags[number] = await self._put(turn, signed, size, body)

    def making(self, nar_hash: str) -> CompleteRequest:
        return CompleteRequest(nar_hash, _in_order(self._tags), _in_order(self._digests))


class InOnePiece(_ToStorage):
    """One part that is all of it, to the server's storage; nothing is begun for it. `stored`: the NAR was there, and
    nothing was sent.
    """

    def __init__(self, server: Server, action: str, nar_hash: str) -> None:
        super().__init__(server, action)
        self.stored = False
        self._nar_hash = nar_hash
        self._sent = CompleteRequest(nar_hash, [])

    async def put(self, number: int, digest: bytes, size: int, body: Body) -> None:
        """See Way. Raises NotOffered, too."""
        assert number == 1
        async with self._server.elsewhere.turn() as turn:
            answer = await self._ask(digest, size)
            if answer.stored:
                self.stored = True
            elif answer.put is None:
                raise NotOffered("the server takes it in another way")
            else:
                tag = await self._put_alone(turn, answer.put, size, body)
                self._sent = CompleteRequest(self._nar_hash, [tag], [digest.hex()], size)

    async def _ask(self, digest: bytes, size: int) -> FileAnswer:
        question = msgspec.json.encode(FileRequest(self._nar_hash, size, digest.hex()))
        try:
            return await self._server.ask("POST", f"{self._action}/file", question, FileAnswer)
        except NotThere as error:
            raise NotOffered(str(error)) from error

    async def _put_alone(self, turn: Turn, signed: SignAnswer, size: int, body: Body) -> str:
        try:
            return await self._put(turn, signed, size, body)
        except NotThere as error:  # there is no bucket, then: nothing had to be begun
            raise _for_good(NoStorage(str(error))) from error

    def making(self, nar_hash: str) -> CompleteRequest:
        assert nar_hash == self._nar_hash
        return self._sent


def _for_good(error: NoStorage) -> NoStorage:
    """It need not be tried again."""
    error.tried = True
    return error


def _in_order(names: Mapping[int, str]) -> list[str]:
    return [names[number] for number in sorted(names)]
