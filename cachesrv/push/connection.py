"""What all connections of the uploader have in common: how long they may take, and whom they trust."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachesrv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Mapping

    Body = Callable[[], AsyncIterable["Chunk"]]
    """What is sent, each time from the start."""

Chunk = bytes | memoryview

USER_AGENT = "cachesrv-push"

MAX_ERROR_SIZE = 64 * 1024
"""Bytes of an answer without success, of which more are not looked at."""

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


def tls(environ: Mapping[str, str]) -> ssl.SSLContext:
    """Trusts the authorities in `$NIX_SSL_CERT_FILE` or `$SSL_CERT_FILE`, else those where OpenSSL has them. Raises
    ConfigError.
    """
    authorities = next((environ[name] for name in _CA_FILES if environ.get(name)), None)
    try:
        return ssl.create_default_context(cafile=authorities)
    except OSError as error:
        raise ConfigError(f"the certificates of authorities in {authorities} cannot be read: {error}") from error


def may_need_proxy(environ: Mapping[str, str]) -> bool:
    """Whether somebody has said anything about proxies."""
    return any(value and name.lower().endswith("_proxy") for name, value in environ.items())
