"""The Nix store that paths are pushed from: what the uploader asks of it, and how one is opened."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Protocol

from cachesrv.errors import DaemonError, StoreError, StoreUnavailable
from cachesrv.nix.path_info import PathInfo
from cachesrv.nix.realisation import OutputId, Realisation, TracedOutput
from cachesrv.nix.store_path import StorePath
from cachesrv.push.daemon import DaemonStore
from cachesrv.push.database_store import DatabaseStore
from cachesrv.push.store_location import Access, locate


class LocalStore(Protocol):
    """A store on this machine, for reading.

    Methods may run concurrently, and none waits forever. All may raise `StoreError` or `DaemonError`, which name the
    store and what failed, and `BadInput` for what no Nix would say.
    """

    store_dir: str
    """The directory that its store paths name."""
    name: str
    """How it is read, for people: the daemon's version and socket, or the database."""

    async def resolve(self, path: str) -> StorePath:
        """The store path that a file name is, leads to by symlinks (`./result`), or lies in.

        Works on names alone and says nothing of validity. Raises `NotFound` for a file that is not there and
        `BadInput` for one that is not in this store.
        """
        ...

    def real_path(self, path: StorePath) -> str | None:
        """Where the contents of a path can be read on this machine, None if they cannot.

        Its files may still turn out to be unreadable, and are to be checked against the NAR hash like all input.
        """
        ...

    async def path_info(self, path: StorePath) -> PathInfo:
        """Raises `NotFound` if the path is not valid."""
        ...

    async def closure(self, paths: Iterable[StorePath]) -> list[PathInfo]:
        """The paths and all that they need at run time, each after all it refers to; equal sets, equal lists.

        Raises `NotFound` that names one of the paths if it is not valid.
        """
        ...

    def nar(self, info: PathInfo) -> AsyncGenerator[bytes, None]:
        """The NAR of a path of which there is no `real_path`, in chunks, with bounded memory.

        `info.nar_size` bytes, or an error; the bytes are not checked against the NAR hash. Close the generator
        (`contextlib.aclosing`) when leaving early: it holds a connection.
        """
        ...

    async def realisations(self, paths: Iterable[StorePath]) -> Mapping[OutputId | TracedOutput, Realisation]:
        """Which outputs of content-addressed derivations are known to have come out as one of the paths. Raises
        `NotAllowed` when this user cannot be told.
        """
        ...

    async def close(self) -> None:
        """Ends all connections; a question under way fails."""
        ...


@asynccontextmanager
async def opened_store(store: str | None, environ: Mapping[str, str]) -> AsyncIterator[LocalStore]:
    """The store that `open_store` opens; closed at the end."""
    opened = await open_store(store, environ)
    try:
        yield opened
    finally:
        await opened.close()


async def open_store(store: str | None, environ: Mapping[str, str]) -> LocalStore:
    """Opens the store that `--store` names (see `store_location.locate`), or else the environment.

    Unless told otherwise, from the database if it can be read, which asks nobody, else by the daemon. Raises
    `ConfigError` for a store that is not of this machine, `DaemonError` or `StoreError` for one that cannot be read.
    """
    location = locate(store, environ)
    if location.access is Access.DAEMON:
        return await DaemonStore.open(location)
    try:
        return await DatabaseStore.open(location)
    except StoreError as store_error:
        if location.access is Access.DATABASE:
            raise
        try:
            return await DaemonStore.open(location)
        except DaemonError as error:
            raise StoreUnavailable(f"no Nix store can be read: {error}; {store_error}") from error
