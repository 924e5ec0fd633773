"""A local store without the daemon: its database for what it knows, its files for what it holds."""

import asyncio
import os
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Self

from cachesrv.errors import DaemonError, StoreError, StoreUnavailable
from cachesrv.nix.path_info import PathInfo
from cachesrv.nix.realisation import OutputId, Realisation, TracedOutput
from cachesrv.nix.store_path import StorePath
from cachesrv.push.daemon import DaemonStore
from cachesrv.push.store_db import StoreDatabase
from cachesrv.push.store_location import Access, StoreLocation


class DatabaseStore:
    """`LocalStore` by way of the database, read in threads. Errors are `StoreError` and name the file. What lies in
    files that this user may not read is had from the daemon, if there is one.
    """

    def __init__(self, location: StoreLocation, database: StoreDatabase) -> None:
        self.store_dir = location.store_dir
        self.name = f"Nix store with database {database.file}"
        self._location = location
        self._database = database
        self._daemon: DaemonStore | None = None
        self._opening = asyncio.Lock()

    @classmethod
    async def open(cls, location: StoreLocation) -> Self:
        """Reads a little, so that a database that is of no use fails here."""
        database = StoreDatabase(location)
        await asyncio.to_thread(database.check)
        return cls(location, database)

    async def resolve(self, path: str) -> StorePath:
        told = self._location.resolve_name(path)
        return await asyncio.to_thread(self._location.resolve, path) if told is None else told

    def real_path(self, path: StorePath) -> str | None:
        return self._location.real_path(path)

    async def path_info(self, path: StorePath) -> PathInfo:
        return await asyncio.to_thread(self._database.path_info, path)

    async def closure(self, paths: Iterable[StorePath]) -> list[PathInfo]:
        return await asyncio.to_thread(self._database.closure, list(paths))

    async def nar(self, info: PathInfo) -> AsyncGenerator[bytes, None]:
        daemon = await self._by_daemon(info)
        async with aclosing(daemon.nar(info)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def realisations(self, paths: Iterable[StorePath]) -> Mapping[OutputId | TracedOutput, Realisation]:
        return await asyncio.to_thread(self._database.realisations, list(paths))

    async def close(self) -> None:
        if self._daemon is not None:
            await self._daemon.close()

    async def _by_daemon(self, info: PathInfo) -> DaemonStore:
        file = info.store_path.full(self._location.real_store_dir)
        with suppress(PermissionError):
            try:
                await asyncio.to_thread(os.lstat, file)
            except FileNotFoundError:
                raise StoreError(f"{file} is missing: damaged, or just collected (see nix-store --verify)") from None
        if self._location.access is not Access.AUTO:
            raise StoreUnavailable(f"{file} cannot be read, and there is no Nix daemon to read it for us")
        async with self._opening:
            if self._daemon is None:
                try:
                    self._daemon = await DaemonStore.open(self._location)
                except DaemonError as error:
                    raise StoreUnavailable(f"{file} cannot be read, and {error}") from error
        return self._daemon
