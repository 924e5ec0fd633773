"""Caches of others: what they have, verified by their keys and offered as ours.

A narinfo from upstream is served with a URL of ours, `nar/<name>?path=<hash part>`: whoever comes for the NAR says with
it whose NAR that is, so nothing has to be remembered between the two requests (`cachesrv.services.pull_through`).
"""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

from cachetools import TTLCache

from cachesrv.errors import BadInput, PeerError, PeerUnavailable
from cachesrv.nix import narinfo
from cachesrv.nix.compression import SUFFIXES, decompressed
from cachesrv.nix.signing import verify_any
from cachesrv.services.circle import CameRound, Circle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence

    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.nix.signing import PublicKey
    from cachesrv.services.breaker import Breaker
    from cachesrv.services.caches import DeclaredUpstream, ServedCache

_NAR_NAME = re.compile(r"nar/(([0-9a-df-np-sv-z]{52})(\.nar(?:\.[a-z0-9]+)?))\Z")
_Reference: TypeAlias = "tuple[str, tuple[DeclaredUpstream, ...], str]"
"""What was resolved: the name of a cache, the upstreams that it had then, and a hash part."""
_MAX_RESOLVED = 100_000
_RESOLVED_SECONDS = 3600
"""How long a reference that an upstream has is taken to be there."""
_RESOLVED_TOGETHER = 32
_ASKED_TOGETHER = 64
"""Questions to one upstream at the same time: so many connections it may cost."""


class Reader(Protocol):
    """The objects of a binary cache, wherever it is. Names are relative, such as `nar/…`, or absolute URLs. Raises
    PeerUnavailable for what may go well another time, PeerError for what will not.
    """

    async def get(self, name: str, limit: int) -> bytes | None:
        """A small object; None when it is not there."""

    async def size(self, name: str) -> int | None:
        """Bytes of an object; None when it is not there, or when that is not said."""

    def read(self, name: str, start: int) -> AsyncGenerator[bytes, None]:
        """An object from `start` on. Raises PeerError also when it is not there."""


class Upstream:
    """One cache of somebody else's; asked no more for a while when it has failed several times in a row."""

    def __init__(self, name: str, reader: Reader, trusted_keys: Mapping[str, PublicKey], breaker: Breaker) -> None:
        self.name = name
        self._reader = reader
        self._trusted_keys = trusted_keys
        self._breaker = breaker
        self._turns = asyncio.Semaphore(_ASKED_TOGETHER)

    async def narinfo(self, hash_part: str, store_dir: str) -> NarInfo | None:
        """What it says of a path, signed by one of its keys; None when it is sure not to have it. Raises
        PeerUnavailable when it did not answer, PeerError when its answer cannot be used.
        """
        # Its turn first: who waits for that says nothing about the upstream.
        async with self._turns:
            with self._asking():
                text = await self._reader.get(f"{hash_part}.narinfo", narinfo.DEFAULT_LIMIT)
        return self._verified(hash_part, store_dir, text) if text is not None else None

    async def size(self, info: NarInfo) -> int | None:
        """Bytes of the compressed NAR; None when nobody says it before its end. Raises PeerError."""
        if info.file_size:
            return info.file_size
        if info.compression == "none":
            return info.nar_size
        with self._asking():
            return await self._reader.size(info.url)

    async def read(self, info: NarInfo, start: int) -> AsyncGenerator[bytes, None]:
        """The compressed NAR from `start` on. Raises PeerError, also when it is not there."""
        async with aclosing(self._reader.read(info.url, start)) as chunks:
            with self._asking():
                chunk = await anext(chunks, b"")
            # A transfer that breaks later says little about who sends it.
            while chunk:
                yield chunk
                with self._named():
                    chunk = await anext(chunks, b"")

    @contextmanager
    def _asking(self) -> Iterator[None]:
        if not self._breaker.allows():
            raise PeerUnavailable(f"upstream {self.name} did not answer a moment ago, and is left alone for a while")
        with self._named(), self._breaker.watching(PeerUnavailable):
            yield

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except CameRound:
            raise
        except PeerUnavailable as error:
            raise PeerUnavailable(f"upstream {self.name}: {error}", after=error.after) from error
        except PeerError as error:
            raise PeerError(f"upstream {self.name}: {error}") from error

    def _verified(self, hash_part: str, store_dir: str, text: bytes) -> NarInfo:
        try:
            info = narinfo.parse(text)
            decompressed(info.compression, ())
        except BadInput as error:
            raise PeerError(f"upstream {self.name}: the narinfo of {hash_part} cannot be used: {error}") from error
        if info.store_path.hash_part != hash_part or info.store_dir != store_dir:
            raise PeerError(f"upstream {self.name} sent the narinfo of {info.full_path} for {hash_part}")
        if not verify_any(info.fingerprint, info.signatures, self._trusted_keys):
            raise PeerError(f"upstream {self.name}: no valid signature by its public_keys on {info.store_path}")
        return info


