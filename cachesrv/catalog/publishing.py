"""Publishing, removing and marking paths. Each function runs in a write transaction, and those run one at a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, delete, func, insert, or_, select, update

from cachesrv.catalog.batches import batches
from cachesrv.catalog.doom import demand_undoomed, fence
from cachesrv.catalog.many import execute
from cachesrv.catalog.names import name_ids, prune_names
from cachesrv.catalog.nars import drop_listings, known
from cachesrv.catalog.paths import dangling_among, find, present
from cachesrv.catalog.schema import narinfos, paths, refs
from cachesrv.errors import Conflict, MissingNar, MissingReferences

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from sqlalchemy import Connection

    from cachesrv.catalog.base import PathRecord
    from cachesrv.catalog.retention import Reliance

# What a second push of a path may change, beside its narinfo and its references.
_MUTABLE = ("nar_key", "nar_size", "file_size", "deriver", "ca")
_COLUMNS = ("cache", "hash_part", "nar_hash", "registered_at", "pusher", *_MUTABLE)
_RESOLUTION = 3600

_INSERT_PATH = insert(paths)
_INSERT_NARINFO = insert(narinfos)
_INSERT_REFERENCE = insert(refs)
_UPDATE_PATH = (
    update(paths).where(paths.c.id == bindparam("of")).values({column: bindparam(column) for column in _MUTABLE})
)
_UPDATE_NARINFO = update(narinfos).where(narinfos.c.path_id == bindparam("of")).values(content=bindparam("narinfo"))
_DELETE_REFERENCE = delete(refs).where(refs.c.path_id == bindparam("from"), refs.c.name_id == bindparam("to"))
_USE = (
    update(paths)
    .where(paths.c.cache == bindparam("in"), paths.c.hash_part == bindparam("of"))
    .where(func.coalesce(paths.c.last_used_at, paths.c.registered_at) < bindparam("earlier"))
    .values(last_used_at=bindparam("at"))
)
_TOUCH = (
    update(paths)
    .where(paths.c.cache == bindparam("in"), paths.c.hash_part == bindparam("of"))
    .where(or_(paths.c.last_used_at.is_(None), paths.c.last_used_at < bindparam("at")))
    .values(last_used_at=bindparam("at"))
)
_TOUCH_NARS = (
    update(paths)
    .where(paths.c.nar_key.in_(bindparam("keys", expanding=True)))
    .where(or_(paths.c.last_used_at.is_(None), paths.c.last_used_at < bindparam("at")))
    .values(last_used_at=bindparam("at"))
)
_IDS = select(paths.c.id).where(
    paths.c.cache == bindparam("cache"), paths.c.hash_part.in_(bindparam("hash_parts", expanding=True))
)
_REFERRED = select(refs.c.name_id).where(refs.c.path_id.in_(bindparam("path_ids", expanding=True))).distinct()
_DELETE_PATHS = delete(paths).where(paths.c.id.in_(bindparam("path_ids", expanding=True)))


def publish(connection: Connection, records: Sequence[PathRecord], reliance: Reliance | None) -> int:
    """See `Catalog.publish`."""
    nar_keys = {record.nar_key for record in records}
    demand_undoomed(connection, nar_keys.union(reliance.objects if reliance else ()))
    if reliance:
        _demand(connection, records, reliance)
    for cache, of_cache in groupby(_distinct(records), key=lambda record: record.cache):
        _publish_to(connection, cache, list(of_cache), used=reliance is not None)
    drop_listings(connection, nar_keys)
    return fence(connection)


def restore(
    connection: Connection, records: Sequence[PathRecord], used_at: int, objects: Collection[str]
) -> dict[str, PathRecord]:
    """See `Catalog.restore`."""
    if not records:
        return {}
    distinct = _distinct(records)
    cache = distinct[0].cache
    demand_undoomed(connection, {record.nar_key for record in distinct}.union(objects))
    published = find(connection, cache, [record.hash_part for record in distinct])
    new = [record for record in distinct if record.hash_part not in published]
    references = _references(new)
    ids = name_ids(connection, cache, {*map(_base_name, new), *(name for _, name in references)})
    _insert(connection, [(ids[_base_name(record)], record) for record in new], last_used_at=used_at)
    _refer(connection, {(ids[path], ids[name]) for path, name in references})
    return {
        record.hash_part: published[record.hash_part]
        for record in distinct
        if record.hash_part in published and _content(record) != _content(published[record.hash_part])
    }


def remove(connection: Connection, cache: str, hash_parts: Collection[str]) -> None:
    """See `Catalog.remove`."""
    for some in batches(hash_parts):
        ids = connection.scalars(_IDS, {"cache": cache, "hash_parts": some}).all()
        if ids:
            referred = connection.scalars(_REFERRED, {"path_ids": ids}).all()
            connection.execute(_DELETE_PATHS, {"path_ids": ids})
            prune_names(connection, [*ids, *referred])


def remove_dangling(connection: Connection, cache: str, hash_parts: Collection[str]) -> set[str]:
    """See `Catalog.remove_dangling`."""
    found = {part for some in batches(hash_parts) for part in dangling_among(connection, cache, some)}
    remove(connection, cache, found)
    return found


def touch(connection: Connection, cache: str, last_used: Mapping[str, int]) -> None:
    """See `Catalog.touch`."""
    execute(connection, _TOUCH, [{"in": cache, "of": of, "at": at} for of, at in sorted(last_used.items())])


def touch_nars(connection: Connection, keys: Collection[str], at: int) -> None:
    """See `Catalog.touch_nars`."""
    for some in batches(keys):
        connection.execute(_TOUCH_NARS, {"keys": some, "at": at})


def _distinct(records: Iterable[PathRecord]) -> list[PathRecord]:
    """Each path once, as it was stated last; by cache and hash part. Raises Conflict."""
    distinct: dict[tuple[str, str], PathRecord] = {}
    for record in records:
        key = record.cache, record.hash_part
        _refuse_change(distinct.get(key, record), record)
        distinct[key] = replace(record, references=tuple(sorted(set(record.references))))
    return [distinct[key] for key in sorted(distinct)]


def _demand(connection: Connection, records: Sequence[PathRecord], reliance: Reliance) -> None:
    """Raises MissingReferences, MissingNar."""
    for cache, hash_parts in reliance.references.items():
        own = {record.hash_part for record in records if record.cache == cache}
        if missing := set(hash_parts) - own - present(connection, cache, hash_parts):
            raise MissingReferences(f"what is to be published refers to {min(missing)}, which has just been removed")
    if missing := {record.nar_key for record in records} - known(connection, {record.nar_key for record in records}):
        raise MissingNar(f"{min(missing)} has just been removed: send it again")


def _publish_to(connection: Connection, cache: str, records: list[PathRecord], *, used: bool) -> None:
    """Writes only what differs: a path that is pushed again as it is costs a write only now and then."""
    published = find(connection, cache, [record.hash_part for record in records])
    new, changed = [], []
    for record in records:
        if before := published.get(record.hash_part):
            _refuse_change(before, record)
            if _content(record) != _content(before):
                changed.append(record)
        else:
            new.append(record)
    if used:
        _use(connection, cache, [record for record in records if record.hash_part in published])
    old_references = _references(published[record.hash_part] for record in changed)
    references = _references(chain(new, changed))
    mentioned = chain(map(_base_name, new), map(_base_name, changed), *(old_references ^ references))
    ids = name_ids(connection, cache, set(mentioned))
    _insert(connection, [(ids[_base_name(record)], record) for record in new])
    _update(connection, [(ids[_base_name(record)], record) for record in changed])
    _refer(connection, {(ids[path], ids[name]) for path, name in references - old_references})
    _unrefer(connection, {(ids[path], ids[name]) for path, name in old_references - references})


def _use(connection: Connection, cache: str, records: Iterable[PathRecord]) -> None:
    """To push a path again is to use it; a use is noted when the last one is an hour ago."""
    rows = [
        {"in": cache, "of": record.hash_part, "at": record.registered_at, "earlier": record.registered_at - _RESOLUTION}
        for record in records
    ]
    execute(connection, _USE, rows)


def _refuse_change(published: PathRecord, record: PathRecord) -> None:
    if (published.name, published.nar_hash) != (record.name, record.nar_hash):
        raise Conflict(
            f"{_base_name(published)} is published in cache {record.cache} with NAR hash {published.nar_hash};"
            f" refused: {_base_name(record)} with NAR hash {record.nar_hash}"
        )


def _references(records: Iterable[PathRecord]) -> set[tuple[str, str]]:
    """Pairs of base names: from, to."""
    return {(_base_name(record), reference) for record in records for reference in record.references}


def _base_name(record: PathRecord) -> str:
    return f"{record.hash_part}-{record.name}"


def _insert(connection: Connection, new: Sequence[tuple[int, PathRecord]], **same: int) -> None:
    rows = [{"id": path_id, **_values(record, _COLUMNS), **same} for path_id, record in new]
    execute(connection, _INSERT_PATH, rows)
    execute(connection, _INSERT_NARINFO, [{"path_id": path_id, "content": record.narinfo} for path_id, record in new])


def _update(connection: Connection, changed: Sequence[tuple[int, PathRecord]]) -> None:
    execute(connection, _UPDATE_PATH, [{"of": path_id} | _values(record, _MUTABLE) for path_id, record in changed])
    execute(connection, _UPDATE_NARINFO, [{"of": path_id, "narinfo": record.narinfo} for path_id, record in changed])


def _refer(connection: Connection, references: Iterable[tuple[int, int]]) -> None:
    execute(connection, _INSERT_REFERENCE, [{"path_id": path, "name_id": name} for path, name in sorted(references)])


def _unrefer(connection: Connection, references: Iterable[tuple[int, int]]) -> None:
    execute(connection, _DELETE_REFERENCE, [{"from": path, "to": name} for path, name in sorted(references)])
    prune_names(connection, {name for _, name in references})


def _content(record: PathRecord) -> PathRecord:
    """All of it but who published it and when."""
    return replace(record, registered_at=0, pusher=None)


def _values(record: PathRecord, columns: Iterable[str]) -> dict[str, Any]:
    return {column: getattr(record, column) for column in columns}
