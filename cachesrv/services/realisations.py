"""Which paths outputs of content-addressed derivations came out as: taken in, judged, signed.

A client that has no path yet looks here which one it wants, so that it has to believe the realisation as much as a
narinfo: a cache signs both, and takes neither without a signature where it wants one.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, BeingRemoved, Conflict, MissingReferences, Unsigned
from cachesrv.nix import realisation as layouts
from cachesrv.nix.realisation import OutputId, Realisation, object_name
from cachesrv.services.caches import ReferencePolicy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from cachesrv.catalog.base import Catalog
    from cachesrv.nix.realisation import RealisedOutput
    from cachesrv.nix.signing import PublicKey, Signature
    from cachesrv.services.caches import ServedCache
    from cachesrv.storage.base import ObjectStore

_TRIES = 4
"""How often a realisation is merged with what somebody else has just written."""
_ASKED_TOGETHER = 32


class Realisations:
    """Of all caches, in both layouts."""

    def __init__(self, storage: ObjectStore, catalog: Catalog) -> None:
        self._storage = storage
        self._catalog = catalog

    async def put(self, cache: ServedCache, output: RealisedOutput, data: bytes) -> None:
        """Keep what `data` says of an output: it may gain signatures, but does not come to mean another path. Raises
        BadInput, Unsigned, MissingReferences, Conflict, BeingRemoved.
        """
        given = parse(output, data)
        _check_trust(cache, output, given)
        await self._check_references(cache, output, given)
        key = cache.key(object_name(output))
        for _ in range(_TRIES):
            fence = await self._catalog.fence([key])
            there = await self._storage.get(key, limit=layouts.DEFAULT_LIMIT)
            published = await self._published(cache, output, there)
            merged = layouts.render(output, _merged(cache, output, given, published))
            written = there == merged or await self._storage.put(key, merged, replace=there is not None)
            if written and await self._catalog.fence([key]) == fence:
                return
        raise BeingRemoved(f"{object_name(output)} is being written by somebody else; try again")

    async def missing(self, cache: ServedCache, outputs: Iterable[RealisedOutput]) -> list[RealisedOutput]:
        """Those of which the cache says nothing."""
        turns = asyncio.Semaphore(_ASKED_TOGETHER)

        async def is_missing(output: RealisedOutput) -> bool:
            async with turns:
                return await self._storage.head(cache.key(object_name(output))) is None

        asked = list(outputs)
        answers = await asyncio.gather(*map(is_missing, asked))
        return [output for output, missing in zip(asked, answers, strict=True) if missing]

    async def _published(self, cache: ServedCache, output: RealisedOutput, data: bytes | None) -> Realisation | None:
        """What the cache says of an output; nothing, if it leads to what has been deleted, or is no realisation: no
        client could use it.
        """
        try:
            published = None if data is None else parse(output, data)
        except BadInput:
            return None
        if published is None or cache.references is ReferencePolicy.ANY:
            return published
        return published if await self._catalog.present(cache.name, [published.out_path.hash_part]) else None

    async def _check_references(self, cache: ServedCache, output: RealisedOutput, given: Realisation) -> None:
        if cache.references is ReferencePolicy.ANY:
            return
        out = given.out_path
        if not await self._catalog.present(cache.name, [out.hash_part]):
            raise MissingReferences(f"the realisation leads to {out}, which is not in the cache; push it first")
        if cache.references is ReferencePolicy.STRICT:
            missing = await self.missing(cache, [needed for needed, _ in given.dependencies if needed != output])
            if missing:
                raise MissingReferences(f"the realisation needs {missing[0]}, which is not in the cache; push it first")


def parse(output: RealisedOutput, data: bytes) -> Realisation:
    """Read what the object of an output says. Raises BadInput."""
    if isinstance(output, OutputId):
        return layouts.parse_realisation(data, output)
    return layouts.parse_build_trace(data)


def _check_trust(cache: ServedCache, output: RealisedOutput, given: Realisation) -> None:
    if not cache.trusted_keys:
        return
    texts = layouts.fingerprints(output, given)
    if not any(_holds(one, texts, cache.trusted_keys) for one in given.signatures):
        trusted = ", ".join(sorted(cache.trusted_keys))
        raise Unsigned(
            f"the realisation of {given.out_path} has no signature by a key that this cache trusts: {trusted}"
        )


def _merged(
    cache: ServedCache, output: RealisedOutput, given: Realisation, published: Realisation | None
) -> Realisation:
    """Signed by the cache, with what it has gathered of other signatures. Raises Conflict."""
    signatures = given.signatures
    if published is not None:
        if published.out_path != given.out_path:
            raise Conflict(
                f"{object_name(output)} is published as {published.out_path} and was pushed as {given.out_path}; "
                "the published one stays"
            )
        if published.dependencies == given.dependencies:
            signatures += published.signatures
    texts = layouts.fingerprints(output, given)
    ours = [key.sign(text) for key in cache.signing_keys for text in texts]
    return replace(given, signatures=tuple(dict.fromkeys([*ours, *_believable(cache, signatures, texts)])))


def _believable(cache: ServedCache, signatures: Iterable[Signature], texts: tuple[bytes, ...]) -> Iterator[Signature]:
    """Without those in the name of a key that is known and did not make them."""
    known = {**cache.trusted_keys, **{key.name: key.public for key in cache.signing_keys}}
    for signature in signatures:
        if signature.name not in known or _holds(signature, texts, known):
            yield signature


def unbelievable(output: RealisedOutput, given: Realisation, keys: Mapping[str, PublicKey]) -> list[str]:
    """The names of those of these keys that signatures claim to be by, and that did not make them."""
    texts = layouts.fingerprints(output, given)
    return sorted({one.name for one in given.signatures if one.name in keys and not _holds(one, texts, keys)})


def _holds(signature: Signature, texts: tuple[bytes, ...], keys: Mapping[str, PublicKey]) -> bool:
    key = keys.get(signature.name)
    return key is not None and any(key.verify(text, signature) for text in texts)