class Upstreams:
    """The upstreams of all caches: a source of narinfos, and a place where references resolve. `of` gives those of a
    cache, in the order in which they are asked. A question to all of them takes at most `patience` seconds, of which
    each has its share. `circle` gives the one of a cache by its name.
    """

    def __init__(
        self,
        of: Callable[[ServedCache], Sequence[Upstream]],
        *,
        patience: float,
        circle: Callable[[str], Circle] = lambda _: Circle(),
    ) -> None:
        self._circle = circle
        self._of = of
        self._patience = patience
        self._resolved: TTLCache[_Reference, bool] = TTLCache(_MAX_RESOLVED, _RESOLVED_SECONDS)
        self._resolving = asyncio.Semaphore(_RESOLVED_TOGETHER)

    async def narinfo(self, cache: ServedCache, hash_part: str) -> bytes | None:
        """See `cachesrv.services.lookup.Source`; for caches that pull through."""
        if not cache.pull_through:
            return None
        found = await self.find(cache, hash_part)
        return narinfo.render(as_ours(cache, found[1])) if found else None

    def lacks(self, cache: ServedCache, _hash_part: str) -> bool:
        """See `cachesrv.services.lookup.Source`."""
        return not cache.pull_through

    async def resolve(self, cache: ServedCache, hash_parts: Collection[str]) -> set[str]:
        """Those of them that an upstream of the cache has. Raises PeerError when that cannot be told."""
        answers = await asyncio.gather(*(self._resolves(cache, hash_part) for hash_part in hash_parts))
        return {hash_part for hash_part, there in zip(hash_parts, answers, strict=True) if there}

    async def _resolves(self, cache: ServedCache, hash_part: str) -> bool:
        key = cache.name, cache.upstreams, hash_part
        if key in self._resolved:
            return True
        async with self._resolving:
            there = await self.find(cache, hash_part) is not None
        if there:
            self._resolved[key] = True
        return there

    async def find(
        self, cache: ServedCache, hash_part: str, fits: Callable[[NarInfo], bool] = lambda _: True
    ) -> tuple[Upstream, NarInfo] | None:
        """The first upstream that has the path, and what it says of it, if that `fits`; None when all are sure not to
        have it. Raises PeerError when none has it and one could not tell, PeerUnavailable if that one may later;
        CameRound when they are being asked already.
        """
        upstreams = self._of(cache)
        if upstreams:
            self._circle(cache.name).demand_open()
        doubts: list[PeerError] = []
        for upstream in upstreams:
            try:
                info = await self._ask(upstream, hash_part, cache.store_dir, self._patience / len(upstreams))
            except PeerError as error:
                doubts.append(error)
            else:
                if info is not None and fits(info):
                    return upstream, info
        if doubts:
            kinds: tuple[type[PeerError], ...] = (PeerUnavailable, CameRound, PeerError)
            raise next(doubt for kind in kinds for doubt in doubts if isinstance(doubt, kind))
        return None

    async def _ask(self, upstream: Upstream, hash_part: str, store_dir: str, seconds: float) -> NarInfo | None:
        try:
            async with asyncio.timeout(seconds):
                return await upstream.narinfo(hash_part, store_dir)
        except TimeoutError:
            raise PeerUnavailable(f"upstream {upstream.name} did not answer within {seconds:g} s") from None


def our_name(info: NarInfo) -> str:
    """The name that the NAR gets here: the one it has, where that says what it is; else one by its NAR hash."""
    suffix = f".nar{SUFFIXES[info.compression]}"
    hashes = {known.bare_nix32 for known in (info.file_hash, info.nar_hash) if known}
    match = _NAR_NAME.match(info.url)
    return match[1] if match and match[2] in hashes and match[3] == suffix else f"{info.nar_hash.bare_nix32}{suffix}"


def is_elsewhere(text: bytes) -> bool:
    """Whether a narinfo is offered by `as_ours`: its NAR is to be fetched when somebody wants it."""
    return re.search(rb"^URL: [^\n?]*\?path=", text, re.MULTILINE) is not None


def as_ours(cache: ServedCache, info: NarInfo) -> NarInfo:
    """As it is offered: at a URL of ours, and signed by us too."""
    signed = info.replace_signatures(key.sign(info.fingerprint) for key in cache.signing_keys)
    return replace(signed, url=f"nar/{our_name(info)}?path={info.store_path.hash_part}", system=None)
