"""A cache as the services see it: its names, its keys and its rules."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from cachesrv.nix import cache_info

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cachesrv.nix.signing import PublicKey, SecretKey


class ReferencePolicy(Enum):
    """Where the references of a path must resolve before it is published."""

    STRICT = "strict"
    """In the cache itself."""
    UPSTREAM = "upstream"
    """In the cache, or in one of its upstreams."""
    ANY = "any"
    """Nowhere: for caches that hold only a part of what their clients use."""


@dataclass(frozen=True)
class DeclaredUpstream:
    """A cache that clients have beside this one; keys in Nix's `name:base64` form. `timeout`: seconds, as for
    `cachesrv.services.http_reader`.
    """

    name: str
    url: str
    public_keys: tuple[str, ...]
    timeout: float

    @property
    def public_url(self) -> str:
        """Its URL as anybody may know it: without the name and password that it may be asked with."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@dataclass(frozen=True)
class ServedCache:
    """`prefix` is where its objects lie in storage, without a slash at the end; empty where nothing else lies there.
    `trusted_keys`, by name: when there are any, a path must be signed by one of them or have a content address that
    holds. `pull_through`: what is not here is fetched from upstream; `bucket_is_authority`: others write to its
    storage too.
    """

    name: str
    prefix: str
    store_dir: str
    root: bool
    public: bool
    priority: int
    want_mass_query: bool
    signing_keys: tuple[SecretKey, ...]
    trusted_keys: Mapping[str, PublicKey]
    references: ReferencePolicy
    pull_through: bool
    bucket_is_authority: bool
    upstreams: tuple[DeclaredUpstream, ...] = ()

    @property
    def completed_by(self) -> tuple[DeclaredUpstream, ...]:
        """Upstreams whose paths need not be pushed here; none where references have to resolve in the cache itself."""
        return () if self.references is ReferencePolicy.STRICT else self.upstreams

    @property
    def info(self) -> bytes:
        """Its `nix-cache-info`."""
        return cache_info.render(cache_info.CacheInfo(self.store_dir, self.want_mass_query, self.priority))

    def key(self, name: str) -> str:
        """The storage key of an object of this cache, such as `nar/…` or `<hash part>.narinfo`."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def narinfo_key(self, hash_part: str) -> str:
        """The storage key of a narinfo."""
        return self.key(f"{hash_part}.narinfo")

    def listing_key(self, hash_part: str) -> str:
        """The storage key of a listing."""
        return self.key(f"{hash_part}.ls")
