"""Leases, locks and notes. Each function runs in one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import bindparam, delete, insert, or_, select, update

from cachesrv.catalog.batches import batches
from cachesrv.catalog.schema import locks, nars, notes, paths
from cachesrv.errors import LockLost

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection

_LEASE = (
    update(paths)
    .where(paths.c.cache == bindparam("of"), paths.c.hash_part.in_(bindparam("hash_parts", expanding=True)))
    .where(or_(paths.c.leased_until.is_(None), paths.c.leased_until < bindparam("until")))
    .values(leased_until=bindparam("until"))
)
_LEASE_NARS = (
    update(nars)
    .where(nars.c.scope == bindparam("of"), nars.c.nar_hash.in_(bindparam("nar_hashes", expanding=True)))
    .where(or_(nars.c.leased_until.is_(None), nars.c.leased_until < bindparam("until")))
    .values(leased_until=bindparam("until"))
)
_LOCK = select(locks.c.holder, locks.c.expires_at).where(locks.c.name == bindparam("name"))
_TAKE = insert(locks)
_SHORTEN = update(locks).where(locks.c.name == bindparam("of")).values(expires_at=bindparam("to"))
_RELEASE = delete(locks).where(locks.c.name == bindparam("of"))
_NOTE = select(notes.c.value).where(notes.c.name == bindparam("name"))
_ADD_NOTE = insert(notes)
_CHANGE_NOTE = update(notes).where(notes.c.name == bindparam("of")).values(value=bindparam("to"))


def lease(connection: Connection, cache: str, hash_parts: Collection[str], until: int) -> None:
    """See `Retention.lease`."""
    for some in batches(hash_parts):
        connection.execute(_LEASE, {"of": cache, "hash_parts": some, "until": until})


def lease_nars(connection: Connection, scope: str, nar_hashes: Collection[str], until: int) -> None:
    """See `Retention.lease_nars`."""
    for some in batches(nar_hashes):
        connection.execute(_LEASE_NARS, {"of": scope, "nar_hashes": some, "until": until})


def lock(connection: Connection, name: str, holder: str, *, now: int, until: int, in_place_of: str | None) -> str:
    """See `Retention.lock`."""
    held = connection.execute(_LOCK, {"name": name}).one_or_none()
    if held and held.holder not in (holder, in_place_of) and held.expires_at > now:
        present: str = held.holder
        if held.expires_at > until > now:
            # Taken by a clock that has been set back since: it would stand until that time comes.
            connection.execute(_SHORTEN, {"of": name, "to": until})
        return present
    connection.execute(_RELEASE, {"of": name})
    connection.execute(_TAKE, {"name": name, "holder": holder, "expires_at": until})
    return holder


def unlock(connection: Connection, name: str, holder: str) -> None:
    """See `Retention.unlock`."""
    held = connection.execute(_LOCK, {"name": name}).one_or_none()
    if held and held.holder == holder:
        connection.execute(_RELEASE, {"of": name})


def demand_lock(connection: Connection, name: str, holder: str) -> None:
    """Raises LockLost unless this holder has it; it may have run out, as long as nobody else has taken it."""
    held = connection.execute(_LOCK, {"name": name}).one_or_none()
    if held is None or held.holder != holder:
        raise LockLost(f"{held.holder if held else 'nobody'} holds the lock {name} now")


def note(connection: Connection, name: str, value: str) -> None:
    """See `Retention.note`."""
    if noted(connection, name) is None:
        connection.execute(_ADD_NOTE, {"name": name, "value": value})
    else:
        connection.execute(_CHANGE_NOTE, {"of": name, "to": value})


def noted(connection: Connection, name: str) -> str | None:
    """See `Retention.noted`."""
    value: str | None = connection.scalar(_NOTE, {"name": name})
    return value
