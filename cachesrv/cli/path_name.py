"""What people call a path of a cache: a store path, a link to one, a name inside one, a base name, or a hash part."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from cachesrv.errors import BadInput, NotFound
from cachesrv.nix.store_path import StorePath, is_hash_part

if TYPE_CHECKING:
    from cachesrv.catalog.base import Catalog
    from cachesrv.services.caches import ServedCache


def hash_part_of(text: str, store_dir: str) -> str:
    """The hash part of the path that is meant. Raises BadInput, NotFound."""
    from cachesrv.push.store_location import locate

    if is_hash_part(text):
        return text
    try:
        return StorePath.parse(text).hash_part
    except BadInput:
        return locate(f"local?store={quote(store_dir)}", {}).resolve(text).hash_part


async def published(catalog: Catalog, cache: ServedCache, text: str) -> StorePath:
    """The published path that is meant. Raises BadInput, NotFound."""
    hash_part = hash_part_of(text, cache.store_dir)
    record = await catalog.path(cache.name, hash_part)
    if record is None:
        raise NotFound(f"{text} is not in the cache {cache.name}; `cachesrv why` may know more")
    return StorePath(hash_part, record.name)
