"""The cache server as the uploader sees it: the push API and the place for NARs, over HTTP.

Every failure becomes one of our own errors with a line that says what to do. Those that may pass are `retry.TryAgain`
and are tried again here, except the sending of a NAR, whose bytes are gone by then: its caller begins anew.
Redirects are not followed: a body cannot be sent twice, and the token belongs to nobody else.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

import msgspec
import zstandard

from cachesrv.api import (
    MAX_REQUEST_SIZE,
    CacheAnswer,
    MissingAnswer,
    MissingRequest,
    PackAnswer,
    PublishAnswer,
    PublishRequest,
)
from cachesrv.errors import NotAuthenticated, ServerError
from cachesrv.push.connection import Timeouts, may_need_proxy
from cachesrv.push.events import ignore
from cachesrv.push.questions import Questions
from cachesrv.push.refusal import refusal, said_in, seconds_until
from cachesrv.push.retry import Backoff, TryAgain, retry
from cachesrv.push.traffic import Traffic

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence

    import aiohttp

    from cachesrv.api import PackHead, PathOutcome, PathToPublish, WantedPath
    from cachesrv.nix.hashes import Hash
    from cachesrv.push.address import Address
    from cachesrv.push.connection import Chunk
    from cachesrv.push.elsewhere import Elsewhere
    from cachesrv.push.events import Emit
    from cachesrv.push.token import TokenSource

    SendNar = Callable[[Hash, AsyncIterable[Chunk]], Awaitable[None]]

FIRST_ATTEMPTS = 4
"""For the first question: a wrong URL should not take a minute to be noticed, a server may just be starting."""

_COMPRESS_FROM = 1024
_SLICE = 256 * 1024
_NAR_TYPE = "application/x-nix-nar"
_PACK_TYPE = "application/x-cachesrv-pack"
_MAX_ERROR_SIZE = 64 * 1024

Answer = TypeVar("Answer")


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
        self._connections = connections
        self._traffic = Traffic(connections, patience=backoff.patience)
        self._session: aiohttp.ClientSession | None = None
        self._elsewhere: Elsewhere | None = None
        self._questions = Questions(address, timeouts, limit=MAX_REQUEST_SIZE)
        self._tokens = tokens
        self._token = tokens.read()
        self.timeouts = timeouts
        self._emit = emit

    async def close(self) -> None:
        """End all connections."""
        if self._session is not None:
            await self._session.close()
        if self._elsewhere is not None:
            await self._elsewhere.close()

    @property
    def elsewhere(self) -> Elsewhere:
        """Where the server sends us with parts, if it does."""
        from cachesrv.push.elsewhere import Elsewhere  # noqa: PLC0415  brings the library with it

        if self._elsewhere is None:
            self._elsewhere = Elsewhere(self._connections, self.timeouts, patience=self.backoff.patience)
        return self._elsewhere

    async def describe(self) -> CacheAnswer:
        """What a client has to know of the cache."""
        backoff = replace(self.backoff, attempts=min(FIRST_ATTEMPTS, self.backoff.attempts))
        return await self.ask("GET", "", b"", CacheAnswer, backoff)

    async def missing(self, paths: Sequence[WantedPath]) -> MissingAnswer:
        """Which of at most MAX_BATCH paths are not there."""
        question = msgspec.json.encode(MissingRequest(list(paths)))
        return await self.ask("POST", "missing", question, MissingAnswer)

    async def missing_realisations(self, names: Sequence[str]) -> list[str]:
        """Which of at most MAX_BATCH realisations, by the names of their objects, are not there."""
        question = msgspec.json.encode(MissingRequest([], list(names)))
        answer = await self.ask("POST", "missing", question, MissingAnswer)
        return answer.realisations

    async def put_metadata(self, name: str, data: bytes) -> None:
        """Put a small JSON object into the cache. Raises Refused or Conflict when the server does not take it."""

        async def once() -> None:
            await self._request("PUT", f"{self.address}/{quote(name)}", data)

        await retry(once, f"asking {self.address}", self.backoff, self._emit)

    async def publish(self, paths: Sequence[PathToPublish]) -> list[PathOutcome]:
        """Publish at most MAX_BATCH paths whose NARs are there; an outcome for each, in their order."""
        question = msgspec.json.encode(PublishRequest(list(paths)))
        answer = await self.ask("POST", "paths", question, PublishAnswer)
        _check_outcomes(self.address, answer.outcomes, paths)
        return answer.outcomes

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
        take this NAR. An exception of the chunks ends the request so that nothing is kept, and shows as TryAgain: the
        caller has to look there first.
        """
        async with self._traffic.request(streams=True):

            async def send(nar_hash: Hash, chunks: AsyncIterable[Chunk]) -> None:
                await self._exchange("PUT", self.address.nar(nar_hash.bare_nix32), chunks, {"Content-Type": _NAR_TYPE})

            yield send

    async def put_nar(self, nar_hash: Hash, chunks: AsyncIterable[Chunk], size: int) -> None:
        """Send a NAR of which all `size` bytes are here, compressed; raises as `streaming` says."""
        headers = {"Content-Type": _NAR_TYPE, "Content-Length": str(size)}
        await self.put(self.address.nar(nar_hash.bare_nix32), chunks, headers)

    async def send_pack(self, head: PackHead, body: bytes) -> PackAnswer:
        """Send a pack, which has this head; raises as `put_nar` does, the last TryAgain only."""
        headers = {"Content-Type": _PACK_TYPE, "Content-Length": str(len(body))}

        async def once() -> PackAnswer:
            answered = await self._send("POST", self.address.api("nars"), _slices(body), headers)
            return _decode(answered, PackAnswer, self.address)

        answer = await retry(once, f"sending {len(head.nars)} small NARs", self.backoff, self._emit)
        if [outcome.nar_hash for outcome in answer.nars] != [nar.nar_hash for nar in head.nars]:
            raise ServerError(f"{self.address} answered for other NARs than were sent")
        _check_outcomes(self.address, answer.paths, head.paths)
        return answer

    async def put(self, url: str, chunks: AsyncIterable[Chunk], headers: Mapping[str, str]) -> None:
        """Send bytes, once; how they are taken is watched. Raises TryAgain and what `refusal` says."""
        await self._send("PUT", url, chunks, headers)

    async def _send(self, method: str, url: str, chunks: AsyncIterable[Chunk], headers: Mapping[str, str]) -> bytes:
        """What is answered to a body of which all is here."""
        async with self._traffic.request():
            return await self._exchange(method, url, chunks, headers)

    async def _exchange(self, method: str, url: str, chunks: AsyncIterable[Chunk], headers: Mapping[str, str]) -> bytes:
        """What is answered to a body that may take its time."""
        from cachesrv.push.session import for_nars, our_errors, watched  # noqa: PLC0415  brings the library with it

        session = self._opened()
        with our_errors(self.address):
            async with (
                asyncio.timeout(None) as deadline,
                session.request(
                    method,
                    url,
                    data=watched(chunks, deadline, self.timeouts),
                    headers={**self._headers(), **headers},
                    allow_redirects=False,
                    timeout=for_nars(self.timeouts),
                ) as response,
            ):
                deadline.reschedule(asyncio.get_running_loop().time() + self.timeouts.answer)
                return await self._answered(response)

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
        return _decode(await self._request(method, self.address.api(action), question), kind, self.address)

    async def delete(self, action: str) -> None:
        """Have something forgotten. Raises as `ask_once` does."""
        await self._request("DELETE", self.address.api(action), b"")

    async def _request(self, method: str, url: str, body: bytes) -> bytes:
        headers = self._headers() | {"Accept": "application/json"}
        if body:
            headers["Content-Type"] = "application/json"
        if len(body) >= _COMPRESS_FROM:
            headers["Content-Encoding"] = "zstd"
            body = zstandard.ZstdCompressor().compress(body)
        async with self._traffic.request():
            if self._session is None and not may_need_proxy(os.environ):
                said = await self._questions.ask(method, url, headers, body)
                self._check(said.status, said.headers, said.body)
                return said.body
            return await self._request_in_session(method, url, headers, body)

    async def _request_in_session(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> bytes:
        from cachesrv.push.session import for_answers, our_errors  # noqa: PLC0415  brings the library with it

        session = self._opened()
        with our_errors(self.address):
            async with session.request(
                method,
                url,
                data=body or None,
                headers=headers,
                allow_redirects=False,
                timeout=for_answers(self.timeouts),
            ) as response:
                return await self._answered(response)

    def _opened(self) -> aiohttp.ClientSession:
        """The session, from the first time on that something is sent."""
        from cachesrv.push.session import open_session  # noqa: PLC0415  brings the library with it

        if self._session is None:
            self._session = open_session(self.address.base, self._connections + 1)
        return self._session

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token is not None else {}

    async def _answered(self, response: aiohttp.ClientResponse) -> bytes:
        if 200 <= response.status < 300:
            return await _read(response, MAX_REQUEST_SIZE)
        headers = {name.lower(): value for name, value in response.headers.items()}
        self._check(response.status, headers, await response.content.read(_MAX_ERROR_SIZE))
        raise ServerError(f"{self.address} answers with status {response.status}")

    def _check(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Raise what an answer without success means. A token that was renewed meanwhile is worth another try."""
        if 200 <= status < 300:
            return
        error = refusal(
            status,
            said_in(body[:_MAX_ERROR_SIZE], headers.get("content-type", "").partition(";")[0].strip().lower()),
            self.address,
            self._tokens,
            location=headers.get("location", ""),
            retry_after=seconds_until(headers.get("retry-after", "")),
        )
        if isinstance(error, NotAuthenticated):
            used, self._token = self._token, self._tokens.read()
            if used != self._token:
                raise TryAgain(f"the token from {self._tokens} has been renewed")
        raise error


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


def _check_outcomes(address: Address, outcomes: Sequence[PathOutcome], paths: Sequence[PathToPublish]) -> None:
    if [outcome.path for outcome in outcomes] != [path.path for path in paths]:
        raise ServerError(f"{address} answered for other paths than were to be published")


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _SLICE):
        yield body[start : start + _SLICE]


def _decode(body: bytes, kind: type[Answer], address: Address) -> Answer:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise ServerError(f"{address} does not answer as the push API does, is it a cachesrv? ({error})") from None


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise ServerError(f"an answer of more than {limit} bytes")
    return bytes(body)
