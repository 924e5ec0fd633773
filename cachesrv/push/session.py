"""HTTP by the library: one session for all that is sent, and the library's errors as ours. It takes long to load."""

from __future__ import annotations

import asyncio
import os
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from cachesrv.errors import ConfigError, ServerError
from cachesrv.push.connection import MAX_ERROR_SIZE, USER_AGENT, tls
from cachesrv.push.retry import Broken, TryAgain, Unreachable

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterator

    from cachesrv.push.connection import Chunk, Timeouts

_PROXY_PASSWORD = 407


def for_answers(timeouts: Timeouts) -> aiohttp.ClientTimeout:
    """For what is answered soon."""
    return aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect, sock_read=timeouts.answer)


def for_nars(timeouts: Timeouts) -> aiohttp.ClientTimeout:
    """Without `stall` and `store`, which the library does not know."""
    return aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect, sock_read=None)


def open_session(
    url: str, connections: int, *, keep: bool = True, trace: aiohttp.TraceConfig | None = None
) -> aiohttp.ClientSession:
    """A session for at most so many connections at once to the host of this URL, without cookies or a netrc of its own;
    `keep` them for the next requests.

    Proxies come from `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy`, certificates of authorities from
    `$NIX_SSL_CERT_FILE` or `$SSL_CERT_FILE`, else from where OpenSSL has them. Raises ConfigError.
    """
    trusted = tls(os.environ) if url.startswith("https:") else True
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, ssl=trusted, force_close=not keep),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": USER_AGENT},
        proxy=_proxy(url),
        trace_configs=[trace] if trace else None,
    )


@contextmanager
def our_errors(address: object) -> Iterator[None]:
    """Turn what goes wrong on the way to a server and back into Broken, Unreachable or ServerError; `address` is
    how people call it.
    """
    try:
        yield
    except aiohttp.ClientSSLError as error:
        raise ServerError(f"no TLS connection to {address}: {_tls_reason(error)}") from error
    except aiohttp.ClientProxyConnectionError as error:
        raise Unreachable(f"the proxy before {address} cannot be reached: {_reason(error)}") from error
    except aiohttp.ClientConnectorError as error:
        raise Unreachable(f"{address} cannot be reached: {_reason(error)}") from error
    except aiohttp.ConnectionTimeoutError as error:
        raise Unreachable(f"{address} cannot be reached: it does not answer to a connection") from error
    except TimeoutError as error:
        raise Broken(f"{address} has gone silent") from error
    except aiohttp.ClientHttpProxyError as error:
        raise _proxy_refusal(address, error.status) from error
    except aiohttp.ClientResponseError as error:
        raise ServerError(f"{address} does not speak HTTP as expected: {error.message}") from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
        raise Broken(f"the connection to {address} broke ({type(error).__name__})") from error
    except aiohttp.ClientError as error:
        raise ServerError(f"{address} cannot be asked ({type(error).__name__})") from error


async def watched(chunks: AsyncIterable[Chunk], deadline: asyncio.Timeout, timeouts: Timeouts) -> AsyncIterator[Chunk]:
    """The chunks; the deadline runs while the server is to move, and rests while we are."""
    now = asyncio.get_running_loop().time
    async for chunk in chunks:
        deadline.reschedule(now() + timeouts.stall)
        yield chunk
        deadline.reschedule(None)
    deadline.reschedule(now() + timeouts.store)


async def error_body(response: aiohttp.ClientResponse) -> bytes:
    """What of it can be had: who does not want a body may end the connection after the first words."""
    try:
        return await response.content.read(MAX_ERROR_SIZE)
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError):
        return b""


def _proxy(url: str) -> str | None:
    parts, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy is None or proxy_bypass(parts.hostname or ""):
        return None
    if "://" not in proxy:
        return f"http://{proxy}"
    if not proxy.startswith(("http://", "https://")):
        kind = proxy.partition("://")[0]
        raise ConfigError(f"{parts.scheme}_proxy or all_proxy names a proxy of the kind {kind}: only http:// will do")
    return proxy


def _proxy_refusal(address: object, status: int) -> ServerError:
    words = f"the proxy before {address} answered with status {status}"
    if status == _PROXY_PASSWORD:
        return ServerError(f"{words}: it wants a user and a password, http://user:password@host in https_proxy")
    return TryAgain(words) if status >= 500 else ServerError(words)


def _reason(error: aiohttp.ClientConnectorError) -> str:
    """The system's words; those of asyncio name nothing but the address."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return str(error.strerror or error.os_error)  # of the resolver, whose numbers are negative


def _tls_reason(error: aiohttp.ClientSSLError) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        cause: Exception = error.certificate_error
    else:
        cause = error.os_error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"{cause.verify_message} (set SSL_CERT_FILE when the authority is your own)"
    return str(getattr(cause, "reason", None) or cause)
