"""Taking paths away. Each function runs in a write transaction, and those run one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import bindparam, delete, insert, select

from cachesrv.catalog import pins
from cachesrv.catalog.batches import batches
from cachesrv.catalog.doom import doom, release
from cachesrv.catalog.leases import demand_lock
from cachesrv.catalog.marking import summaries
from cachesrv.catalog.names import prune_names
from cachesrv.catalog.retention import MAINTENANCE, Keeper, RemovalRecord, Removed
from cachesrv.catalog.schema import names, paths, refs, removals

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import BindParameter, Connection

    from cachesrv.catalog.retention import PathSummary, Removal

_LATEST = 1000

_NUMBERS: BindParameter[int] = bindparam("numbers", expanding=True)
_LEASED = select(paths.c.id).where(paths.c.id.in_(_NUMBERS), paths.c.leased_until > bindparam("now"))
_WITH_OTHER_REFERRERS = select(names.c.id).where(
    names.c.id.in_(_NUMBERS),
    select(refs.c.path_id)
    .where(refs.c.name_id == names.c.id, refs.c.path_id.not_in(bindparam("going", expanding=True)))
    .exists(),
)
_REFERRED = (
    select(refs.c.name_id, paths.c.id)
    .outerjoin(paths, paths.c.id == refs.c.name_id)
    .where(refs.c.path_id.in_(_NUMBERS))
    .distinct()
)
_AMONG = select(refs.c.path_id, refs.c.name_id).where(
    refs.c.path_id.in_(_NUMBERS), refs.c.name_id.in_(bindparam("going", expanding=True))
)
_DELETE = delete(paths).where(paths.c.id.in_(_NUMBERS))
_ELSEWHERE = select(paths.c.hash_part).where(
    paths.c.cache.in_(bindparam("siblings", expanding=True)),
    paths.c.hash_part.in_(bindparam("hash_parts", expanding=True)),
)
_NAR_HASHES = select(paths.c.id, paths.c.nar_hash).where(paths.c.id.in_(_NUMBERS))
_FORGET = delete(removals).where(
    removals.c.cache == bindparam("of"), removals.c.hash_part.in_(bindparam("hash_parts", expanding=True))
)
_REMEMBER = insert(removals)
_COLUMNS = [column for column in removals.c if column is not removals.c.id]
_FIND = select(*_COLUMNS).where(removals.c.cache == bindparam("cache"), removals.c.hash_part == bindparam("hash_part"))
_LATER = (
    select(*_COLUMNS)
    .where(removals.c.cache == bindparam("cache"), removals.c.at >= bindparam("since"))
    .order_by(removals.c.at.desc(), removals.c.id.desc())
    .limit(_LATEST)
)
_FORGET_OLD = delete(removals).where(removals.c.at < bindparam("before"))


def remove_unneeded(connection: Connection, removal: Removal, numbers: Collection[int]) -> Removed:
    """See `Retention.remove_unneeded`."""
    demand_lock(connection, MAINTENANCE, removal.holder)
    asked = {path.number: path for path in summaries(connection, removal.cache, numbers)}
    kept = _kept(connection, removal, asked)
    going = sorted(asked.keys() - kept.keys(), reverse=True)
    while referred := _referred_by_others(connection, going):
        kept.update(dict.fromkeys(referred, Keeper.REFERRER))
        going = [number for number in going if number not in referred]
    if not going:
        return Removed([], kept, set(), [])
    gone = [asked[number] for number in _before_what_they_refer_to(connection, going)]
    doomed = _objects(connection, removal, gone)
    _remember(connection, removal, gone)
    targets = _delete(connection, going)
    release(connection, {path.nar_key for path in gone}, removal.at)
    doom(connection, doomed)
    return Removed(gone, kept, targets, doomed)


def find(connection: Connection, cache: str, hash_part: str) -> RemovalRecord | None:
    """See `Retention.removal`."""
    row = connection.execute(_FIND, {"cache": cache, "hash_part": hash_part}).one_or_none()
    return None if row is None else RemovalRecord(**row._asdict())


def later(connection: Connection, cache: str, since: int) -> list[RemovalRecord]:
    """See `Retention.removals`."""
    return [RemovalRecord(**row._asdict()) for row in connection.execute(_LATER, {"cache": cache, "since": since})]


def forget(connection: Connection, before: int) -> None:
    """See `Retention.forget_removals`."""
    connection.execute(_FORGET_OLD, {"before": before})


def _kept(connection: Connection, removal: Removal, asked: dict[int, PathSummary]) -> dict[int, Keeper]:
    kept: dict[int, Keeper] = {}
    if removal.used_before is not None:
        used = (number for number, path in asked.items() if path.used_at >= removal.used_before)
        kept.update(dict.fromkeys(used, Keeper.USE))
    if not removal.despite_leases:
        for some in batches(asked):
            leased = connection.scalars(_LEASED, {"numbers": some, "now": removal.at})
            kept.update(dict.fromkeys(leased, Keeper.LEASE))
    if not removal.despite_pins:
        pinned = pins.pinned(connection, removal.cache, removal.at)
        kept.update(dict.fromkeys(pinned & asked.keys(), Keeper.PIN))
    return kept


def _referred_by_others(connection: Connection, going: list[int]) -> set[int]:
    """Those of them that paths refer to which are not among them."""
    if not going:
        return set()
    return set(connection.scalars(_WITH_OTHER_REFERRERS, {"numbers": going, "going": going}))


def _before_what_they_refer_to(connection: Connection, going: list[int]) -> list[int]:
    """The same in an order in which none leaves others without it; what refers to each other comes last."""
    referred: dict[int, list[int]] = {number: [] for number in going}
    referrers = dict.fromkeys(going, 0)
    for path, name in connection.execute(_AMONG, {"numbers": going, "going": going}):
        if path != name:
            referred[path].append(name)
            referrers[name] += 1
    ordered = [number for number in going if not referrers[number]]
    for number in ordered:
        for other in referred[number]:
            referrers[other] -= 1
            if not referrers[other]:
                ordered.append(other)
    return [*ordered, *(number for number in going if referrers[number])]


def _objects(connection: Connection, removal: Removal, gone: list[PathSummary]) -> list[str]:
    elsewhere: set[str] = set()
    if removal.siblings:
        for some in batches(path.hash_part for path in gone):
            elsewhere.update(connection.scalars(_ELSEWHERE, {"siblings": list(removal.siblings), "hash_parts": some}))
    return [key for path in gone if path.hash_part not in elsewhere for key in removal.objects(path.hash_part)]


def _remember(connection: Connection, removal: Removal, gone: list[PathSummary]) -> None:
    nar_hashes: dict[int, str] = {}
    for some in batches(path.number for path in gone):
        nar_hashes.update((number, nar_hash) for number, nar_hash in connection.execute(_NAR_HASHES, {"numbers": some}))
    for hash_parts in batches(path.hash_part for path in gone):
        connection.execute(_FORGET, {"of": removal.cache, "hash_parts": hash_parts})
    connection.execute(
        _REMEMBER,
        [
            {
                "cache": removal.cache,
                "hash_part": path.hash_part,
                "name": path.name,
                "nar_hash": nar_hashes[path.number],
                "reason": removal.reason(path),
                "by": removal.by,
                "at": removal.at,
            }
            for path in gone
        ],
    )


def _delete(connection: Connection, going: list[int]) -> set[int]:
    """Delete paths; the numbers of published ones that they referred to."""
    mentioned, published = set(going), set()
    for some in batches(going):
        for name, path in connection.execute(_REFERRED, {"numbers": some}):
            mentioned.add(name)
            if path is not None:
                published.add(path)
    for some in batches(going):
        connection.execute(_DELETE, {"numbers": some})
    prune_names(connection, mentioned)
    return published.difference(going)
