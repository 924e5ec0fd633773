"""Narinfos that lie in storage, signed with the keys that their cache has now."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from cachesrv.nix import narinfo
from cachesrv.nix.narinfo_signatures import sign
from cachesrv.nix.signing import verify_any
from cachesrv.services.findings import Listed
from cachesrv.services.flaws import Kind
from cachesrv.services.judging import flaw_of, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cachesrv.services.caches import ServedCache
    from cachesrv.services.findings import Finding, FoundPath
    from cachesrv.services.flaws import Flaw
    from cachesrv.storage.base import ObjectStore


class Resigning:
    """An `Improve` of surveys. Who signs a narinfo says that its writer is believed: in a cache with trusted keys only
    what one of them signed gets a signature, and `tell` is told of the others. `signed` counts.
    """

    def __init__(self, storage: ObjectStore, cache: ServedCache, tell: Callable[[Flaw], None]) -> None:
        self._storage = storage
        self._cache = cache
        self._tell = tell
        self.signed = 0

    async def __call__(self, found: Sequence[tuple[str, Finding]]) -> Sequence[tuple[str, Finding]]:
        """See Improve."""
        unsigned = await asyncio.to_thread(self._unsigned, found)
        for hash_part in [part for part, trusted in unsigned.items() if not trusted]:
            del unsigned[hash_part]
            why = f"no signature by a trusted key: {', '.join(sorted(self._cache.trusted_keys))}; it is not signed anew"
            self._tell(flaw_of(self._cache, hash_part, Kind.UNTRUSTED_NARINFO, why))
        if not unsigned:
            return found
        # Read now: what was added since they were read first is kept.
        keys = [self._cache.narinfo_key(hash_part) for hash_part in unsigned]
        texts = await self._storage.get_many(keys, limit=narinfo.DEFAULT_LIMIT)
        signed = await asyncio.to_thread(self._signed, [item for item in found if item[0] in unsigned], texts)
        written = {self._cache.narinfo_key(hash_part): text for hash_part, (text, _) in signed.items()}
        self.signed += len(await self._storage.put_many(written, replace=True))
        return [(hash_part, signed[hash_part][1] if hash_part in signed else old) for hash_part, old in found]

    def _unsigned(self, found: Sequence[tuple[str, Finding]]) -> dict[str, bool]:
        """Those that lack a signature, by hash part, and whether they may get it."""
        unsigned: dict[str, bool] = {}
        for hash_part, finding in found:
            if finding.path is None:
                continue
            info = narinfo.parse(finding.path.narinfo)
            if not all(key.sign(info.fingerprint) in info.signatures for key in self._cache.signing_keys):
                trusted = self._cache.trusted_keys
                unsigned[hash_part] = not trusted or bool(verify_any(info.fingerprint, info.signatures, trusted))
        return unsigned

    def _signed(
        self, found: Sequence[tuple[str, Finding]], texts: Mapping[str, bytes]
    ) -> dict[str, tuple[bytes, Finding]]:
        """Those that are still there and say the same, by hash part: what is to be written, and what is then found."""
        signed: dict[str, tuple[bytes, Finding]] = {}
        for hash_part, finding in found:
            text = texts.get(self._cache.narinfo_key(hash_part))
            now = judge(self._cache, Listed(hash_part, finding.size, finding.modified), text).path if text else None
            if text and now and finding.path and _nar(now) == _nar(finding.path):
                text = sign(text, self._cache.signing_keys)
                path = msgspec.structs.replace(finding.path, narinfo=narinfo.render(narinfo.parse(text)))
                signed[hash_part] = text, msgspec.structs.replace(finding, path=path)
        return signed


def _nar(path: FoundPath) -> tuple[str, str]:
    return path.nar, path.nar_hash
