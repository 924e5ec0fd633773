"""What a binary cache holds beside narinfos and NARs: listings, build logs, realisations, the index of debug info.

Small objects that clients write and read by name. What is malformed is refused, so that what lies in storage is what
its name says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix import debuginfo, listing, realisation
from cachesrv.nix.store_path import StorePath, is_hash_part
from cachesrv.services.disk_room import DiskRoom
from cachesrv.services.patience import waiting
from cachesrv.services.realisations import Realisations

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable

    from cachesrv.catalog.base import Catalog
    from cachesrv.services.caches import ServedCache
    from cachesrv.storage.base import ObjectInfo, ObjectStore

JSON_TYPE = "application/json"
LOG_TYPE = "text/plain; charset=utf-8"
LOG_LIMIT = 256 * 1024 * 1024
"""Bytes of a build log, at most; a longer one is refused."""


@dataclass(frozen=True, slots=True)
class MetadataKind:
    """A kind of object: what it is called in metrics, its names, the type of its contents, and its largest size."""

    route: str
    pattern: re.Pattern[str]
    content_type: str
    limit: int


LISTING = MetadataKind("listing", re.compile(r"([^/]+)\.ls"), JSON_TYPE, listing.MAX_LISTING_SIZE)
LOG = MetadataKind("log", re.compile(r"log/([^/]+)"), LOG_TYPE, LOG_LIMIT)
REALISATION = MetadataKind(
    "realisation", re.compile(r"realisations/([^/]+)\.doi"), JSON_TYPE, realisation.DEFAULT_LIMIT
)
BUILD_TRACE = MetadataKind(
    "realisation", re.compile(r"build-trace-v2/([^/]+)/([^/]+)\.doi"), JSON_TYPE, realisation.DEFAULT_LIMIT
)
DEBUGINFO = MetadataKind(
    "debuginfo", re.compile(r"debuginfo/([0-9a-f]{40})(\.debug)?"), JSON_TYPE, debuginfo.DEFAULT_LIMIT
)
KINDS = (LISTING, LOG, REALISATION, BUILD_TRACE, DEBUGINFO)


def kind_of(name: str) -> MetadataKind | None:
    """The kind of the object with this name, such as `log/<derivation>`; None when there is no such kind."""
    return next((kind for kind in KINDS if kind.pattern.fullmatch(name)), None)


class Metadata:
    """Keeps such objects, and finds them. `patience`: seconds until it has to be known whether one is there."""

    def __init__(
        self, storage: ObjectStore, catalog: Catalog, *, patience: float, room: DiskRoom | None = None
    ) -> None:
        self._room = room or DiskRoom.unlimited()
        self._storage = storage
        self._realisations = Realisations(storage, catalog)
        self._patience = patience

    async def find(self, key: str) -> ObjectInfo | None:
        """What is known of an object, or None when it is not there. Raises StoreError."""
        async with waiting(self._patience, f"whether {key} is there"):
            return await self._storage.head(key)

    async def put(self, cache: ServedCache, kind: MetadataKind, name: str, data: bytes) -> None:
        """Keep an object (no log), if it is what its name says. Raises BadInput; what `Realisations.put` raises."""
        parts = _parts(kind, name)
        await self._room.for_records()
        if kind is LISTING:
            _check_listing(parts[0], data)  # and no more: our own, made from the NAR, comes with its path
        elif kind is DEBUGINFO:
            debuginfo.parse(data)
            await self._storage.put(cache.key(name), data)
        else:
            await self._realisations.put(cache, _output(kind, parts), data)

    async def missing_realisations(self, cache: ServedCache, names: Iterable[str]) -> list[str]:
        """Those of these objects that are not there. Raises BadInput."""
        return [
            realisation.object_name(output)
            for output in await self._realisations.missing(cache, map(output_named, names))
        ]

    async def put_log(self, cache: ServedCache, name: str, chunks: AsyncIterable[bytes]) -> None:
        """Keep a build log, in the place of an earlier one. Raises BadInput."""
        StorePath.parse(_parts(LOG, name)[0])
        await self._room.for_nar()
        size = 0
        async with self._storage.writer(cache.key(name)) as writer:
            async for chunk in chunks:
                size += len(chunk)
                if size > LOG_LIMIT:
                    raise TooLarge(f"a build log has at most {LOG_LIMIT} bytes")
                await writer.write(chunk)
            await writer.commit(replace=True)


def _parts(kind: MetadataKind, name: str) -> tuple[str, ...]:
    match = kind.pattern.fullmatch(name)
    if match is None:
        raise BadInput(f"{name[:200]!r} is not the name of a {kind.route}")
    return match.groups()


def output_named(name: str) -> realisation.RealisedOutput:
    """The output that the object of this name speaks of, in either layout. Raises BadInput."""
    kind = kind_of(name)
    if kind not in {REALISATION, BUILD_TRACE}:
        raise BadInput(f"{name[:200]!r} is not the name of a realisation")
    assert kind is not None
    return _output(kind, _parts(kind, name))


def _output(kind: MetadataKind, parts: tuple[str, ...]) -> realisation.RealisedOutput:
    if kind is REALISATION:
        return realisation.OutputId.parse(parts[0])
    return realisation.TracedOutput.parse(*parts)


def _check_listing(hash_part: str, data: bytes) -> None:
    if not is_hash_part(hash_part):
        raise BadInput(f"{hash_part[:100]!r} is not the hash part of a store path")
    listing.parse(data)
