"""Cutting batches into statements: SQLite takes 32,766 variables in one, PostgreSQL 65,535."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

STATEMENT_VALUES = 2_000

_Value = TypeVar("_Value", int, str)


def batches(values: Iterable[_Value]) -> Iterator[list[_Value]]:
    """The distinct values in lists that fit into one statement, in order, so that an index is walked one way."""
    ordered = sorted(set(values))
    for start in range(0, len(ordered), STATEMENT_VALUES):
        yield ordered[start : start + STATEMENT_VALUES]
