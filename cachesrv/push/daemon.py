"""A local store as the Nix daemon shows it: a pool of connections, and the questions of `LocalStore` over it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Self, TypeVar

from cachesrv.errors import BadInput, DaemonError, NotAllowed, NotFound
from cachesrv.nix.path_info import PathInfo, in_reference_order
from cachesrv.nix.realisation import OutputId, Realisation, TracedOutput
from cachesrv.nix.store_path import StorePath
from cachesrv.nix.worker_protocol import (
    REALISATIONS,
    Operation,
    Session,
    nar_from_path,
    perform,
    perform_all,
    query_path_info,
    query_realisation,
)
from cachesrv.push.daemon_connection import Connection, connect
from cachesrv.push.store_db import StoreDatabase
from cachesrv.push.store_location import StoreLocation

T = TypeVar("T")

CONNECTIONS = 4
"""The daemon starts a process for each."""
LARGEST_BATCH = 64
"""Questions that are asked on one connection before their answers are read; about 8 KiB."""
SMALLEST_BATCH = 16
"""A new connection costs the daemon more than so many answers."""


class ConnectionPool:
    """At most `size` connections to one daemon, made when needed and kept while they work."""

    def __init__(self, socket: Path, *, size: int, timeout: float) -> None:
        self.size = size
        self._socket = socket
        self._timeout = timeout
        self._places = asyncio.Semaphore(size)
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self._closed = False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection for the block alone; afterwards it goes back if it is `reusable`, else it is ended."""
        async with self._places:
            connection = await self._get()
            try:
                yield connection
            finally:
                if connection.reusable and not self._closed:
                    self._idle.append(connection)
                else:
                    connection.abort()

    async def close(self) -> None:
        """Ends all connections; exchanges under way on them fail."""
        self._closed = True
        self._idle.clear()
        for connection in self._open:
            connection.abort()
        if self._open:
            await asyncio.wait([connection.lost for connection in self._open])

    async def _get(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
            connection.abort()
        if self._closed:
            raise DaemonError(f"the connections to the Nix daemon at {self._socket} have been closed")
        connection = await connect(self._socket, timeout=self._timeout)
        self._open.add(connection)
        connection.lost.add_done_callback(lambda _: self._open.discard(connection))
        return connection


class DaemonStore:
    """`LocalStore` by way of the daemon. Errors are `DaemonError` and name the daemon."""

    def __init__(self, location: StoreLocation, pool: ConnectionPool, session: Session) -> None:
        self.store_dir = location.store_dir
        version = f" {session.nix_version}" if session.nix_version else ""
        self.name = f"Nix daemon{version} at {location.socket}"
        self._location = location
        self._pool = pool
        self._by_derivation = REALISATIONS in session.features

    @classmethod
    async def open(
        cls, location: StoreLocation, *, connections: int = CONNECTIONS, timeout: float | None = None
    ) -> Self:
        """Connects once, so that a daemon that is of no use fails here. `timeout`, by default the location's, is in
        seconds and for a handshake, a batch of questions, or silence in the middle of a NAR.
        """
        pool = ConnectionPool(location.socket, size=connections, timeout=timeout or location.timeout)
        async with pool.connection() as connection:
            return cls(location, pool, connection.session)

    async def resolve(self, path: str) -> StorePath:
        told = self._location.resolve_name(path)
        return await asyncio.to_thread(self._location.resolve, path) if told is None else told

    def real_path(self, path: StorePath) -> str | None:
        return self._location.real_path(path)

    async def path_info(self, path: StorePath) -> PathInfo:
        return (await self._path_infos([path]))[0]

    async def closure(self, paths: Iterable[StorePath]) -> list[PathInfo]:
        infos: dict[StorePath, PathInfo] = {}
        wave = sorted(set(paths))
        while wave:
            found = await self._path_infos(wave)
            infos.update((info.store_path, info) for info in found)
            wave = sorted({path for info in found for path in info.references} - infos.keys())
        return in_reference_order(infos.values())

    async def nar(self, info: PathInfo) -> AsyncGenerator[bytes, None]:
        path = info.store_path.full(self.store_dir)
        if not info.nar_size:
            raise DaemonError(f"the {self.name} does not know the size of {path}, so its NAR would have no end")
        async with self._pool.connection() as connection:
            asked = nar_from_path(info.store_path, self.store_dir)
            await connection.run(perform(asked), f"asked for the NAR of {path}")
            async with aclosing(connection.nar(info.nar_size)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def realisations(self, paths: Iterable[StorePath]) -> Mapping[OutputId | TracedOutput, Realisation]:
        """From the database, where this user may read it, else from a daemon that can be asked by derivation.

        Before Nix 2.35 a daemon is asked by a hash of the derivation that clients evaluate. It tells nobody which one
        that was: the deriver of a path is the resolved one, in which inputs are their outputs.
        """
        database = StoreDatabase(self._location)
        if database.readable:
            return await asyncio.to_thread(database.realisations, list(paths))
        if self._by_derivation:
            return await self._asked_for(list(paths))
        raise NotAllowed(f"the {self.name} does not tell them, and this user may not read {database.file}")

    async def _asked_for(self, paths: Sequence[StorePath]) -> dict[OutputId | TracedOutput, Realisation]:
        infos = [info for info in await self._path_infos(paths) if info.ca]
        outputs = {output: info.store_path for info in infos if (output := _output(info)) is not None}
        questions = [query_realisation(output, self.store_dir) for output in outputs]
        answers = await self._ask(questions, "asked for realisations")
        return {
            output: found
            for (output, path), found in zip(outputs.items(), answers, strict=True)
            if found is not None and found.out_path == path
        }

    async def close(self) -> None:
        await self._pool.close()

    async def _path_infos(self, paths: Sequence[StorePath]) -> list[PathInfo]:
        """Infos of many paths; raises `NotFound` for the first that is not valid."""
        questions = [query_path_info(path, self.store_dir) for path in paths]
        answers = await self._ask(questions, "asked for path infos")
        infos = [info for info in answers if info is not None]
        if len(infos) < len(paths):
            missing = paths[answers.index(None)].full(self.store_dir)
            raise NotFound(f"{missing} is not valid: the {self.name} does not know it")
        return infos

    async def _ask(self, questions: Sequence[Operation[T]], doing: str) -> list[T]:
        """Answers to many questions, asked over all connections at once; `doing` as for `Connection.run`."""
        share = -(-len(questions) // self._pool.size)
        size = min(max(share, SMALLEST_BATCH), LARGEST_BATCH)

        async def ask(some: Sequence[Operation[T]]) -> list[T]:
            async with self._pool.connection() as connection:
                return await connection.run(perform_all(some), doing)

        starts = range(0, len(questions), size)
        tasks = [asyncio.create_task(ask(questions[start : start + size])) for start in starts]
        try:
            return [answer for answers in await asyncio.gather(*tasks) for answer in answers]
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise


def _output(info: PathInfo) -> TracedOutput | None:
    """Which output of a derivation the path may be, by its name; None where none is known."""
    if info.deriver is None or not info.deriver.is_derivation:
        return None
    prefix = info.deriver.name.removesuffix(".drv")
    name = info.store_path.name
    if name != prefix and not name.startswith(f"{prefix}-"):
        return None
    with suppress(BadInput):
        return TracedOutput(info.deriver, "out" if name == prefix else name[len(prefix) + 1 :])
    return None
