"""Transactions over SQLAlchemy Core, each in one hop to a thread.

A query is a plain function whose first argument is a connection; it runs as one transaction. An asynchronous driver
would hop several times for every statement (a lookup takes two to three times as long), and build rows and parameters
on the event loop, which answers lookups meanwhile.

Write transactions run one at a time, across all processes that share the database: the engine for writing has to
begin them with a lock (`BEGIN IMMEDIATE` in SQLite). So a query may look first and then write, without a race.
Readers run beside them, each on one state of the database.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from cachesrv.errors import BadInput, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection, Engine

    from cachesrv.errors import CachesrvError

_T = TypeVar("_T")
_P = ParamSpec("_P")


class Database:
    """Two engines on one database, with their threads. `explain` turns an error of theirs into one of ours."""

    def __init__(
        self, *, reader: Engine, writer: Engine, readers: int, explain: Callable[[Exception], CachesrvError]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._explain = explain
        self._reading = ThreadPoolExecutor(readers, "catalog-read")
        self._writing = ThreadPoolExecutor(1, "catalog-write")
        self._closed = False

    async def read(self, query: Callable[Concatenate[Connection, _P], _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What the query returns. Raises what it raises, BadInput for values that no database takes, StoreError."""
        return await self._run(self._reading, self._reader, lambda connection: query(connection, *args, **kwargs))

    async def write(self, query: Callable[Concatenate[Connection, _P], _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What the query returns, when all that it wrote is durable; nothing is written when it raises, as `read`
        does, or StoreFull. A transaction that has begun runs to its end, also when the caller is cancelled.
        """
        return await self._run(self._writing, self._writer, lambda connection: query(connection, *args, **kwargs))

    async def close(self) -> None:
        """Wait for what is running, then let go of connections and threads."""
        self._closed = True
        await asyncio.to_thread(self._let_go)

    async def _run(self, threads: ThreadPoolExecutor, engine: Engine, query: Callable[[Connection], _T]) -> _T:
        if self._closed:
            raise StoreUnavailable("the catalog is closed")
        return await asyncio.get_running_loop().run_in_executor(threads, self._transaction, engine, query)

    def _transaction(self, engine: Engine, query: Callable[[Connection], _T]) -> _T:
        try:
            with engine.begin() as connection:
                return query(connection)
        except SQLAlchemyError as error:
            raise self._explain(error) from error
        except (OverflowError, UnicodeError) as error:
            raise BadInput(f"the catalog cannot store this value: {error}") from error

    def _let_go(self) -> None:
        for threads, engine in ((self._reading, self._reader), (self._writing, self._writer)):
            threads.shutdown()
            engine.dispose()
