"""A store path read from the nearest place that has it: the record of what was pushed, the store here, a cache."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from cachesrv.errors import NotFound
from cachesrv.push.pushed import CACHE, RECORD, STORE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cachesrv.nix.listing import ListingNode
    from cachesrv.push.contents import Contents
    from cachesrv.push.members import Names
    from cachesrv.push.nar_member import Write
    from cachesrv.push.pushed import Pushed
    from cachesrv.push.recorded_path import RecordedPath

Found = TypeVar("Found")


class Layers:
    """A `contents.Contents`. Reads are counted in `pushed`, by where they came from; the cache is asked last."""

    def __init__(
        self,
        pushed: Pushed,
        recorded: RecordedPath | None,
        store: Contents | None,
        open_cache: Callable[[], Awaitable[Contents]],
    ) -> None:
        self._pushed = pushed
        self._recorded = recorded
        self._store = store
        self._open_cache = open_cache
        self._cache: Contents | None = None

    async def find(self, names: Names, *, follow: bool = False, recursive: bool = True) -> tuple[Names, ListingNode]:
        source, found = RECORD, self._on_record(lambda path: path.find(names, follow=follow))
        if found is None:
            source, contents = await self._elsewhere()
            found = await contents.find(names, follow=follow, recursive=recursive)
        await self._count(source, 0)
        return found

    async def copy(self, names: Names, write: Write) -> None:
        content = self._on_record(lambda path: path.content(names))
        if content is not None:
            write(content)
            await self._count(RECORD, len(content))
            return
        source, contents = await self._elsewhere()
        size = 0

        def counted(data: bytes | memoryview) -> None:
            nonlocal size
            write(data)
            size += len(data)

        await contents.copy(names, counted)
        await self._count(source, size)

    def _on_record(self, ask: Callable[[RecordedPath], Found | None]) -> Found | None:
        if self._recorded is None:
            return None
        try:
            return ask(self._recorded)
        except NotFound:
            if self._store is None:
                raise
            return None  # of links that lead to other paths the store knows more

    async def _elsewhere(self) -> tuple[str, Contents]:
        if self._store is not None:
            return STORE, self._store
        if self._cache is None:
            self._cache = await self._open_cache()
        return CACHE, self._cache

    async def _count(self, source: str, size: int) -> None:
        await asyncio.to_thread(self._pushed.count, source, size)
