"""No disk cache: what is fetched from afar goes straight to the one who asked for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.errors import StoreFull
from cachesrv.storage.base import validate_key

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from cachesrv.storage.base import IncomingObject


class NoCache:
    """See `cachesrv.storage.base.ObjectCache`: one that never has room."""

    async def get(self, key: str) -> None:
        validate_key(key)

    def at_once(self, key: str, *, limit: int) -> None:  # noqa: ARG002  no object is small enough
        validate_key(key)

    def warm_file(self, key: str, *, limit: int) -> None:  # noqa: ARG002  nor is there a file
        validate_key(key)

    def incoming(self, key: str, size: int | None = None) -> AbstractAsyncContextManager[IncomingObject]:
        raise StoreFull(f"there is no disk cache to take {key}, of {size or 'an unknown number of'} bytes")

    async def discard(self, key: str) -> None:
        validate_key(key)
