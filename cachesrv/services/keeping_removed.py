"""What is taken out of storage for good, kept as a file of the server's: nobody can tell what it was worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.errors import CachesrvError, StoreInaccessible
from cachesrv.services.replacement import replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.services.caches import ServedCache
    from cachesrv.storage.base import ObjectStore


class KeepingRemoved:
    """Below `folder`, in a folder for each cache."""

    def __init__(self, storage: ObjectStore, folder: Path) -> None:
        self._storage = storage
        self._folder = folder

    async def object(self, cache: ServedCache, key: str, *, limit: int) -> str:
        """Save an object that is about to go, if it can be read; how to get it back. Raises StoreError."""
        try:
            text = await self._storage.get(key, limit=limit)
        except StoreInaccessible:
            raise
        except CachesrvError:
            text = None
        if text is None:
            return "push it again"
        file = self._folder / cache.name / key.removeprefix(cache.key("")).replace("/", "_")
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, text, mode=0o640)
        return f"push it again; what lay there is in {file}"
