"""The objects of a binary cache over HTTP; see `cachesrv.services.upstream.Reader`."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import aiohttp
from yarl import URL

from cachesrv.errors import PeerError, PeerUnavailable
from cachesrv.services.circle import Circle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

_GONE = (404, 410)
_NO_HEAD = (403, 405, 501)
"""Statuses by which HEAD is refused where GET may not be: a presigned URL is good for one of them alone."""
_PASSING = (408, 425, 429)
"""Statuses below 500 that say that it may go well another time."""
_CHUNK = 256 * 1024
_PACE_BYTES = 16 * 1024
"""A transfer has to bring so many bytes (or its end) in each time-out: what waits for it cannot wait for ever."""
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-")


class HttpReader:
    """`session` is shared, and closed by its owner; `timeout` in seconds: for a connection, for a small answer, and for
    each bit of progress of a large one. `circle`: as whom it asks.
    """

    def __init__(
        self, session: aiohttp.ClientSession, url: str, *, timeout: float, circle: Circle | None = None
    ) -> None:
        self._circle = circle or Circle()
        self._session = session
        self._base = url.rstrip("/") + "/"
        self._timeout = timeout
        self._short = aiohttp.ClientTimeout(total=timeout)
        self._long = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)

    async def get(self, name: str, limit: int) -> bytes | None:
        """See Reader."""
        with self._in_words():
            async with self._session.get(
                self._url(name), headers=self._circle.fields(), timeout=self._short
            ) as response:
                if response.status in _GONE:
                    self._circle.heed(response.headers)
                    return None
                _check(response, 200)
                data = bytearray()
                async for chunk in response.content.iter_chunked(_CHUNK):
                    data += chunk
                    if len(data) > limit:
                        raise PeerError(f"{name} has more than {limit} bytes")
                return bytes(data)

    async def size(self, name: str) -> int | None:
        """See Reader."""
        with self._in_words():
            headers = _AS_IT_IS | self._circle.fields()
            async with self._session.head(
                self._url(name), headers=headers, timeout=self._short, allow_redirects=True
            ) as response:
                if response.status in _GONE or response.status in _NO_HEAD:
                    return None
                _check(response, 200)
                return response.content_length

    async def read(self, name: str, start: int) -> AsyncGenerator[bytes, None]:
        """See Reader."""
        headers = _AS_IT_IS | self._circle.fields() | ({"Range": f"bytes={start}-"} if start else {})
        with self._in_words():
            async with self._session.get(self._url(name), headers=headers, timeout=self._long) as response:
                superfluous = _skipped(response, start)
                async for chunk in self._paced(response):
                    if len(chunk) > superfluous:
                        yield chunk[superfluous:]
                    superfluous = max(0, superfluous - len(chunk))

    async def _paced(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """The body as it comes, as long as it comes forward. Time that its reader takes does not count."""
        left, received = self._timeout, 0
        while True:
            begun = time.monotonic()
            async with asyncio.timeout(left):
                chunk = await response.content.read(_CHUNK)
            if not chunk:
                return
            left -= time.monotonic() - begun
            received += len(chunk)
            if received >= _PACE_BYTES:
                left, received = self._timeout, 0
            yield chunk

    def _url(self, name: str) -> URL:
        return URL(urljoin(self._base, name), encoded=True)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise PeerUnavailable(f"it did not answer within {self._timeout:g} s") from error
        except aiohttp.ClientConnectionError as error:
            # A certificate that does not hold is a ValueError too, and no matter of the address.
            raise PeerUnavailable(str(error) or type(error).__name__) from error
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, ValueError) as error:
            raise PeerError(f"its address cannot be used: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise PeerUnavailable(str(error) or type(error).__name__) from error


_AS_IT_IS = {"Accept-Encoding": "identity"}


def _check(response: aiohttp.ClientResponse, wanted: int) -> None:
    """403 and 401 are no absence: they may mean that we lack credentials, or that somebody in between has a say."""
    if response.status == wanted:
        return
    said = f"it answered {response.status} {response.reason}"
    if response.status >= 500 or response.status in _PASSING:
        raise PeerUnavailable(said, after=_seconds(response.headers.get("Retry-After", "")))
    raise PeerError(said)


def _skipped(response: aiohttp.ClientResponse, start: int) -> int:
    """How many bytes come before those that were asked for: all, from a server that knows no ranges."""
    if response.status == 200:
        return start
    _check(response, 206)
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if not match or int(match[1]) > start:
        raise PeerError(f"it was asked for the bytes from {start} on, and sent others")
    return start - int(match[1])


def _seconds(retry_after: str) -> float:
    """What a `Retry-After` asks for, a number of seconds or a date; 0 when it cannot be read."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
