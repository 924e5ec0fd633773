"""Parts of NARs until all of them are there: objects of the object store, under keys that nobody is served from.

    ~uploads/<cache>/<two characters>/<upload>.begun               what the parts are to become
    ~uploads/<cache>/<two characters>/<upload>.<number>.<sha256>   a part
    ~uploads/<cache>/<two characters>/<upload>.<name>-<size>.staged   what a client has written itself

No cache can have a prefix that begins with a tilde. All that is known of a part stands in its key, so that parts
outlive the server and are there for all of its processes. The two characters are the first of the upload's name: a
folder for each upload would stay for ever, since folders are not removed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import structlog

from cachesrv.errors import BadInput
from cachesrv.nix import json_document
from cachesrv.storage.base import STAGING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from cachesrv.storage.base import ObjectInfo, ObjectStore, ObjectWriter

_log = structlog.get_logger()

_LARGEST_BEGUN = 2**20
_REMOVED_TOGETHER = 1000
_KEY = re.compile(
    r"~uploads/(?P<cache>[^/]+)/../(?P<upload>[0-9a-z]{16,64})\."
    r"(?:begun|(?P<number>[0-9]{6})\.(?P<sha256>[0-9a-f]{64})|[0-9a-f]+-(?P<announced>[0-9]+)\.staged)"
)
_UPLOAD = re.compile(r"[0-9a-z]{16,64}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the parts of one upload lie."""

    cache: str
    upload: str

    @classmethod
    def of(cls, cache: str, upload: str) -> Place:
        """Raises BadInput when an upload cannot be called so."""
        if not _UPLOAD.fullmatch(upload):
            raise BadInput("the name of an upload is 16 to 64 digits and lower-case letters")
        return cls(cache, upload)

    @property
    def folder(self) -> str:
        """What its keys begin with, and some of others."""
        return f"{STAGING}{self.cache}/{self.upload[:2]}/"

    @property
    def begun_key(self) -> str:
        """Of the object that says what it is to become."""
        return f"{self.folder}{self.upload}.begun"

    def part_key(self, number: int, sha256: str) -> str:
        """Of a part."""
        return f"{self.folder}{self.upload}.{number:06}.{sha256}"

    def staged_key(self, name: str) -> str:
        """Of what a client writes itself; each has a name of its own, so that nothing is ever replaced."""
        return f"{self.folder}{self.upload}.{name}.staged"


class StagedPart(msgspec.Struct, frozen=True, array_like=True):
    """What the store calls it by, its size in bytes, and the MD5 (base-16) of what was sent, empty when nobody said."""

    tag: str
    size: int
    md5: str


class Staged(msgspec.Struct, frozen=True):
    """An object that a client writes itself: `name` in its key (`<hex>-<size>`, the size that it may have at most), the
    `id` of its upload in the store, empty where it comes in one piece, and its parts once they are complete.
    """

    name: str
    id: str
    parts: tuple[StagedPart, ...] = ()


class Begun(msgspec.Struct, frozen=True):
    """An upload: of which NAR (`sha256:<nix32>`, bytes), by whom it was begun, and `staged` where it does not come
    through the server.
    """

    nar_hash: str
    nar_size: int
    pusher: str
    staged: Staged | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """`sha256` in base-16, size in bytes."""

    number: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Amount:
    """How many uploads there are, and the bytes of all their parts."""

    uploads: int
    size: int


class PartStore:
    """All of it raises StoreError."""

    def __init__(self, storage: ObjectStore) -> None:
        self._storage = storage

    async def begin(self, place: Place, begun: Begun) -> None:
        """Note an upload, or that somebody goes on with it."""
        await self._storage.put(place.begun_key, msgspec.json.encode(begun), replace=True)

    async def begun(self, place: Place) -> Begun | None:
        """What was noted; None when there is no such upload, or that cannot be read: then it is begun anew."""
        noted = await self._storage.get(place.begun_key, limit=_LARGEST_BEGUN)
        try:
            return None if noted is None else json_document.decode(noted, Begun, what="what was noted")
        except BadInput as error:
            _log.warning("an upload is not noted as it was written", key=place.begun_key, error=str(error))
            return None

    async def is_begun(self, place: Place) -> bool:
        """Whether there is such an upload."""
        return await self._storage.head(place.begun_key) is not None

    def writer(self, place: Place, part: Part) -> AbstractAsyncContextManager[ObjectWriter]:
        """To write a part."""
        return self._storage.writer(place.part_key(part.number, part.sha256), size=part.size)

    def read(self, place: Place, number: int, sha256: str) -> AsyncIterator[bytes]:
        """A part. Raises NotFound."""
        return self._storage.read(place.part_key(number, sha256))

    async def parts(self, place: Place) -> list[Part]:
        """Those that are there, by number."""
        found = []
        async for info, match in self._objects(place):
            if match["number"]:
                found.append(Part(int(match["number"]), info.size, match["sha256"]))
        return sorted(found, key=lambda part: (part.number, part.sha256))

    async def remove(self, place: Place) -> None:
        """Forget an upload; what says that it is one goes first, so that no more parts are taken."""
        await self._storage.delete([place.begun_key])
        keys = [info.key async for info, _ in self._objects(place)]
        for start in range(0, len(keys), _REMOVED_TOGETHER):
            await self._storage.delete(keys[start : start + _REMOVED_TOGETHER])

    async def amount(self) -> Amount:
        """All that is there."""
        places, size = set(), 0
        async for info in self._storage.list(STAGING):
            places.add(_place_of(info.key))
            size += info.size
        return Amount(len(places), size)

    async def silent_since(self, before: float) -> Sequence[Place]:
        """Uploads in which nothing has happened since `before`, in seconds since the epoch."""
        latest: dict[Place, float] = defaultdict(float)
        async for info in self._storage.list(STAGING):
            if place := _place_of(info.key):
                latest[place] = max(latest[place], info.modified)
        return [place for place, at in latest.items() if at < before and await self._is_silent(place, before)]

    async def _is_silent(self, place: Place, before: float) -> bool:
        """Asked once more, of what is noted when somebody goes on with it."""
        info = await self._storage.head(place.begun_key)
        return info is None or info.modified < before

    async def _objects(self, place: Place) -> AsyncIterator[tuple[ObjectInfo, re.Match[str]]]:
        async for info in self._storage.list(place.folder):
            if (match := _KEY.fullmatch(info.key)) and match["upload"] == place.upload:
                yield info, match


def announced(key: str) -> int:
    """Bytes that an object may have that a client writes itself; 0 for others."""
    match = _KEY.fullmatch(key)
    return int(match["announced"] or 0) if match else 0


def _place_of(key: str) -> Place | None:
    match = _KEY.fullmatch(key)
    return Place(match["cache"], match["upload"]) if match else None
