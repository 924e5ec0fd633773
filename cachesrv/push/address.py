"""Where a cache is: the URL that people write, taken apart.

    http://host:5000/main           the cache `main` of the server at http://host:5000
    https://host/some/prefix/main   the same behind a proxy that mounts the server below /some/prefix
    http://host:5000                the cache `main`: the root cache of a server that was configured no further

A server that marks another cache as root is named with that cache at the end.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from cachesrv.api import cache_url
from cachesrv.errors import ConfigError

ROOT_CACHE = "main"

_cache_name = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,62}").fullmatch
_plain_path = re.compile(r"[!-$&-~]*").fullmatch  # nothing that would have to be quoted
_sendable_path = re.compile(r"[!-~]*").fullmatch
_host_name = re.compile(r"([0-9a-z_-]{1,63}\.)*[0-9a-z_-]{1,63}\.?").fullmatch


@dataclass(frozen=True, slots=True)
class Address:
    """`base` is the server's URL without a trailing slash."""

    base: str
    cache: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises ConfigError for what is no such URL, never repeating a password in it."""
        parts = split_url(url)
        if parts.username is not None or parts.password is not None:
            raise ConfigError("the URL holds a user or password: put the token in a file (--token-file) or in netrc")
        if parts.query or parts.fragment or not _plain_path(parts.path):
            raise ConfigError(f"not the URL of a cache, it has more than host and path: {url}")
        prefix, _, name = parts.path.rstrip("/").rpartition("/")
        if name and not _cache_name(name):
            raise ConfigError(f"not the URL of a cache, {name!r} cannot be the name of one: {url}")
        return cls(f"{parts.scheme}://{parts.netloc}{prefix}", name or ROOT_CACHE)

    @property
    def url(self) -> str:
        """As a substituter."""
        return f"{self.base}/{self.cache}"

    @property
    def host(self) -> str:
        """In lower case, without port or brackets."""
        return urlsplit(self.base).hostname or ""

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port: what a token belongs to."""
        parts = urlsplit(self.base)
        return parts.scheme, self.host, parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def is_loopback(self) -> bool:
        """Whether it can be no other machine than this one."""
        if self.host == "localhost" or self.host.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def api(self, action: str = "") -> str:
        """URL of an action of the push API."""
        return cache_url(self.base, self.cache, action)

    def nar(self, nar_hash: str) -> str:
        """Where the NAR with this hash (bare nix32) is put."""
        return f"{self.url}/nar/{nar_hash}.nar.zst"

    def __str__(self) -> str:
        return self.url


def split_url(url: str) -> SplitResult:
    """Raises ConfigError for what has no scheme, host and port at which a cache could be asked."""
    try:
        parts = urlsplit(url)
        port_is_sane = parts.port != 0
    except ValueError:
        port_is_sane = False
    if not port_is_sane:
        raise ConfigError("not a URL: host or port cannot be read")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        hint = "it has to begin with http:// or https://, such as http://127.0.0.1:5000/main"
        raise ConfigError(f"not the URL of a cache: {hint}" if "@" in url else f"not the URL of a cache: {url}: {hint}")
    if not _is_host(parts.hostname):
        raise ConfigError(f"not the URL of a cache: {parts.hostname!r} cannot be the name of a host")
    if not _sendable_path(parts.path):
        raise ConfigError(f"not the URL of a cache: {parts.path!r} has to be written with %, as `%20` for a space")
    return parts


def _is_host(name: str) -> bool:
    """Whether it can be looked up; `name` is in lower case and without brackets."""
    if ":" in name:
        try:
            ipaddress.IPv6Address(name)
        except ValueError:
            return False
        return True
    try:
        encoded = name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        return False
    return bool(_host_name(encoded))
