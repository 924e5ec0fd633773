"""The cache server as the uploader sees it: the push API and the place for NARs, over HTTP.

Every failure becomes one of our own errors with a line that says what to do. Those that may pass are `retry.TryAgain`
and are tried again here, except the sending of a NAR, whose bytes are gone by then: its caller begins anew.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

import msgspec

from cachesrv.api import (
    CacheAnswer,
    MissingAnswer,
    MissingRequest,
    PackAnswer,
    PathOutcome,
    PublishAnswer,
    PublishRequest,
)
from cachesrv.errors import BadInput, ServerError
from cachesrv.nix import json_document
from cachesrv.push.body_limit import BodyTooLarge
from cachesrv.push.connection import Timeouts
from cachesrv.push.events import ignore
from cachesrv.push.retry import Backoff, retry
from cachesrv.push.transport import Transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from cachesrv.api import PackHead, PathToPublish, WantedPath
    from cachesrv.nix.hashes import Hash
    from cachesrv.push.address import Address
    from cachesrv.push.body_limit import BodyLimit
    from cachesrv.push.connection import Body, Chunk
    from cachesrv.push.elsewhere import Elsewhere
    from cachesrv.push.events import Emit
    from cachesrv.push.token import TokenSource

    SendNar = Callable[[Hash, AsyncIterable[Chunk]], Awaitable[None]]

FIRST_ATTEMPTS = 4
"""For the first question: a wrong URL should not take a minute to be noticed, a server may just be starting."""

_SLICE = 256 * 1024
_NAR_TYPE = "application/x-nix-nar"
_PACK_TYPE = "application/x-cachesrv-pack"

Answer = TypeVar("Answer")
Item = TypeVar("Item")


class Server:
    """One cache on a server; made by `connect`."""

    def __init__(
        self,
        address: Address,
        tokens: TokenSource,
        *,
        connections: int,
        backoff: Backoff,
        timeouts: Timeouts,
        emit: Emit,
    ) -> None:
        self.address = address
        self.backoff = backoff
        self.timeouts = timeouts
        self._connections = connections
        self._transport = Transport(
            address, tokens, connections=connections, patience=backoff.patience, timeouts=timeouts, emit=emit
        )
        self._elsewhere: Elsewhere | None = None
        self._emit = emit

    async def close(self) -> None:
        """End all connections."""
        await self._transport.close()
        if self._elsewhere is not None:
            await self._elsewhere.close()

    @property
    def elsewhere(self) -> Elsewhere:
        """Where the server sends us with parts, if it does."""
        from cachesrv.push.elsewhere import Elsewhere  # noqa: PLC0415  brings the library with it

        if self._elsewhere is None:
            self._elsewhere = Elsewhere(self._connections, self.timeouts, patience=self.backoff.patience)
        return self._elsewhere

    @property
    def bodies(self) -> BodyLimit:
        """How large those of requests may be."""
        return self._transport.bodies

    async def describe(self) -> CacheAnswer:
        """What a client has to know of the cache."""
        backoff = replace(self.backoff, attempts=min(FIRST_ATTEMPTS, self.backoff.attempts), outage=0.0)
        cache = await self.ask("GET", "", b"", CacheAnswer, backoff)
        self.bodies.said(cache.part_size)
        return cache

    async def missing(self, paths: Sequence[WantedPath]) -> Sequence[MissingAnswer]:
        """Which of at most MAX_BATCH paths are not there; answers to several questions where one would be too large."""
        return await self._ask_of(paths, "missing", lambda some: MissingRequest(list(some)), MissingAnswer)

    async def missing_realisations(self, names: Sequence[str]) -> list[str]:
        """Which of at most MAX_BATCH realisations, by the names of their objects, are not there."""
        answers = await self._ask_of(names, "missing", lambda some: MissingRequest([], list(some)), MissingAnswer)
        return [name for answer in answers for name in answer.realisations]

    async def put_metadata(self, name: str, data: bytes) -> None:
        """Put a small JSON object into the cache. Raises Refused or Conflict when the server does not take it."""

        async def once() -> None:
            await self._transport.ask("PUT", f"{self.address}/{quote(name)}", data)

        await retry(once, f"asking {self.address}", self.backoff, self._emit)

    async def publish(self, paths: Sequence[PathToPublish]) -> list[PathOutcome]:
        """Publish at most MAX_BATCH paths whose NARs are there; an outcome for each, in their order."""
        answers = await self._ask_of(
            paths, "paths", lambda some: PublishRequest(list(some)), PublishAnswer, _not_published
        )
        outcomes = [outcome for answer in answers for outcome in answer.outcomes]
        _check_outcomes(self.address, outcomes, paths)
        return outcomes

    async def has_nar(self, path: WantedPath) -> bool:
        """Whether nothing has to be sent for this path; asked once only. Raises TryAgain."""
        question = msgspec.json.encode(MissingRequest([path]))
        answer = await self.ask_once("POST", "missing", question, MissingAnswer)
        return path.path not in answer.missing or path.path in answer.stored

    @asynccontextmanager
    async def streaming(self) -> AsyncIterator[SendNar]:
        """What sends one NAR, compressed, that is still being made: it is there, checked, when the call returns.
        Nothing is to be made of it before this is entered, since there may be a long wait for others.

        The call raises TryAgain when it may work from the start, Conflict, TooLarge or Refused when the server does not
        take this NAR. An exception of the chunks ends the request so that
        nothing is kept, and shows as TryAgain: the caller has to look there first.
        """
        async with self._transport.streaming() as exchange:

            async def send(nar_hash: Hash, chunks: AsyncIterable[Chunk]) -> None:
                await exchange("PUT", self.address.nar(nar_hash.bare_nix32), chunks, {"Content-Type": _NAR_TYPE})

            yield send

    async def put_nar(self, nar_hash: Hash, body: Body, size: int) -> None:
        """Send a NAR of which all `size` bytes are here, compressed; raises as `streaming` says."""
        await self.put(self.address.nar(nar_hash.bare_nix32), body, size, {"Content-Type": _NAR_TYPE})

    async def send_pack(self, head: PackHead, body: bytes) -> PackAnswer:
        """Send a pack, which has this head; raises as `put_nar` does, the last TryAgain only."""
        headers = {"Content-Type": _PACK_TYPE}

        async def once() -> PackAnswer:
            url = self.address.api("nars")
            answered = await self._transport.send("POST", url, lambda: _slices(body), len(body), headers)
            return _decode(answered, PackAnswer, self.address)

        answer = await retry(once, f"sending {len(head.nars)} small NARs", self.backoff, self._emit)
        if [outcome.nar_hash for outcome in answer.nars] != [nar.nar_hash for nar in head.nars]:
            raise ServerError(f"{self.address} answered for other NARs than were sent")
        _check_outcomes(self.address, answer.paths, head.paths)
        return answer

    async def put(self, url: str, body: Body, size: int, headers: Mapping[str, str]) -> None:
        """Send `size` bytes, once; how they are taken is watched. Raises TryAgain and what `refusal` says."""
        await self._transport.send("PUT", url, body, size, headers)

    async def ask(
        self, method: str, action: str, question: bytes, kind: type[Answer], backoff: Backoff | None = None
    ) -> Answer:
        """The answer to a JSON question to an action of the push API, asked again while that may help. Raises TryAgain,
        ServerError, and what `refusal` says.
        """

        async def once() -> Answer:
            return await self.ask_once(method, action, question, kind)

        return await retry(once, f"asking {self.address}", backoff or self.backoff, self._emit)

    async def ask_once(self, method: str, action: str, question: bytes, kind: type[Answer]) -> Answer:
        """The same, asked once only."""
        return _decode(await self._transport.ask(method, self.address.api(action), question), kind, self.address)

    async def _ask_of(
        self,
        some: Sequence[Item],
        action: str,
        question: Callable[[Sequence[Item]], msgspec.Struct],
        kind: type[Answer],
        alone: Callable[[Item, BodyTooLarge], Answer] | None = None,
    ) -> list[Answer]:
        """Answers to a question about some items, in their order: to one question, or to several where that would be
        too large. `alone` answers for an item about which nobody can be asked; without it, BodyTooLarge is raised.
        """
        try:
            return [await self.ask("POST", action, msgspec.json.encode(question(some)), kind)]
        except BodyTooLarge as error:
            if len(some) < 2 and alone is not None:
                return [alone(one, error) for one in some]
            if len(some) < 2:
                raise
        half = len(some) // 2
        first = await self._ask_of(some[:half], action, question, kind, alone)
        return first + await self._ask_of(some[half:], action, question, kind, alone)

    async def delete(self, action: str) -> None:
        """Have something forgotten. Raises as `ask_once` does."""
        await self._transport.ask("DELETE", self.address.api(action), b"")


@asynccontextmanager
async def connect(
    address: Address,
    tokens: TokenSource,
    *,
    connections: int = 8,
    backoff: Backoff | None = None,
    timeouts: Timeouts | None = None,
    emit: Emit = ignore,
) -> AsyncIterator[Server]:
    """Nothing is sent yet. Raises ConfigError when the token or the authorities' certificates cannot be read."""
    server = Server(
        address,
        tokens,
        connections=connections,
        backoff=backoff or Backoff(),
        timeouts=timeouts or Timeouts(),
        emit=emit,
    )
    try:
        yield server
    finally:
        await server.close()


def _not_published(path: PathToPublish, error: BodyTooLarge) -> PublishAnswer:
    references = len(path.references)
    return PublishAnswer([PathOutcome(path.path, f"with its {references} references: {error}", "too-large")])


def _check_outcomes(address: Address, outcomes: Sequence[PathOutcome], paths: Sequence[PathToPublish]) -> None:
    if [outcome.path for outcome in outcomes] != [path.path for path in paths]:
        raise ServerError(f"{address} answered for other paths than were to be published")


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _SLICE):
        yield body[start : start + _SLICE]


def _decode(body: bytes, kind: type[Answer], address: Address) -> Answer:
    try:
        return json_document.decode(body, kind, what="its answer")
    except BadInput as error:
        raise ServerError(f"{address} does not answer as the push API does, is it a cachesrv? ({error})") from None
