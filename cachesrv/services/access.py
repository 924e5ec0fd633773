"""Who may do what: tokens, known by their sha256 only.

They come from the configuration, from the data directory (the push token of the first start) and from the catalog.
Answers are remembered for a short while in bounded memory, so that a request costs one look.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import TYPE_CHECKING

from cachetools import TLRUCache

from cachesrv.errors import NotAllowed, NotAuthenticated

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cachesrv.catalog.base import Catalog

TOKEN_PREFIX = "csrv_"  # noqa: S105  not a secret: what every token begins with, so that scanners find leaked ones
REMEMBERED_SECONDS = 30
"""A token that is revoked is refused after this time at the latest; one that ends by itself, from its end on."""

_REMEMBERED = 4096
_IMPLIED = {"push": ("pull",), "admin": ("pull", "push", "delete")}


@dataclass(frozen=True, slots=True)
class Principal:
    """A token's holder: its name, the caches (globs) and what it may do there; when that ends, in seconds since the
    epoch, if it does.
    """

    name: str
    caches: tuple[str, ...]
    permissions: frozenset[str]
    expires_at: int | None = None

    def may(self, permission: str, cache: str) -> bool:
        """Whether it has this permission, itself or through one that implies it, on this cache."""
        granted = permission in self.permissions or any(
            permission in _IMPLIED.get(held, ()) for held in self.permissions
        )
        return granted and any(fnmatchcase(cache, pattern) for pattern in self.caches)


def new_token() -> str:
    """A token nobody can guess: 256 bits, in characters that need no quoting anywhere."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    """What is kept of a token: its sha256, base-16. A fast hash is enough for what cannot be guessed."""
    return sha256(token.encode()).hexdigest()


class Access:
    """Finds out who holds a token."""

    def __init__(self, fixed: Iterable[tuple[str, Principal]], catalog: Catalog) -> None:
        """`fixed`: pairs of a token's sha256 and its holder."""
        self._fixed = dict(fixed)
        self._catalog = catalog
        self._remembered: TLRUCache[str, Principal | None] = TLRUCache(_REMEMBERED, _forgotten)

    async def require(self, token: str | None, permission: str, cache: str) -> Principal:
        """The holder of the token. Raises NotAuthenticated without a valid one, NotAllowed when it may not do this."""
        if token is None:
            raise NotAuthenticated("this needs a token: put it into netrc as the password, or send it as Bearer")
        principal = await self.holder(token)
        if principal is None:
            raise NotAuthenticated("the token is not valid here: it is mistyped, expired or revoked")
        if not principal.may(permission, cache):
            raise NotAllowed(f"the token {principal.name!r} may not {permission} at {cache}")
        return principal

    async def holder(self, token: str) -> Principal | None:
        """Who holds this token, None when nobody does."""
        digest = token_hash(token)
        if principal := self._fixed.get(digest):
            return principal
        with contextlib.suppress(KeyError):
            # One look: between two of them the entry may end.
            return self._remembered[digest]
        principal = await self._from_catalog(digest)
        self._remembered[digest] = principal
        return principal

    def remembered(self, token: str) -> Principal | None:
        """The holder, if that is known without asking the catalog."""
        digest = token_hash(token)
        return self._fixed.get(digest) or self._remembered.get(digest)

    async def _from_catalog(self, digest: str) -> Principal | None:
        record = await self._catalog.token(digest)
        if record is None or record.revoked_at is not None:
            return None
        if record.expires_at is not None and record.expires_at <= time.time():
            return None
        return Principal(record.name, record.caches, frozenset(record.permissions), record.expires_at)


def _forgotten(_digest: str, principal: Principal | None, now: float) -> float:
    """When to ask for it again, by the clock that `now` is of."""
    if principal is None or principal.expires_at is None:
        return now + REMEMBERED_SECONDS
    return now + min(REMEMBERED_SECONDS, principal.expires_at - time.time())
