"""Reading published paths. Each function runs in a transaction, so what it returns belongs together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, exists, func, select

from cachesrv.catalog.base import PathRecord
from cachesrv.catalog.batches import batches, by_hash_part
from cachesrv.catalog.schema import names, narinfos, paths, refs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from sqlalchemy import Connection, Row

PAGE = 500

# Statements are built once: that takes longer than to run those for a single path.
_IN_CACHE = paths.c.cache == bindparam("cache")
_LISTED = paths.c.hash_part.in_(bindparam("hash_parts", expanding=True))

_PRESENT = select(paths.c.hash_part).where(_IN_CACHE, _LISTED)
_NAR_HASHES = select(paths.c.hash_part, paths.c.nar_hash).where(_IN_CACHE, _LISTED)
_COUNT = select(func.count(), func.coalesce(func.sum(paths.c.nar_size), 0)).where(_IN_CACHE)
_RECORDS = (
    select(paths, names.c.name, narinfos.c.content.label("narinfo"))
    .join(names, names.c.id == paths.c.id)
    .join(narinfos, narinfos.c.path_id == paths.c.id)
    .where(_IN_CACHE)
)
_LISTED_RECORDS = _RECORDS.where(_LISTED)
_NEXT_RECORDS = _RECORDS.where(paths.c.hash_part > bindparam("after")).order_by(paths.c.hash_part).limit(PAGE)
_REFERENCES = (
    select(refs.c.path_id, (names.c.hash_part + "-" + names.c.name).label("base_name"))
    .join(names, names.c.id == refs.c.name_id)
    .where(refs.c.path_id.in_(bindparam("path_ids", expanding=True)))
)
_REFERRERS = (
    select(paths.c.hash_part)
    .join(refs, refs.c.path_id == paths.c.id)
    .join(names, names.c.id == refs.c.name_id)
    .where(
        names.c.cache == bindparam("cache"),
        names.c.hash_part == bindparam("hash_part"),
        paths.c.hash_part != bindparam("hash_part"),
    )
)
_TARGETS = paths.alias("targets")
_DANGLING = (
    select(paths.c.hash_part, (names.c.hash_part + "-" + names.c.name).label("base_name"))
    .join(refs, refs.c.path_id == paths.c.id)
    .join(names, names.c.id == refs.c.name_id)
    .where(names.c.cache == bindparam("cache"), ~exists().where(_TARGETS.c.id == names.c.id))
    .order_by(paths.c.hash_part, names.c.hash_part, names.c.name)
    .limit(bindparam("number"))
)
_DANGLING_AMONG = (
    select(paths.c.hash_part)
    .join(refs, refs.c.path_id == paths.c.id)
    .where(_IN_CACHE, _LISTED, ~exists().where(_TARGETS.c.id == refs.c.name_id))
    .distinct()
)


def find(connection: Connection, cache: str, hash_parts: Collection[str]) -> dict[str, PathRecord]:
    """See `Catalog.paths`."""
    found: dict[str, PathRecord] = {}
    for some in batches(hash_parts):
        rows = connection.execute(_LISTED_RECORDS, {"cache": cache, "hash_parts": some}).all()
        found.update((record.hash_part, record) for record in _with_references(connection, rows))
    return found


def present(connection: Connection, cache: str, hash_parts: Collection[str]) -> set[str]:
    """See `Catalog.present`."""
    found: set[str] = set()
    for some in batches(hash_parts):
        found.update(connection.scalars(_PRESENT, {"cache": cache, "hash_parts": some}))
    return found


def nar_hashes(connection: Connection, cache: str, hash_parts: Collection[str]) -> dict[str, str]:
    """See `Catalog.nar_hashes`."""
    return by_hash_part(connection, _NAR_HASHES, cache, hash_parts)


def page(connection: Connection, cache: str, after: str) -> list[PathRecord]:
    """The next paths by hash part, at most `PAGE`; none when that was all."""
    return _with_references(connection, connection.execute(_NEXT_RECORDS, {"cache": cache, "after": after}).all())


def referrers(connection: Connection, cache: str, hash_part: str) -> set[str]:
    """See `Catalog.referrers`."""
    return set(connection.scalars(_REFERRERS, {"cache": cache, "hash_part": hash_part}))


def dangling(connection: Connection, cache: str, limit: int) -> list[tuple[str, str]]:
    """See `Catalog.dangling`."""
    rows = connection.execute(_DANGLING, {"cache": cache, "number": limit})
    return [(hash_part, base_name) for hash_part, base_name in rows]


def dangling_among(connection: Connection, cache: str, hash_parts: Collection[str]) -> set[str]:
    """Those of not too many paths that refer to what is not published."""
    return set(connection.scalars(_DANGLING_AMONG, {"cache": cache, "hash_parts": list(hash_parts)}))


def count(connection: Connection, cache: str) -> tuple[int, int]:
    """See `Catalog.count`."""
    number, size = connection.execute(_COUNT, {"cache": cache}).one()
    return number, int(size)


def _with_references(connection: Connection, rows: Sequence[Row[Any]]) -> list[PathRecord]:
    references = _references(connection, [row.id for row in rows])
    return [
        PathRecord(
            cache=row.cache,
            hash_part=row.hash_part,
            name=row.name,
            narinfo=row.narinfo,
            nar_key=row.nar_key,
            nar_hash=row.nar_hash,
            nar_size=row.nar_size,
            file_size=row.file_size,
            references=tuple(sorted(references.get(row.id, ()))),
            deriver=row.deriver,
            ca=row.ca,
            registered_at=row.registered_at,
            pusher=row.pusher,
        )
        for row in rows
    ]


def _references(connection: Connection, path_ids: Iterable[int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for some in batches(path_ids):
        for path_id, base_name in connection.execute(_REFERENCES, {"path_ids": some}):
            found.setdefault(path_id, []).append(base_name)
    return found
