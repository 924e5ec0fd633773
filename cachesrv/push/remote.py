"""A binary cache as who reads it sees it: narinfos, listings and NARs over HTTP, from any server.

The token goes to the cache's own origin only, not to where a narinfo or a redirect may point. A transfer that breaks
goes on where it was.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from yarl import URL

from cachesrv.errors import BadInput, NotAllowed, NotFound, ServerError
from cachesrv.nix import listing, narinfo
from cachesrv.nix.compression import content_coding, decompress
from cachesrv.push.connection import Timeouts
from cachesrv.push.events import ignore
from cachesrv.push.refusal import refusal, said_in, seconds_until
from cachesrv.push.retry import Backoff, TryAgain, retry
from cachesrv.push.session import error_body, for_answers, open_session, our_errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

    import aiohttp

    from cachesrv.nix.listing import ListingNode
    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.push.address import Address
    from cachesrv.push.token import TokenSource

PATIENCE = Backoff(attempts=4)
"""For a person who waits."""

_CHUNK = 256 * 1024
_ABSENT = frozenset({404, 410})
_PARTIAL = 206
_NO_SUCH_RANGE = 416


class NoRanges(ServerError):
    """The server has no such part of a file, or sends files as a whole only."""


class RemoteCache:
    """A cache at a URL; made by `open_remote`."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        address: Address,
        tokens: TokenSource,
        backoff: Backoff,
        timeouts: Timeouts,
    ) -> None:
        self.url = address.url.rstrip("/")
        self._session = session
        self._address = address
        self._tokens = tokens
        self._token = tokens.read()
        self._backoff = backoff
        self._timeout = for_answers(timeouts)

    async def narinfo(self, hash_part: str) -> NarInfo:
        """Raises NotFound when the cache has no such path, ServerError when it cannot say, BadInput for nonsense."""
        data = await self._whole(f"{hash_part}.narinfo", narinfo.DEFAULT_LIMIT)
        if data is None:
            raise NotFound(f"there is no path {hash_part}-… in {self.url}")
        info = narinfo.parse(data)
        if info.store_path.hash_part != hash_part:
            raise BadInput(f"{self.url} answers {hash_part} with {info.store_path}")
        return info

    async def listing(self, hash_part: str) -> ListingNode | None:
        """What the cache says is in a path; None when it says nothing, or nothing of use."""
        data = await self._whole(f"{hash_part}.ls", listing.MAX_LISTING_SIZE)
        try:
            return None if data is None else listing.parse(data)
        except BadInput:
            return None

    async def nar(self, info: NarInfo) -> AsyncGenerator[bytes, None]:
        """The file of a NAR, as it is compressed, whole. Raises NotFound before the first byte, ServerError."""
        url = self._nar_url(info)
        async for chunk in self._resumed(lambda position: self._rest(url, position), 0):
            yield chunk

    async def part(self, info: NarInfo, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Bytes `start` to `end` (exclusive) of that file, not one more. Raises NoRanges, NotFound or ServerError."""
        url = self._nar_url(info)
        async for chunk in self._resumed(lambda position: self._range(url, position, end), start):
            yield chunk

    async def _resumed(
        self, begin: Callable[[int], AsyncGenerator[bytes, None]], position: int
    ) -> AsyncIterator[bytes]:
        """The chunks of `begin(position)`, begun again where they broke off; all progress counts as a success."""
        attempt = 1
        while attempt:
            try:
                async with aclosing(begin(position)) as chunks:
                    async for chunk in chunks:
                        position, attempt = position + len(chunk), 1
                        yield chunk
                attempt = 0
            except TryAgain as error:
                if attempt >= self._backoff.attempts or error.retry_after > self._backoff.patience:
                    raise
                await asyncio.sleep(self._backoff.delay(attempt, error.retry_after, random.random()))  # noqa: S311  jitter
                attempt += 1

    async def _rest(self, url: str, position: int) -> AsyncGenerator[bytes, None]:
        async with self._answer(url, {"Range": f"bytes={position}-"} if position else {}) as response:
            skip = 0 if response.status == _PARTIAL else position
            async for chunk in response.content.iter_chunked(_CHUNK):
                if len(chunk) > skip:
                    yield chunk[skip:]
                skip = max(0, skip - len(chunk))

    async def _range(self, url: str, position: int, end: int) -> AsyncGenerator[bytes, None]:
        async with self._answer(url, {"Range": f"bytes={position}-{end - 1}"}) as response:
            stated = response.headers.get("Content-Range", "").partition("/")[0]
            if response.status != _PARTIAL or stated != f"bytes {position}-{end - 1}":
                raise NoRanges(f"{self.url} does not send parts of files")
            async for chunk in response.content.iter_chunked(_CHUNK):
                if len(chunk) > end - position:
                    raise ServerError(f"{self.url} sends more of a file than was asked for")
                position += len(chunk)
                yield chunk

    async def _whole(self, name: str, limit: int) -> bytes | None:
        async def once() -> bytes | None:
            try:
                async with self._answer(f"{self.url}/{name}", {}) as response:
                    return await _decoded(response, limit)
            except NotFound:
                return None

        return await retry(once, f"asking {self.url}", self._backoff, ignore)

    @asynccontextmanager
    async def _answer(self, url: str, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with success. What it may be compressed with is not taken off: that is done within limits."""
        headers = {**headers, "Accept-Encoding": "identity", **self._authorization(url)}
        with our_errors(self._address):
            async with self._session.get(
                URL(url, encoded=True), headers=headers, timeout=self._timeout, auto_decompress=False
            ) as response:
                if not 200 <= response.status < 300:
                    raise await self._refusal(response)
                yield response

    def _authorization(self, url: str) -> dict[str, str]:
        if self._token is None or _origin(url) != self._address.origin:
            return {}
        return {"Authorization": f"Bearer {self._token}"}

    async def _refusal(self, response: aiohttp.ClientResponse) -> Exception:
        if response.status in _ABSENT:
            return NotFound(f"there is no {response.url.name} in {self.url}")
        if response.status == _NO_SUCH_RANGE:
            return NoRanges(f"{self.url} has less of {response.url.name} than it says")
        said = said_in(await error_body(response), response.content_type)
        if response.status == 403:
            return NotAllowed(
                f"{self.url} may not be read with the token from {self._tokens}{f': {said}' if said else ''}"
            )
        retry_after = seconds_until(response.headers)
        return refusal(response.status, said, self._address, self._tokens, retry_after=retry_after)

    def _nar_url(self, info: NarInfo) -> str:
        if "://" not in info.url:
            return f"{self.url}/{info.url}"
        try:
            scheme, host, _ = _origin(info.url)
            URL(info.url, encoded=True)
        except ValueError:
            scheme = host = ""
        if scheme not in {"http", "https"} or not host:
            raise ServerError(f"{self.url} has the NAR of {info.store_path} where it cannot be fetched: {info.url}")
        return info.url


@asynccontextmanager
async def open_remote(
    address: Address,
    tokens: TokenSource,
    *,
    connections: int = 2,
    backoff: Backoff | None = None,
    timeouts: Timeouts | None = None,
) -> AsyncIterator[RemoteCache]:
    """Nothing is sent yet. Raises ConfigError when the token or the authorities' certificates cannot be read."""
    async with open_session(address.base, connections) as session:
        yield RemoteCache(session, address, tokens, backoff or PATIENCE, timeouts or Timeouts())


async def _decoded(response: aiohttp.ClientResponse, limit: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK):
        body += chunk
        if len(body) > limit:
            raise ServerError(f"{response.url} has more than {limit} bytes")
    coding = content_coding(response.headers.get("Content-Encoding", ""))
    return bytes(body) if coding == "none" else decompress(coding, bytes(body), limit)


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
