"""The objects of a binary cache over HTTP; see `cachesrv.services.upstream.Reader`."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urljoin

import aiohttp

from cachesrv.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_GONE = (404, 410)
_CHUNK = 256 * 1024


class HttpReader:
    """`session` is shared, and closed by its owner; `timeout` in seconds, to connect and between two chunks."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, timeout: float) -> None:
        self._session = session
        self._base = url.rstrip("/") + "/"
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)

    async def get(self, name: str, limit: int) -> bytes | None:
        """See Reader."""
        try:
            async with self._session.get(urljoin(self._base, name), timeout=self._timeout) as response:
                if response.status in _GONE:
                    return None
                _check(response, 200)
                data = await response.content.read(limit + 1)
                while len(data) <= limit and (more := await response.content.read(limit + 1 - len(data))):
                    data += more
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise _failed(error) from error
        if len(data) > limit:
            raise PeerError(f"{name} has more than {limit} bytes")
        return data

    async def size(self, name: str) -> int | None:
        """See Reader."""
        try:
            async with self._session.head(
                urljoin(self._base, name), timeout=self._timeout, allow_redirects=True
            ) as response:
                if response.status in _GONE:
                    return None
                _check(response, 200)
                return response.content_length
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise _failed(error) from error

    async def read(self, name: str, start: int) -> AsyncGenerator[bytes, None]:
        """See Reader."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            async with self._session.get(urljoin(self._base, name), headers=headers, timeout=self._timeout) as response:
                _check(response, 206 if start else 200)
                async for chunk in response.content.iter_chunked(_CHUNK):
                    yield chunk
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise _failed(error) from error


def _check(response: aiohttp.ClientResponse, wanted: int) -> None:
    """403 and 401 are no absence: they may mean that we lack credentials, or that somebody in between has a say."""
    if response.status != wanted:
        raise PeerError(f"it answered {response.status} {response.reason}")


def _failed(error: Exception) -> PeerError:
    return PeerError(str(error) or f"it did not answer in time ({type(error).__name__})")
