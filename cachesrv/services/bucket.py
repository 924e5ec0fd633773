"""Storage that others write to as well: what lies there is published, whether we know of it or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, PeerError, StoreUnavailable
from cachesrv.nix import narinfo

if TYPE_CHECKING:
    from cachesrv.services.breaker import Breaker
    from cachesrv.services.caches import ServedCache
    from cachesrv.storage.base import ObjectStore


class BucketSource:
    """Asks storage, for the caches whose authority it is; see `cachesrv.services.lookup.Source`."""

    def __init__(self, storage: ObjectStore, breaker: Breaker) -> None:
        self._storage = storage
        self._breaker = breaker

    async def narinfo(self, cache: ServedCache, hash_part: str) -> bytes | None:
        """See Source. One request for what is not there, two for what is."""
        if not cache.bucket_is_authority:
            return None
        if not self._breaker.allows():
            raise StoreUnavailable("the bucket did not answer a moment ago")
        with self._breaker.watching(StoreUnavailable):
            text = await self._storage.get(cache.narinfo_key(hash_part), limit=narinfo.DEFAULT_LIMIT)
            info = _checked(cache, hash_part, text) if text is not None else None
            whole = info is not None and await self._storage.head(cache.key(info.url))
        if info is None:
            return None
        if not whole:
            raise PeerError(f"the narinfo of {info.store_path} lies in storage, but its NAR {info.url} does not")
        return narinfo.render(info)


def _checked(cache: ServedCache, hash_part: str, text: bytes) -> narinfo.NarInfo:
    """Raises PeerError for a narinfo that is not one of this path and cache: it is not for us to call that absent."""
    try:
        info = narinfo.parse(text)
    except BadInput as error:
        raise PeerError(f"the narinfo of {hash_part} in storage is broken: {error}") from error
    if info.store_path.hash_part != hash_part or info.store_dir != cache.store_dir:
        raise PeerError(f"the narinfo of {hash_part} in storage is that of {info.full_path}")
    if "://" in info.url or "?" in info.url:
        raise PeerError(f"the narinfo of {hash_part} in storage leads elsewhere, to {info.url}")
    return info
