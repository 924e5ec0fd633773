"""Pushes that would have changed a published path. Each function runs in one transaction."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, insert, select, update

from cachesrv.catalog.base import ConflictRecord
from cachesrv.catalog.schema import conflicts

if TYPE_CHECKING:
    from sqlalchemy import Connection


_SAME = select(conflicts.c.id, conflicts.c.at).where(
    conflicts.c.cache == bindparam("cache"),
    conflicts.c.hash_part == bindparam("hash_part"),
    conflicts.c.published_nar_hash == bindparam("published_nar_hash"),
    conflicts.c.refused_nar_hash == bindparam("refused_nar_hash"),
    conflicts.c.pusher == bindparam("pusher"),
)
_INSERT = insert(conflicts)
_AGAIN = update(conflicts).where(conflicts.c.id == bindparam("of")).values(at=bindparam("latest"))
_LATEST_FIRST = (
    select(*(column for column in conflicts.c if column is not conflicts.c.id))
    .where(conflicts.c.cache == bindparam("cache"))
    .order_by(conflicts.c.at.desc(), conflicts.c.id.desc())
)
_OF_PATH = _LATEST_FIRST.where(conflicts.c.hash_part == bindparam("hash_part"))


def record_conflict(connection: Connection, record: ConflictRecord) -> None:
    """See `Catalog.record_conflict`."""
    same = connection.execute(_SAME, asdict(record)).one_or_none()
    if same is None:
        connection.execute(_INSERT, asdict(record))
    elif same.at < record.at:
        connection.execute(_AGAIN, {"of": same.id, "latest": record.at})


def find_conflicts(connection: Connection, cache: str, hash_part: str | None) -> list[ConflictRecord]:
    """See `Catalog.conflicts`."""
    query = _LATEST_FIRST if hash_part is None else _OF_PATH
    rows = connection.execute(query, {"cache": cache, "hash_part": hash_part})
    return [ConflictRecord(**row._asdict()) for row in rows]
