"""What need not be pushed because another cache has it, which clients of ours use as well.

An upstream is judged by its keys. A path that one of them has signed, as the store here knows it, is taken to be there
if something is there that refers to it: caches hold whole closures. Where nothing does, and where the signatures were
lost on the way here, its narinfo is fetched and verified. So a path is left out only if all that it needs can be had;
what cannot be made sure of, because the upstream does not answer or has something else, is sent.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from cachesrv.errors import BadInput, CachesrvError, ConfigError, NotFound, ServerError
from cachesrv.nix.signing import PublicKey, fingerprint, readable_signatures, trusted_keys, verify_any
from cachesrv.push.connection import Timeouts
from cachesrv.push.events import Noted
from cachesrv.push.one_line import one_line
from cachesrv.push.retry import Backoff
from cachesrv.push.wanted import parse_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from cachesrv.api import UpstreamAnswer
    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.nix.store_path import StorePath
    from cachesrv.push.address import Address
    from cachesrv.push.events import Emit
    from cachesrv.push.token import TokenSource

CONNECTIONS = 16
"""Questions to one upstream at the same time."""

PATIENCE = Backoff(attempts=2, patience=20)
TIMEOUTS = Timeouts(connect=10, answer=20)
DEADLINE = 60.0
"""Seconds for one question, however it goes. What an upstream cannot say soon is sent instead."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """A cache that clients of ours use as well, and the keys that its paths bear, by name."""

    url: str
    keys: Mapping[str, PublicKey]

    @classmethod
    def from_answer(cls, answer: UpstreamAnswer) -> Upstream:
        """Raises ServerError for what are no keys."""
        try:
            return cls(one_line(answer.url), trusted_keys(PublicKey.parse(key) for key in answer.public_keys))
        except BadInput as error:
            raise ServerError(f"the server names a public key of {answer.url} that is none: {error}") from None

    def signed(self, info: PathInfo, store_dir: str) -> bool:
        """Whether one of its keys has signed exactly this path."""
        signatures = [one for one in readable_signatures(info.signatures) if one.name in self.keys]
        if not signatures:
            return False
        references = [path.full(store_dir) for path in info.references]
        text = fingerprint(info.store_path.full(store_dir), info.nar_hash, info.nar_size, references)
        return verify_any(text, signatures, self.keys) is not None

    def vouches(self, found: NarInfo, info: PathInfo, store_dir: str) -> bool:
        """Whether what it says of a path is signed by one of its keys, and about the NAR that is here."""
        if found.store_dir != store_dir or found.store_path != info.store_path or found.nar_hash != info.nar_hash:
            return False
        return verify_any(found.fingerprint, found.signatures, self.keys) is not None


class Asking(Protocol):
    """Narinfos of an upstream."""

    async def narinfo(self, hash_part: str) -> NarInfo:
        """Raises NotFound when it has none, else what went wrong."""


class Upstreams:
    """The upstreams of a push, in the order in which they are asked. An asynchronous context manager."""

    def __init__(
        self, upstreams: Sequence[Upstream], store_dir: str, tokens_for: Callable[[Address], TokenSource], emit: Emit
    ) -> None:
        self._upstreams = upstreams
        self._store_dir = store_dir
        self._tokens_for = tokens_for
        self._emit = emit
        self._readers: dict[str, Asking] = {}
        self._turns = asyncio.Semaphore(CONNECTIONS)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        if not self._upstreams:
            return self
        from cachesrv.push.remote import open_remote  # noqa: PLC0415  brings HTTP with it

        for upstream in self._upstreams:
            try:
                address = parse_cache(upstream.url)
                remote = open_remote(
                    address,
                    self._tokens_for(address),
                    connections=CONNECTIONS,
                    backoff=PATIENCE,
                    timeouts=TIMEOUTS,
                )
                self._readers[upstream.url] = await self._stack.enter_async_context(remote)
            except ConfigError as error:
                self._tell(upstream, str(error))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def left_out(self, infos: Iterable[PathInfo], missing: Iterable[str]) -> dict[StorePath, str]:
        """Those of the `missing` paths (base names) that upstreams hold with all they need, each with the reason in
        words. `infos` are all paths of the push.
        """
        wanted = set(missing)
        if not self._readers or not wanted:
            return {}
        return await _Judgement(self, infos, wanted).run()

    def signers(self, info: PathInfo) -> list[Upstream]:
        """Those that can be asked and whose signature the path bears."""
        return [one for one in self.asked if one.signed(info, self._store_dir)]

    @property
    def asked(self) -> list[Upstream]:
        """Those that answer, as far as is known."""
        return [one for one in self._upstreams if one.url in self._readers]

    async def holder(self, info: PathInfo, candidates: Iterable[Upstream]) -> Upstream | None:
        """The first of these that has the path, verified."""
        for upstream in candidates:
            async with self._turns:
                if await self._holds(upstream, info):
                    return upstream
        return None

    async def _holds(self, upstream: Upstream, info: PathInfo) -> bool:
        """Not asked again after it has failed: what it may hold is sent."""
        reader = self._readers.get(upstream.url)
        if reader is None:
            return False
        try:
            async with asyncio.timeout(DEADLINE):
                found = await reader.narinfo(info.store_path.hash_part)
        except (NotFound, BadInput):
            return False
        except (CachesrvError, TimeoutError) as error:
            if self._readers.pop(upstream.url, None) is not None:
                self._tell(upstream, str(error) or f"it has not answered within {DEADLINE:.0f} seconds")
            return False
        return upstream.vouches(found, info, self._store_dir)

    def _tell(self, upstream: Upstream, why: str) -> None:
        self._emit(Noted(f"nothing is left to the upstream {upstream.url}: {why}"))


class _Judgement:
    """Over the paths of one push. `left`: those that an upstream is taken to hold; `sure`: those of them of which it
    has said so itself.
    """

    def __init__(self, upstreams: Upstreams, infos: Iterable[PathInfo], wanted: set[str]) -> None:
        self._upstreams = upstreams
        self._infos = {info.store_path: info for info in infos if info.store_path.base_name in wanted}
        self._referrers: dict[StorePath, list[StorePath]] = {path: [] for path in self._infos}
        for path, info in self._infos.items():
            for other in info.references:
                if other in self._referrers and other != path:
                    self._referrers[other].append(path)
        self._left: dict[StorePath, Upstream] = {}
        self._sure: set[StorePath] = set()

    async def run(self) -> dict[StorePath, str]:
        unsigned: list[PathInfo] = []
        for path, info in self._infos.items():
            signers = self._upstreams.signers(info)
            if signers:
                self._left[path] = signers[0]
            elif _may_have_lost_signatures(info):
                unsigned.append(info)
        await asyncio.gather(*(self._ask(info, self._upstreams.asked) for info in unsigned))
        while doubtful := [path for path in self._left if self._is_doubtful(path)]:
            infos = [self._infos[path] for path in doubtful]
            await asyncio.gather(*(self._ask(info, self._upstreams.signers(info)) for info in infos))
        return {path: self._reason(path, upstream) for path, upstream in self._left.items()}

    def _is_doubtful(self, path: StorePath) -> bool:
        """Whether nothing that an upstream holds brings the path with it."""
        return path not in self._sure and not any(referrer in self._left for referrer in self._referrers[path])

    async def _ask(self, info: PathInfo, candidates: Iterable[Upstream]) -> None:
        holder = await self._upstreams.holder(info, candidates)
        if holder is None:
            self._left.pop(info.store_path, None)
        else:
            self._left[info.store_path] = holder
            self._sure.add(info.store_path)

    def _reason(self, path: StorePath, upstream: Upstream) -> str:
        if path in self._sure:
            return f"{upstream.url} has it, signed"
        return f"signed by {upstream.url}, which has what refers to it"


def _may_have_lost_signatures(info: PathInfo) -> bool:
    """Not what was built here, or added here with a content address: that others have it as well would be chance."""
    return not info.ultimate and info.ca is None
