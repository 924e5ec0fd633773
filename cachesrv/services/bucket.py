"""Storage that others write to as well: what lies there is published, whether we know of it or not."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, PeerError, StoreUnavailable
from cachesrv.nix import narinfo

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cachesrv.services.breaker import Breaker
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.completeness import Completeness
    from cachesrv.storage.base import ObjectStore

_NAR_URL = re.compile(r"nar/[^/?]+\Z")


class BucketSource:
    """Asks storage, for caches whose authority it is, and for those whose catalog does not know everything; see
    `cachesrv.services.lookup.Source`.
    """

    def __init__(self, storage: ObjectStore, breaker: Breaker, completeness: Completeness | None = None) -> None:
        """Without `completeness`, catalogs are taken to be complete."""
        self._completeness = completeness
        self._storage = storage
        self._breaker = breaker

    async def narinfo(self, cache: ServedCache, hash_part: str) -> bytes | None:
        """See Source. One request for what is not there, two for what is."""
        if not cache.bucket_is_authority and (not self._completeness or await self._completeness.holds(cache)):
            return None
        if not self._breaker.allows():
            raise StoreUnavailable("the bucket did not answer a moment ago")
        with self._breaker.watching(StoreUnavailable), _named(hash_part):
            text = await self._storage.get(cache.narinfo_key(hash_part), limit=narinfo.DEFAULT_LIMIT)
            if text is None:
                return None
            info = _checked(cache, hash_part, text)
            whole = await self._storage.head(cache.key(info.url))
        if not whole:
            raise PeerError(f"the narinfo of {info.store_path} lies in storage, but its NAR {info.url} does not")
        return narinfo.render(info)

    def lacks(self, cache: ServedCache, _hash_part: str) -> bool:
        """See Source."""
        return not cache.bucket_is_authority and (not self._completeness or self._completeness.is_known(cache))


@contextmanager
def _named(hash_part: str) -> Iterator[None]:
    """What is wrong there is the doing of somebody else."""
    try:
        yield
    except BadInput as error:
        raise PeerError(f"the narinfo of {hash_part} in storage cannot be served: {error}") from error


def _checked(cache: ServedCache, hash_part: str, text: bytes) -> narinfo.NarInfo:
    """Raises BadInput for a narinfo that is not one of this path and cache: it is not for us to call that absent."""
    info = narinfo.parse(text)
    if info.store_path.hash_part != hash_part or info.store_dir != cache.store_dir:
        raise BadInput(f"it is that of {info.full_path}")
    if not _NAR_URL.match(info.url):
        raise BadInput(f"it leads to {info.url}, NARs are looked for below nar/")
    return info
