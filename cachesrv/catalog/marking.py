"""Paths by their numbers, which are the ids of their names: what is needed to decide what may go.

Each function runs in one transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import bindparam, case, func, select

from cachesrv.catalog.batches import batches, by_hash_part
from cachesrv.catalog.retention import PathSummary, PathUse
from cachesrv.catalog.schema import names, paths, refs

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection

PAGE = 10_000

_USED_AT = case((paths.c.last_used_at > paths.c.registered_at, paths.c.last_used_at), else_=paths.c.registered_at)
_OF_CACHE = paths.c.cache == bindparam("cache")

_USES = (
    select(
        paths.c.id,
        _USED_AT,
        func.coalesce(paths.c.leased_until > bindparam("now"), False).label("leased"),
        paths.c.file_size,
    )
    .where(_OF_CACHE, paths.c.id > bindparam("after"))
    .order_by(paths.c.id)
    .limit(PAGE)
)
_REFERRED = select(refs.c.name_id).where(refs.c.path_id.in_(bindparam("numbers", expanding=True))).distinct()
_REFERRING = select(refs.c.path_id).where(refs.c.name_id.in_(bindparam("numbers", expanding=True))).distinct()
_SHARED = (
    select(paths.c.nar_key, func.min(paths.c.id).label("first"))
    .where(_OF_CACHE)
    .group_by(paths.c.nar_key)
    .having(func.count() > 1)
    .subquery()
)
_TWINS = (
    select(paths.c.id, _SHARED.c.first)
    .join(_SHARED, _SHARED.c.nar_key == paths.c.nar_key)
    .where(_OF_CACHE, paths.c.id != _SHARED.c.first)
)
_NUMBERS = select(paths.c.hash_part, paths.c.id).where(
    _OF_CACHE, paths.c.hash_part.in_(bindparam("hash_parts", expanding=True))
)
_SUMMARIES = (
    select(
        paths.c.id.label("number"),
        paths.c.hash_part,
        names.c.name,
        paths.c.nar_key,
        paths.c.file_size,
        _USED_AT.label("used_at"),
    )
    .join(names, names.c.id == paths.c.id)
    .where(_OF_CACHE, paths.c.id.in_(bindparam("numbers", expanding=True)))
    .order_by(paths.c.id)
)


def uses(connection: Connection, cache: str, now: int, after: int) -> list[PathUse]:
    """See `Retention.uses`."""
    rows = connection.execute(_USES, {"cache": cache, "now": now, "after": after})
    return [PathUse(number, used_at, bool(leased), file_size) for number, used_at, leased, file_size in rows]


def referred(connection: Connection, numbers: Collection[int]) -> list[int]:
    """See `Retention.referred`."""
    found: list[int] = []
    for some in batches(numbers):
        found += connection.scalars(_REFERRED, {"numbers": some})
    return list(dict.fromkeys(found))


def referring(connection: Connection, numbers: Collection[int]) -> list[int]:
    """See `Retention.referring`."""
    found: list[int] = []
    for some in batches(numbers):
        found += connection.scalars(_REFERRING, {"numbers": some})
    return list(dict.fromkeys(found))


def twins(connection: Connection, cache: str) -> dict[int, int]:
    """See `Retention.twins`."""
    return {row[0]: row[1] for row in connection.execute(_TWINS, {"cache": cache})}


def numbers(connection: Connection, cache: str, hash_parts: Collection[str]) -> dict[str, int]:
    """See `Retention.numbers`."""
    return by_hash_part(connection, _NUMBERS, cache, hash_parts)


def summaries(connection: Connection, cache: str, numbers: Collection[int]) -> list[PathSummary]:
    """See `Retention.summaries`."""
    return [
        PathSummary(**row._asdict())
        for some in batches(numbers)
        for row in connection.execute(_SUMMARIES, {"cache": cache, "numbers": some})
    ]
