"""NARs without users, and objects on their way out of storage. Each function runs in one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Integer, bindparam, cast, delete, exists, func, insert, null, or_, select, union_all

from cachesrv.catalog.batches import batches
from cachesrv.catalog.leases import demand_lock, note, noted
from cachesrv.catalog.paths import present
from cachesrv.catalog.retention import MAINTENANCE, UnusedNar
from cachesrv.catalog.schema import doomed, nars, paths, released
from cachesrv.errors import BeingRemoved

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from sqlalchemy import BindParameter, Connection

PAGE = 500
_FENCE = "fence"

_NOT_LEASED = or_(nars.c.leased_until.is_(None), nars.c.leased_until <= bindparam("now"))
_BEFORE: BindParameter[int] = bindparam("before")
# Of a NAR that was found by a reindex there is no record, only the note that a path let go of it.
_UNUSED = (
    union_all(
        select(nars.c.key, nars.c.file_size, func.coalesce(released.c.at, nars.c.verified_at).label("since"))
        .outerjoin(released, released.c.key == nars.c.key)
        .where(
            nars.c.key > bindparam("after"),
            nars.c.key < bindparam("end"),
            nars.c.verified_at < _BEFORE,
            or_(released.c.at.is_(None), released.c.at < _BEFORE),
            _NOT_LEASED,
            ~exists().where(paths.c.nar_key == nars.c.key),
        ),
        select(released.c.key, cast(null(), Integer), released.c.at).where(
            released.c.key > bindparam("after"),
            released.c.key < bindparam("end"),
            released.c.at < _BEFORE,
            ~exists().where(nars.c.key == released.c.key),
            ~exists().where(paths.c.nar_key == released.c.key),
        ),
    )
    .order_by("key")
    .limit(PAGE)
)
_KEYS: BindParameter[str] = bindparam("keys", expanding=True)
_USED = select(paths.c.nar_key).where(paths.c.nar_key.in_(_KEYS)).distinct()
_FRESH = select(nars.c.key).where(
    nars.c.key.in_(_KEYS), or_(nars.c.verified_at >= _BEFORE, nars.c.leased_until > bindparam("now"))
)
_VERIFIED = select(nars.c.key).where(nars.c.key.in_(_KEYS))
_RELEASED = select(released.c.key).where(released.c.key.in_(_KEYS))
_LATELY_RELEASED = select(released.c.key).where(released.c.key.in_(_KEYS), released.c.at >= _BEFORE)
_FORGET = delete(nars).where(nars.c.key.in_(_KEYS))
_FORGET_RELEASED = delete(released).where(released.c.key.in_(_KEYS))
_RELEASE = insert(released)
_DOOM = insert(doomed)
_DOOMED = select(doomed.c.key).where(doomed.c.key.in_(_KEYS))
_SOME_DOOMED = select(doomed.c.key).order_by(doomed.c.id).limit(PAGE)
_SETTLE = delete(doomed).where(doomed.c.key.in_(_KEYS))


def unused(connection: Connection, scope: str, before: int, now: int, after: str) -> list[UnusedNar]:
    """See `Retention.unused_nars`."""
    # The character after "/" is "0": these are the keys that begin with the scope.
    keys = {"after": after or f"{scope}/", "end": f"{scope}0"}
    rows = connection.execute(_UNUSED, {"before": before, "now": now, **keys})
    return [UnusedNar(key, size or 0, since) for key, size, since in rows]


def strays(connection: Connection, keys: Collection[str]) -> set[str]:
    """See `Retention.stray_nars`."""
    left = set(keys)
    for some in batches(keys):
        for query in (_USED, _VERIFIED, _RELEASED, _DOOMED):
            left.difference_update(connection.scalars(query, {"keys": some}))
    return left


def release_strays(connection: Connection, keys: Collection[str], at: int) -> set[str]:
    """See `Retention.release_strays`."""
    left = strays(connection, keys)
    release(connection, left, at)
    return left


def doom_nars(connection: Connection, keys: Collection[str], *, holder: str, before: int, now: int) -> list[str]:
    """See `Retention.doom`."""
    demand_lock(connection, MAINTENANCE, holder)
    going: list[str] = []
    for some in batches(keys):
        values = {"keys": some, "before": before, "now": now}
        needed = {key for query in (_USED, _FRESH, _LATELY_RELEASED) for key in connection.scalars(query, values)}
        unneeded = [key for key in some if key not in needed]
        if unneeded:
            connection.execute(_FORGET, {"keys": unneeded})
            doom(connection, unneeded)
            going += unneeded
    return going


def doom_damaged(connection: Connection, keys: Collection[str], *, holder: str) -> list[str]:
    """See `Retention.doom_damaged`."""
    demand_lock(connection, MAINTENANCE, holder)
    used = {key for some in batches(keys) for key in connection.scalars(_USED, {"keys": some})}
    going = sorted(set(keys) - used)
    for some in batches(going):
        connection.execute(_FORGET, {"keys": some})
    doom(connection, going)
    return going


def doom_unpublished(
    connection: Connection, caches: Collection[str], objects: Mapping[str, Collection[str]], *, holder: str
) -> list[str]:
    """See `Retention.doom_unpublished`."""
    demand_lock(connection, MAINTENANCE, holder)
    published = {hash_part for cache in caches for hash_part in present(connection, cache, objects)}
    going = [key for hash_part, keys in objects.items() if hash_part not in published for key in keys]
    doom(connection, going)
    return going


def doom(connection: Connection, keys: Collection[str]) -> None:
    """Note that these objects are about to be deleted, in this order."""
    known: set[str] = set()
    for some in batches(keys):
        connection.execute(_FORGET_RELEASED, {"keys": some})
        known.update(connection.scalars(_DOOMED, {"keys": some}))
    if new := [{"key": key} for key in keys if key not in known]:
        connection.execute(_DOOM, new)


def release(connection: Connection, keys: Collection[str], at: int) -> None:
    """Note that paths have let go of these NARs."""
    for some in batches(keys):
        connection.execute(_FORGET_RELEASED, {"keys": some})
        connection.execute(_RELEASE, [{"key": key, "at": at} for key in some])


def demand_undoomed(connection: Connection, keys: Collection[str]) -> None:
    """Raises BeingRemoved when one of these objects is about to be deleted."""
    for some in batches(keys):
        if key := connection.scalar(_DOOMED, {"keys": some}):
            raise BeingRemoved(f"{key} is just being removed; try again in a moment")


def some_doomed(connection: Connection) -> list[str]:
    """See `Retention.doomed`."""
    return list(connection.scalars(_SOME_DOOMED))


def settle(connection: Connection, keys: Collection[str]) -> None:
    """See `Retention.settle`."""
    for some in batches(keys):
        connection.execute(_SETTLE, {"keys": some})
    note(connection, _FENCE, str(fence(connection) + 1))


def fence(connection: Connection, objects: Collection[str] = ()) -> int:
    """See `Retention.fence`."""
    demand_undoomed(connection, objects)
    return int(noted(connection, _FENCE) or 0)
