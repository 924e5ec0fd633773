"""Pins. Each function runs in one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import bindparam, delete, exists, insert, or_, select, update

from cachesrv.catalog.names import split_name
from cachesrv.catalog.retention import Generation, PinRecord
from cachesrv.catalog.schema import generations, names, paths, pins
from cachesrv.errors import NotFound

if TYPE_CHECKING:
    from sqlalchemy import Connection

_PUBLISHED = exists().where(
    paths.c.cache == bindparam("cache"),
    paths.c.hash_part == bindparam("hash_part"),
    names.c.id == paths.c.id,
    names.c.name == bindparam("name"),
)
_FIND = select(pins.c.id).where(pins.c.cache == bindparam("cache"), pins.c.name == bindparam("name"))
_INSERT = insert(pins).returning(pins.c.id)
_UPDATE = (
    update(pins).where(pins.c.id == bindparam("of")).values(keep=bindparam("to_keep"), expires_at=bindparam("expires"))
)
_DELETE = delete(pins).where(pins.c.cache == bindparam("of_cache"), pins.c.name == bindparam("of_name"))
_ALL = select(pins).where(pins.c.cache == bindparam("cache")).order_by(pins.c.name)
_GENERATIONS = select(generations).where(generations.c.pin_id == bindparam("pin_id")).order_by(generations.c.id.desc())
_ADD = insert(generations)
_DROP = delete(generations).where(generations.c.id.in_(bindparam("ids", expanding=True)))
_PINNED = (
    select(paths.c.id)
    .join(generations, generations.c.hash_part == paths.c.hash_part)
    .join(pins, (pins.c.id == generations.c.pin_id) & (pins.c.cache == paths.c.cache))
    .where(pins.c.cache == bindparam("cache"), or_(pins.c.expires_at.is_(None), pins.c.expires_at > bindparam("now")))
)


def pin(
    connection: Connection,
    cache: str,
    name: str,
    base_name: str,
    *,
    keep: int,
    expires_at: int | None,
    at: int,
    by: str,
) -> None:
    """See `Retention.pin`."""
    hash_part, path_name = split_name(base_name)
    if not connection.scalar(select(_PUBLISHED), {"cache": cache, "hash_part": hash_part, "name": path_name}):
        raise NotFound(f"{base_name} is not in the cache {cache}: push it first")
    pin_id = connection.scalar(_FIND, {"cache": cache, "name": name})
    if pin_id is None:
        values = {"cache": cache, "name": name, "keep": keep, "expires_at": expires_at}
        pin_id = connection.scalar(_INSERT, values)
    else:
        connection.execute(_UPDATE, {"of": pin_id, "to_keep": keep, "expires": expires_at})
    known = connection.execute(_GENERATIONS, {"pin_id": pin_id}).all()
    if not known or known[0].hash_part != hash_part:
        connection.execute(_ADD, {"pin_id": pin_id, "hash_part": hash_part, "name": path_name, "at": at, "by": by})
        keep -= 1
    if superseded := [row.id for row in known[keep:]]:
        connection.execute(_DROP, {"ids": superseded})


def unpin(connection: Connection, cache: str, name: str) -> bool:
    """See `Retention.unpin`."""
    return connection.execute(_DELETE, {"of_cache": cache, "of_name": name}).rowcount > 0


def find_all(connection: Connection, cache: str) -> list[PinRecord]:
    """See `Retention.pins`."""
    return [
        PinRecord(
            cache=row.cache,
            name=row.name,
            keep=row.keep,
            expires_at=row.expires_at,
            generations=tuple(
                Generation(f"{generation.hash_part}-{generation.name}", generation.at, generation.by)
                for generation in connection.execute(_GENERATIONS, {"pin_id": row.id})
            ),
        )
        for row in connection.execute(_ALL, {"cache": cache}).all()
    ]


def pinned(connection: Connection, cache: str, now: int) -> set[int]:
    """See `Retention.pinned`."""
    return set(connection.scalars(_PINNED, {"cache": cache, "now": now}))
