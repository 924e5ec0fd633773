"""Tokens as the administrator sees them: those of the catalog, which are made and revoked here, and those that the
configuration and the data directory add to them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from cachesrv.catalog.base import TokenRecord
from cachesrv.errors import ConfigError, Conflict, NotFound
from cachesrv.services.access import new_token, token_hash

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cachesrv.catalog.base import Catalog
    from cachesrv.config import Config

PUSH_TOKEN = "push-token"  # noqa: S105  the name of one
CONFIGURATION = "configuration"
DATA_DIRECTORY = "data directory"
CATALOG = "catalog"


class KnownToken(msgspec.Struct, frozen=True):
    """`state` is good, expired or revoked; `source` is where it stands; times in seconds since the epoch."""

    name: str
    state: str
    caches: Sequence[str]
    permissions: Sequence[str]
    source: str
    created_at: int | None = None
    expires_at: int | None = None
    revoked_at: int | None = None


async def create(
    catalog: Catalog,
    config: Config,
    name: str,
    *,
    caches: Sequence[str],
    permissions: Sequence[str],
    lifetime: int | None,
) -> str:
    """A new token, of which only the hash is kept; `lifetime` in seconds, None for no end. Raises Conflict when the
    name is in use.
    """
    if any(name == token.name for token in _fixed(config)):
        raise Conflict(f"there is a token named {name} already: choose another name")
    token, now = new_token(), int(time.time())
    record = TokenRecord(
        name=name,
        sha256=token_hash(token),
        caches=tuple(dict.fromkeys(caches)),
        permissions=tuple(dict.fromkeys(permissions)),
        created_at=now,
        expires_at=None if lifetime is None else now + lifetime,
        revoked_at=None,
    )
    await catalog.put_token(record)
    return token


async def known(catalog: Catalog, config: Config) -> list[KnownToken]:
    """All tokens, those that are no longer good too."""
    return [*_fixed(config), *(_known(record, time.time()) for record in await catalog.tokens())]


async def revoke(catalog: Catalog, config: Config, name: str) -> None:
    """Make a token of the catalog worthless. Raises NotFound when there is none, ConfigError for one kept elsewhere."""
    if await catalog.revoke_token(name, int(time.time())):
        return
    for token in _fixed(config):
        if token.name == name and token.source == DATA_DIRECTORY:
            raise ConfigError(
                f"{name} is a file in the data directory: remove it and restart the server, which makes another"
            )
        if token.name == name:
            raise ConfigError(f"{name} stands in the configuration: remove it there, and reload the server by SIGHUP")
    raise NotFound(f"there is no good token named {name}")


def _fixed(config: Config) -> Iterator[KnownToken]:
    yield KnownToken(PUSH_TOKEN, "good", ("*",), ("pull", "push"), DATA_DIRECTORY)
    for token in config.token:
        yield KnownToken(token.name, "good", token.caches, token.permissions, CONFIGURATION)


def _known(record: TokenRecord, now: float) -> KnownToken:
    expired = record.expires_at is not None and record.expires_at <= now
    return KnownToken(
        name=record.name,
        state="revoked" if record.revoked_at is not None else "expired" if expired else "good",
        caches=record.caches,
        permissions=record.permissions,
        source=CATALOG,
        created_at=record.created_at,
        expires_at=record.expires_at,
        revoked_at=record.revoked_at,
    )
