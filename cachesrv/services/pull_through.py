"""NARs of upstream caches, fetched on the first demand, stored, and their paths published."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import structlog

from cachesrv.errors import CachesrvError, Mismatch
from cachesrv.nix.store_path import is_hash_part
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.candidate import Candidate
from cachesrv.services.circle import CameRound
from cachesrv.services.upstream import our_name

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.ingest import Ingest
    from cachesrv.services.publish import Publish
    from cachesrv.services.upstream import Upstreams

_log = structlog.get_logger()


class PullThrough:
    """Fetches NARs from upstream, stores them and publishes their paths; see `cachesrv.services.delivery.Origin`.
    `keep`: NARs stay in the disk cache as well. `forget` takes the answer for a path from the index, if it leads to the
    NAR of this name.
    """

    def __init__(
        self,
        upstreams: Upstreams,
        ingest: Ingest,
        publish: Publish,
        *,
        keep: bool,
        forget: Callable[[ServedCache, str, str], Awaitable[None]],
    ) -> None:
        self._upstreams = upstreams
        self._ingest = ingest
        self._publish = publish
        self._keep = keep
        self._forget = forget

    async def remote(self, cache: ServedCache, name: str, hash_part: str | None) -> UpstreamNar | None:
        """See Origin."""
        if hash_part is None or not is_hash_part(hash_part):
            return None
        found = None
        if cache.pull_through:
            with suppress(CameRound):
                found = await self._upstreams.find(cache, hash_part, lambda info: our_name(info) == name)
        if not found:
            # It was there when its narinfo was looked up, and is upstream no more, or the cache pulls through no more.
            await self._forget(cache, hash_part, name)
            return None
        upstream, info = found
        size = await upstream.size(info)
        return UpstreamNar(
            key=cache.key(f"nar/{name}"),
            size=size,
            keep=self._keep,
            read=partial(upstream.read, info),
            receive=partial(self._take_in, cache, info, name, size),
            is_stored=partial(self._is_stored, cache, name),
        )

    async def _is_stored(self, cache: ServedCache, name: str) -> bool:
        return await self._ingest.known(cache, name) is not None

    async def _take_in(
        self, cache: ServedCache, info: NarInfo, name: str, size: int | None, chunks: AsyncIterator[bytes]
    ) -> None:
        """Store a NAR as it comes, and publish its path. Raises BadInput for a NAR that is not what was promised."""
        record = await self._ingest.receive(cache, name, chunks, size, nar_size=info.nar_size)
        if record.nar_hash != info.nar_hash.nix32:
            raise Mismatch(f"{name} came with the NAR hash {record.nar_hash}, not {info.nar_hash.nix32}")
        ours = replace(info, url=f"nar/{name}", file_hash=None, file_size=None)
        # It is signed by a key of the upstream's, and what it needs is there too.
        strict = cache.references is ReferencePolicy.STRICT
        references = ReferencePolicy.UPSTREAM if strict else cache.references
        trusting = replace(cache, references=references, trusted_keys={})
        try:
            await self._publish.one(trusting, Candidate.from_narinfo(ours), "upstream")
        except CachesrvError as error:
            _log.warning("a path from upstream was not published", path=str(info.store_path), error=str(error))


@dataclass(frozen=True, slots=True)
class UpstreamNar:
    """A NAR of an upstream on its way here; a `cachesrv.services.fetch.Remote`. It is kept by storing it."""

    key: str
    size: int | None
    keep: bool
    read: Callable[[int], AsyncGenerator[bytes, None]]
    receive: Callable[[AsyncIterator[bytes]], Awaitable[None]]
    is_stored: Callable[[], Awaitable[bool]]
