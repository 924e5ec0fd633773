"""Whether the stores can be read and written, found out without a trace in what is published."""

from __future__ import annotations

from secrets import token_hex
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError
from cachesrv.storage.base import ByteRange

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cachesrv.catalog.base import Catalog
    from cachesrv.index.base import Index
    from cachesrv.storage.base import ObjectStore

_NO_CACHE = "probe.d"  # the dot: no cache can have this name
_HASH_PART = "0" * 32
_DATA = b"probe\n"


async def probe_storage(storage: ObjectStore, prefixes: Iterable[str]) -> None:
    """Read an object below each prefix, and write one that is never made visible. Raises StoreError."""
    for folder in (f"{prefix}/" if prefix else "" for prefix in prefixes):
        key = f"{folder}nar/probe-{token_hex(8)}"
        async with storage.writer(key, size=len(_DATA)) as writer:
            await writer.write(_DATA)
        if await storage.head(key) is not None:
            raise StoreError(f"an object that was begun and left is visible: {key}")
        async for info in storage.list(folder):
            if info.size:
                async for _ in storage.read(info.key, ByteRange(0, 1)):
                    pass
                break


async def probe_catalog(catalog: Catalog) -> None:
    """Ask a question, and run a transaction that changes nothing. Raises StoreError."""
    await catalog.tokens()
    await catalog.remove_nars([f"{_NO_CACHE}/{token_hex(8)}"])


def probe_index(index: Index) -> None:
    """Put an absence that has ended already under a name that no cache has, and take it away. Raises StoreError."""
    index.put_absent([(_NO_CACHE, _HASH_PART)], until=0)
    index.get(_NO_CACHE, _HASH_PART)
    index.delete([(_NO_CACHE, _HASH_PART)])
