"""The objects of a binary cache that lies in a store, such as a bucket; see `cachesrv.services.upstream.Reader`."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, NotFound, PeerError, PeerUnavailable, StoreError, StoreUnavailable
from cachesrv.storage.base import ByteRange

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from cachesrv.storage.base import ObjectStore


class StoreReader:
    """Reads from a store of somebody else's, which it does not close."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def get(self, name: str, limit: int) -> bytes | None:
        """See Reader."""
        with _as_peer(name):
            return await self._store.get(name, limit=limit)

    async def size(self, name: str) -> int | None:
        """See Reader."""
        with _as_peer(name):
            info = await self._store.head(name)
            return info.size if info else None

    async def read(self, name: str, start: int) -> AsyncGenerator[bytes, None]:
        """See Reader."""
        part = None
        if start:
            size = await self.size(name)
            part = ByteRange(start, size) if size is not None and start < size else None
            if part is None:
                raise PeerError(f"{name} has become shorter than the {start} bytes that came from it")
        with _as_peer(name):
            async for chunk in self._store.read(name, part):
                yield chunk


@contextmanager
def _as_peer(name: str) -> Iterator[None]:
    """The store is not ours: what is wrong with it is wrong with its owner."""
    try:
        yield
    except StoreUnavailable as error:
        raise PeerUnavailable(str(error)) from error
    except (StoreError, NotFound) as error:
        raise PeerError(str(error)) from error
    except BadInput as error:
        raise PeerError(f"{name} cannot be read there: {error}") from error
