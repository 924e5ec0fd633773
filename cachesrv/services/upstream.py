"""Caches of others: what they have, verified by their keys, offered as ours, and fetched on the first demand.

A narinfo from upstream is served with a URL of ours, `nar/<name>?path=<hash part>`: whoever comes for the NAR says with
it whose NAR that is, so nothing has to be remembered between the two requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import structlog

from cachesrv.errors import BadInput, CachesrvError, Mismatch, PeerError
from cachesrv.nix import narinfo
from cachesrv.nix.compression import SUFFIXES
from cachesrv.nix.signing import verify_any
from cachesrv.nix.store_path import is_hash_part
from cachesrv.services.candidate import Candidate

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping

    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.nix.signing import PublicKey
    from cachesrv.services.breaker import Breaker
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.ingest import Ingest
    from cachesrv.services.publish import Publish

_log = structlog.get_logger()
_NAR_NAME = re.compile(r"nar/([0-9a-df-np-sv-z]{52}\.nar(?:\.[a-z0-9]+)?)\Z")


class Reader(Protocol):
    """The objects of a binary cache, wherever it is. Names are relative, such as `nar/…`, or absolute URLs."""

    async def get(self, name: str, limit: int) -> bytes | None:
        """A small object; None when it is not there. Raises PeerError."""

    async def size(self, name: str) -> int | None:
        """Bytes of an object; None when it is not there. Raises PeerError."""

    def read(self, name: str, start: int) -> AsyncGenerator[bytes, None]:
        """An object from `start` on. Raises PeerError, also when it is not there."""


class Upstream:
    """One cache of somebody else's; asked no more for a while when it has failed several times in a row."""

    def __init__(self, name: str, reader: Reader, trusted_keys: Mapping[str, PublicKey], breaker: Breaker) -> None:
        self.name = name
        self._reader = reader
        self._trusted_keys = trusted_keys
        self._breaker = breaker

    async def narinfo(self, hash_part: str, store_dir: str) -> NarInfo | None:
        """What it says of a path, signed by one of its keys; None when it is sure not to have it. Raises PeerError."""
        if self._breaker.open:
            raise PeerError(f"upstream {self.name} did not answer a moment ago")
        try:
            text = await self._reader.get(f"{hash_part}.narinfo", narinfo.DEFAULT_LIMIT)
        except PeerError as error:
            self._breaker.failed()
            raise PeerError(f"upstream {self.name}: {error}") from error
        self._breaker.succeeded()
        return self._verified(hash_part, store_dir, text) if text is not None else None

    async def size(self, info: NarInfo) -> int:
        """Bytes of the compressed NAR. Raises PeerError when it is not there."""
        size = info.file_size or await self._reader.size(info.url)
        if not size:
            raise PeerError(f"upstream {self.name} lacks {info.url}, the NAR of {info.store_path}")
        return size

    def read(self, info: NarInfo, start: int) -> AsyncGenerator[bytes, None]:
        """The compressed NAR from `start` on. Raises PeerError."""
        return self._reader.read(info.url, start)

    def _verified(self, hash_part: str, store_dir: str, text: bytes) -> NarInfo:
        try:
            info = narinfo.parse(text)
        except BadInput as error:
            raise PeerError(f"upstream {self.name} sent a broken narinfo of {hash_part}: {error}") from error
        if info.store_path.hash_part != hash_part or info.store_dir != store_dir:
            raise PeerError(f"upstream {self.name} sent the narinfo of {info.full_path} for {hash_part}")
        if not verify_any(info.fingerprint, info.signatures, self._trusted_keys):
            raise PeerError(f"upstream {self.name}: no valid signature by its public_keys on {info.store_path}")
        if info.compression not in SUFFIXES:
            raise PeerError(f"upstream {self.name}: {info.store_path} is compressed by {info.compression}")
        return info


