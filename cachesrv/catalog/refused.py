"""Pushes that were refused, and those among them that would have changed a published path. Each function runs in one
transaction.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, delete, func, insert, select, update

from cachesrv.catalog.base import ConflictRecord, RefusalRecord
from cachesrv.catalog.schema import conflicts, refusals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

MAX_REFUSALS = 10_000
"""Paths of which it is remembered that a push was refused; those that were refused the longest time ago go first."""

MAX_CONFLICTS = 10_000
"""Pushes of which it is remembered that they would have changed a path; those that were first made the longest time ago
go first.
"""
MAX_CONFLICTS_OF_PATH = 20

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
_FORGET = delete(refusals).where(
    refusals.c.cache == bindparam("of_cache"), refusals.c.hash_part == bindparam("of_hash_part")
)
_REFUSE = insert(refusals)
_LATEST = select(func.max(refusals.c.id))
_FORGET_OLD = delete(refusals).where(refusals.c.id <= bindparam("of"))
_REFUSAL = select(*(column for column in refusals.c if column is not refusals.c.id)).where(
    refusals.c.cache == bindparam("cache"), refusals.c.hash_part == bindparam("hash_part")
)
_KEPT_OF_PATH = (
    select(conflicts.c.id)
    .where(conflicts.c.cache == bindparam("of_cache"), conflicts.c.hash_part == bindparam("of_hash_part"))
    .order_by(conflicts.c.at.desc(), conflicts.c.id.desc())
    .limit(bindparam("kept"))
)
_FORGET_OF_PATH = delete(conflicts).where(
    conflicts.c.cache == bindparam("of_cache"),
    conflicts.c.hash_part == bindparam("of_hash_part"),
    conflicts.c.id.not_in(_KEPT_OF_PATH),
)
_LATEST_CONFLICT = select(func.max(conflicts.c.id))
_FORGET_CONFLICTS = delete(conflicts).where(conflicts.c.id <= bindparam("of"))
_OF_PATH = _LATEST_FIRST.where(conflicts.c.hash_part == bindparam("hash_part"))


def record_conflicts(connection: Connection, records: Sequence[ConflictRecord]) -> None:
    """See `Catalog.record_conflicts`."""
    for record in records:
        _record_conflict(connection, record)


def _record_conflict(connection: Connection, record: ConflictRecord) -> None:
    same = connection.execute(_SAME, asdict(record)).one_or_none()
    if same is None:
        connection.execute(_INSERT, asdict(record))
        path = {"of_cache": record.cache, "of_hash_part": record.hash_part, "kept": MAX_CONFLICTS_OF_PATH}
        connection.execute(_FORGET_OF_PATH, path)
        connection.execute(_FORGET_CONFLICTS, {"of": (connection.scalar(_LATEST_CONFLICT) or 0) - MAX_CONFLICTS})
    elif same.at < record.at:
        connection.execute(_AGAIN, {"of": same.id, "latest": record.at})


def find_conflicts(connection: Connection, cache: str, hash_part: str | None) -> list[ConflictRecord]:
    """See `Catalog.conflicts`."""
    query = _LATEST_FIRST if hash_part is None else _OF_PATH
    rows = connection.execute(query, {"cache": cache, "hash_part": hash_part})
    return [ConflictRecord(**row._asdict()) for row in rows]


def record_refusals(connection: Connection, records: Sequence[RefusalRecord]) -> None:
    """See `Catalog.record_refusals`."""
    for record in records:
        connection.execute(_FORGET, {"of_cache": record.cache, "of_hash_part": record.hash_part})
        connection.execute(_REFUSE, asdict(record))
    connection.execute(_FORGET_OLD, {"of": (connection.scalar(_LATEST) or 0) - MAX_REFUSALS})


def find_refusal(connection: Connection, cache: str, hash_part: str) -> RefusalRecord | None:
    """See `Catalog.refusal`."""
    row = connection.execute(_REFUSAL, {"cache": cache, "hash_part": hash_part}).one_or_none()
    return None if row is None else RefusalRecord(**row._asdict())
