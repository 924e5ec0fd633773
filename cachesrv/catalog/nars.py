"""Verified NARs. Each function runs in one transaction."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, delete, insert, null, select, update

from cachesrv.catalog.base import NarRecord
from cachesrv.catalog.batches import batches
from cachesrv.catalog.doom import demand_undoomed, fence
from cachesrv.catalog.schema import nars

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection, Row


_NAMES = [field.name for field in fields(NarRecord)]
_COLUMNS = [nars.c[name] for name in _NAMES]

_FIND = select(*_COLUMNS).where(nars.c.key == bindparam("key"))
_THERE = select(*_COLUMNS, nars.c.leased_until).where(nars.c.key.in_(bindparam("keys", expanding=True)))
_BY_HASH = (
    select(*(null().label(column.name) if column is nars.c.listing else column for column in _COLUMNS))
    .where(nars.c.scope == bindparam("scope"), nars.c.nar_hash.in_(bindparam("nar_hashes", expanding=True)))
    .order_by(nars.c.verified_at, nars.c.key)
)
_KNOWN = select(nars.c.key).where(nars.c.key.in_(bindparam("keys", expanding=True)))
_LISTINGS = select(nars.c.key, nars.c.listing).where(
    nars.c.key.in_(bindparam("keys", expanding=True)), nars.c.listing.is_not(None)
)
_INSERT = insert(nars)
_DROP_LISTINGS = (
    update(nars)
    .where(nars.c.key.in_(bindparam("keys", expanding=True)), nars.c.listing.is_not(None))
    .values(listing=null())
)
_DELETE = delete(nars).where(nars.c.key.in_(bindparam("keys", expanding=True)))


def put(connection: Connection, records: Collection[NarRecord], leased_until: int | None) -> int:
    """See `Catalog.put_nars`."""
    by_key = {record.key: record for record in records}
    demand_undoomed(connection, by_key)
    leases: dict[str, int | None] = dict.fromkeys(by_key, leased_until)
    changed: list[str] = []
    for some in batches(by_key):
        for row in connection.execute(_THERE, {"keys": some}):
            *values, before = row
            lease = max(before or 0, leased_until or 0) or None
            if lease == before and NarRecord(*values) == by_key[row.key]:
                del by_key[row.key]
            else:
                leases[row.key] = lease
                changed.append(row.key)
    remove(connection, changed)
    if by_key:
        rows = [{**_values(record), "leased_until": leases[key]} for key, record in by_key.items()]
        connection.execute(_INSERT, rows)
    return fence(connection)


def find(connection: Connection, key: str) -> NarRecord | None:
    """See `Catalog.nar`."""
    row = connection.execute(_FIND, {"key": key}).one_or_none()
    return None if row is None else _record(row)


def by_hash(connection: Connection, scope: str, nar_hashes: Collection[str]) -> dict[str, NarRecord]:
    """See `Catalog.nars_by_hash`."""
    found: dict[str, NarRecord] = {}
    for some in batches(nar_hashes):
        for row in connection.execute(_BY_HASH, {"scope": scope, "nar_hashes": some}):
            found.setdefault(row.nar_hash, _record(row))
    return found


def alike(connection: Connection, scope: str, nar_hash: str) -> list[NarRecord]:
    """See `Catalog.nars_alike`."""
    return [_record(row) for row in connection.execute(_BY_HASH, {"scope": scope, "nar_hashes": [nar_hash]})]


def listings(connection: Connection, keys: Collection[str]) -> dict[str, bytes]:
    """See `Catalog.listings`."""
    return {row.key: row.listing for some in batches(keys) for row in connection.execute(_LISTINGS, {"keys": some})}


def known(connection: Connection, keys: Collection[str]) -> set[str]:
    """Those of them that were verified."""
    return {key for some in batches(keys) for key in connection.scalars(_KNOWN, {"keys": some})}


def drop_listings(connection: Connection, keys: Collection[str]) -> None:
    """Keep the listings of these NARs no longer."""
    for some in batches(keys):
        connection.execute(_DROP_LISTINGS, {"keys": some})


def remove(connection: Connection, keys: Collection[str]) -> None:
    """See `Catalog.remove_nars`."""
    for some in batches(keys):
        connection.execute(_DELETE, {"keys": some})


def _values(record: NarRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in _NAMES}


def _record(row: Row[Any]) -> NarRecord:
    return NarRecord(**row._asdict())
