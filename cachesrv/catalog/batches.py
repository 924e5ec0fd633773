"""Cutting batches into statements: SQLite takes 32,766 variables in one, PostgreSQL 65,535."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from sqlalchemy import Connection, Select

STATEMENT_VALUES = 2_000

_Value = TypeVar("_Value", int, str)


def batches(values: Iterable[_Value]) -> Iterator[list[_Value]]:
    """The distinct values in lists that fit into one statement, in order, so that an index is walked one way."""
    ordered = sorted(set(values))
    for start in range(0, len(ordered), STATEMENT_VALUES):
        yield ordered[start : start + STATEMENT_VALUES]


def by_hash_part(
    connection: Connection, query: Select[str, _Value], cache: str, hash_parts: Collection[str]
) -> dict[str, _Value]:
    """What a query says of some paths of a cache: of `cache` and `hash_parts`, for rows of a hash part and a value."""
    found: dict[str, _Value] = {}
    for some in batches(hash_parts):
        rows = connection.execute(query, {"cache": cache, "hash_parts": some})
        found.update((hash_part, value) for hash_part, value in rows)
    return found
