"""Tokens, known by their hashes only. Each function runs in one transaction."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, insert, select, update

from cachesrv.catalog.base import TokenRecord
from cachesrv.catalog.schema import tokens
from cachesrv.errors import Conflict

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row


_GOOD = (tokens.c.name == bindparam("of")) & tokens.c.revoked_at.is_(None)

_FIND = select(tokens).where(tokens.c.sha256 == bindparam("sha256"))
_ALL = select(tokens).order_by(tokens.c.name, tokens.c.created_at, tokens.c.sha256)
_GOOD_NAMED = select(tokens.c.sha256).where(_GOOD)
_INSERT = insert(tokens)
_REVOKE = update(tokens).where(_GOOD).values(revoked_at=bindparam("at"))


def put(connection: Connection, record: TokenRecord) -> None:
    """See `Catalog.put_token`."""
    known = find(connection, record.sha256)
    if known == record:
        return
    if known is not None:
        raise Conflict(f"this token is there already, as {known.name}: make a new one")
    if record.revoked_at is None and connection.execute(_GOOD_NAMED, {"of": record.name}).first():
        raise Conflict(f"there is a token named {record.name} already: revoke it first, or choose another name")
    connection.execute(_INSERT, asdict(record))


def find(connection: Connection, sha256: str) -> TokenRecord | None:
    """See `Catalog.token`."""
    row = connection.execute(_FIND, {"sha256": sha256}).one_or_none()
    return None if row is None else _record(row)


def find_all(connection: Connection) -> list[TokenRecord]:
    """See `Catalog.tokens`."""
    return [_record(row) for row in connection.execute(_ALL)]


def revoke(connection: Connection, name: str, at: int) -> bool:
    """See `Catalog.revoke_token`."""
    return connection.execute(_REVOKE, {"of": name, "at": at}).rowcount > 0


def _record(row: Row[Any]) -> TokenRecord:
    fields = row._asdict()
    return TokenRecord(**fields | {"caches": tuple(fields["caches"]), "permissions": tuple(fields["permissions"])})
