"""HTTP as the uploader uses it: one session, and the client library's errors as ours."""

from __future__ import annotations

import os
import ssl
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.request import getproxies, proxy_bypass

import aiohttp

from cachesrv.errors import ConfigError, ServerError
from cachesrv.push.retry import TryAgain, Unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cachesrv.push.address import Address

_CA_FILES = ("NIX_SSL_CERT_FILE", "SSL_CERT_FILE")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds. connect: until there is a connection, TLS included; answer: until an answer begins, and between
    its parts; stall: until the server has taken a little more of a NAR; store: that it may take for a NAR that it has
    in full, to check it and to sync it to disk. There is none for a NAR as a whole.
    """

    connect: float = 30.0
    answer: float = 120.0
    stall: float = 60.0
    store: float = 300.0

    @property
    def for_answers(self) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=None, sock_connect=self.connect, sock_read=self.answer)

    @property
    def for_nars(self) -> aiohttp.ClientTimeout:
        """Without `stall` and `store`, which the library does not know."""
        return aiohttp.ClientTimeout(total=None, sock_connect=self.connect, sock_read=None)


def open_session(address: Address, connections: int) -> aiohttp.ClientSession:
    """A session for at most so many connections at once, without cookies or a netrc of its own.

    Proxies come from `http_proxy`, `https_proxy` and `no_proxy`, certificates of authorities from
    `$NIX_SSL_CERT_FILE` or `$SSL_CERT_FILE`, else from where OpenSSL has them.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, ssl=_tls(address, os.environ)),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": "cachesrv-push"},
        proxy=_proxy(address),
    )


@contextmanager
def our_errors(address: Address) -> Iterator[None]:
    """Turn what goes wrong on the way to the server and back into TryAgain, Unreachable or ServerError."""
    try:
        yield
    except aiohttp.ClientSSLError as error:
        raise ServerError(f"no TLS connection to {address}: {_tls_reason(error)}") from error
    except aiohttp.ClientConnectorError as error:
        raise Unreachable(f"{address} cannot be reached: {_reason(error)}") from error
    except aiohttp.ConnectionTimeoutError as error:
        raise Unreachable(f"{address} cannot be reached: it does not answer to a connection") from error
    except TimeoutError as error:
        raise TryAgain(f"{address} has gone silent") from error
    except aiohttp.ClientResponseError as error:
        raise ServerError(f"{address} does not speak HTTP as expected: {error.message}") from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
        raise TryAgain(f"the connection to {address} broke ({type(error).__name__})") from error
    except aiohttp.ClientError as error:
        raise ServerError(f"{address} cannot be asked ({type(error).__name__})") from error


def _tls(address: Address, environ: Mapping[str, str]) -> ssl.SSLContext | bool:
    if not address.base.startswith("https:"):
        return True
    authorities = next((environ[name] for name in _CA_FILES if environ.get(name)), None)
    try:
        return ssl.create_default_context(cafile=authorities)
    except OSError as error:
        raise ConfigError(f"the certificates of authorities in {authorities} cannot be read: {error}") from error


def _proxy(address: Address) -> str | None:
    if proxy_bypass(address.host):
        return None
    return getproxies().get(address.origin[0])


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
