"""One statement for many rows, past what SQLAlchemy does for each: half of the time that it takes."""

from __future__ import annotations

from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import Connection, Delete, Dialect, Insert, Update

    Statement = Insert | Update | Delete


def execute(connection: Connection, statement: Statement, rows: Sequence[Mapping[str, Any]]) -> None:
    """Once for each row, in one call of the driver; nothing for no rows, which to SQLAlchemy would mean once without
    values. `statement` is a constant, and the values are such as drivers take as they are: numbers, text, bytes, None.
    """
    if rows:
        text, parameters = _compiled(connection.dialect, statement, tuple(rows[0]))
        connection.exec_driver_sql(text, [parameters(row) for row in rows])


@lru_cache(maxsize=64)
def _compiled(
    dialect: Dialect, statement: Statement, keys: tuple[str, ...]
) -> tuple[str, Callable[[Mapping[str, Any]], Any]]:
    """The text of a statement, and what makes the driver's parameters of a row."""
    compiled: Any = statement.compile(dialect=dialect, column_keys=list(keys))
    if not compiled.positional:
        return compiled.string, dict
    names = compiled.positiontup
    if len(names) == 1:
        return compiled.string, lambda row: (row[names[0]],)
    return compiled.string, itemgetter(*names)