class Upstreams:
    """The upstreams of all caches: a source of narinfos, and a place where references resolve."""

    def __init__(self, by_cache: Mapping[str, tuple[Upstream, ...]]) -> None:
        self._by_cache = by_cache

    async def narinfo(self, cache: ServedCache, hash_part: str) -> bytes | None:
        """See `cachesrv.services.lookup.Source`; for caches that pull through."""
        if not cache.pull_through:
            return None
        found = await self.find(cache, hash_part)
        return narinfo.render(_as_ours(cache, found[1])) if found else None

    async def resolve(self, cache: ServedCache, hash_parts: Collection[str]) -> set[str]:
        """Those of them that an upstream of the cache has. Raises PeerError when that cannot be told."""
        return {hash_part for hash_part in hash_parts if await self.find(cache, hash_part)}

    async def find(self, cache: ServedCache, hash_part: str) -> tuple[Upstream, NarInfo] | None:
        """The first upstream that has the path, and what it says of it; None when all are sure not to have it. Raises
        PeerError when none has it and one could not tell.
        """
        doubt: PeerError | None = None
        for upstream in self._by_cache.get(cache.name, ()):
            try:
                info = await upstream.narinfo(hash_part, cache.store_dir)
            except PeerError as error:
                doubt = error
            else:
                if info is not None:
                    return upstream, info
        if doubt:
            raise doubt
        return None


class PullThrough:
    """Fetches NARs from upstream, stores them and publishes their paths; see `cachesrv.services.delivery.Origin`."""

    def __init__(self, upstreams: Upstreams, ingest: Ingest, publish: Publish) -> None:
        self._upstreams = upstreams
        self._ingest = ingest
        self._publish = publish

    async def remote(self, cache: ServedCache, name: str, hash_part: str | None) -> UpstreamNar | None:
        """See Origin."""
        if not cache.pull_through or hash_part is None or not is_hash_part(hash_part):
            return None
        found = await self._upstreams.find(cache, hash_part)
        if not found or _our_name(found[1]) != name:
            return None
        upstream, info = found
        size = await upstream.size(info)
        return UpstreamNar(
            key=cache.key(f"nar/{name}"),
            size=size,
            read=partial(upstream.read, info),
            receive=partial(self._take_in, cache, info, name, size),
        )

    async def _take_in(
        self, cache: ServedCache, info: NarInfo, name: str, size: int, chunks: AsyncIterator[bytes]
    ) -> None:
        """Store a NAR as it comes, and publish its path. Raises BadInput for a NAR that is not what was promised."""
        record = await self._ingest.receive(cache, name, chunks, size)
        if record.nar_hash != info.nar_hash.nix32:
            raise Mismatch(f"{name} came with the NAR hash {record.nar_hash}, not {info.nar_hash.nix32}")
        ours = replace(info, url=f"nar/{name}", file_hash=None, file_size=None)
        try:
            await self._publish.one(cache, Candidate.from_narinfo(ours), "upstream")
        except CachesrvError as error:
            _log.warning("a path from upstream was not published", path=str(info.store_path), error=str(error))


@dataclass(frozen=True, slots=True)
class UpstreamNar:
    """A NAR of an upstream on its way here; a `cachesrv.services.fetch.Remote`. It is kept by storing it."""

    key: str
    size: int
    read: Callable[[int], AsyncGenerator[bytes, None]]
    receive: Callable[[AsyncIterator[bytes]], Awaitable[None]]
    keep: bool = False


def _our_name(info: NarInfo) -> str:
    """The name that the NAR gets here: the one it has, where that names its contents; else one by its NAR hash."""
    match = _NAR_NAME.match(info.url)
    return match[1] if match else f"{info.nar_hash.bare_nix32}.nar{SUFFIXES[info.compression]}"


def _as_ours(cache: ServedCache, info: NarInfo) -> NarInfo:
    """As it is offered: at a URL of ours, and signed by us too."""
    signed = info.replace_signatures(key.sign(info.fingerprint) for key in cache.signing_keys)
    return replace(signed, url=f"nar/{_our_name(info)}?path={info.store_path.hash_part}", system=None)
