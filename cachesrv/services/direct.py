"""NARs that clients write to storage themselves: staged where nobody is served from, read back and checked, published.

What was checked is what is published (`cachesrv.storage.base.DirectStore`). A staged object that was made of parts
changes no more, and has a key of its own. One that came in one piece has its MD5 and size in its key, and nothing else
is taken under it; it is published only as what it was called when it was read.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from itertools import zip_longest
from secrets import token_hex
from typing import TYPE_CHECKING

import structlog
from cachetools import TTLCache
from msgspec.structs import replace

from cachesrv.errors import BadInput, NotFound
from cachesrv.services.part_store import Begun, Staged, StagedPart, announced
from cachesrv.services.read_back import Altered, ReadBack
from cachesrv.services.through import file_name
from cachesrv.storage.base import ArrivedPart, Piece

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Sequence

    from cachesrv.catalog.base import NarRecord
    from cachesrv.nix.hashes import Hash
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.ingest import Ingest
    from cachesrv.services.part_store import PartStore, Place
    from cachesrv.storage.base import DirectStore, LocalCopies, LocalCopy, ObjectStore, SignedPut

_log = structlog.get_logger()

_REMEMBERED = 1000
_REMEMBERED_SECONDS = 10.0
"""After that it is looked up again: another process may have begun it anew, and clients try for longer than this."""


class Direct:
    """`offered`: clients may begin such uploads; `copies`: of what was just pushed. Raises StoreError."""

    def __init__(
        self,
        parts: PartStore,
        storage: ObjectStore,
        store: DirectStore,
        ingest: Ingest,
        copies: LocalCopies,
        *,
        offered: bool,
    ) -> None:
        self.offered = offered
        self.least = store.least
        self.most = store.most
        self._parts = parts
        self._storage = storage
        self._store = store
        self._ingest = ingest
        self._copies = copies
        self._reading: defaultdict[Place, list[ReadBack]] = defaultdict(list)
        self._remembered: TTLCache[Place, Staged] = TTLCache(_REMEMBERED, _REMEMBERED_SECONDS)

    @property
    def largest_piece(self) -> int:
        """Bytes of a NAR that is taken in one piece, at most."""
        return self._store.largest_piece

    async def begin(self, place: Place, size: int) -> Staged:
        """An upload of so many bytes at most."""
        name = f"{token_hex(8)}-{size}"
        return Staged(name, await self._store.begin(place.staged_key(name)))

    def remember(self, place: Place, staged: Staged) -> None:
        """Parts of this upload go there, as was just noted."""
        self._remembered[place] = staged

    async def parts(self, place: Place, staged: Staged) -> list[ArrivedPart] | None:
        """Those of this upload that are there; None when it is not to be had any more."""
        key = place.staged_key(staged.name)
        parts = await self._store.parts(key, staged.id)
        if parts is None and staged.parts and await self._storage.head(key):
            # All of it is there, and nobody has come to check it.
            return [ArrivedPart(number, part.size, part.tag, 0.0) for number, part in enumerate(staged.parts, 1)]
        return parts

    async def announced(self) -> int:
        """Bytes that all uploads may become that are under way."""
        return sum([announced(key) async for key in self._store.unfinished()])

    async def sign(self, place: Place, number: int, md5: bytes) -> SignedPut:
        """For a part with this MD5. Raises BadInput, NotFound when there is no such upload."""
        if not 1 <= number <= self._store.most:
            raise BadInput(f"there is no part {number}: they are counted from 1 to {self._store.most}")
        staged = self._remembered.get(place)
        if staged is None:
            begun = await self._parts.begun(place)
            if begun is None or begun.staged is None:
                raise NotFound("there is no such upload: begin it, or look whether the NAR is there by now")
            staged = begun.staged
            self.remember(place, staged)
        return await self._store.sign(place.staged_key(staged.name), staged.id, number, md5)

    async def sign_whole(self, place: Place, size: int, md5: bytes) -> SignedPut:
        """For a NAR in one piece, the file of so many bytes and with this MD5. Nothing has to be begun."""
        return await self._store.sign_whole(_key_of_whole(place, size, md5.hex()), size, md5)

    async def whole(self, place: Place, size: int, md5: str) -> Staged | None:
        """What was sent in one piece; None when it is not there. Raises BadInput when it is something else."""
        staged = Staged(_name_of_whole(size, md5), "")
        found = await self._store.whole(place.staged_key(staged.name))
        if found is None:
            return None
        if found.size != size:
            raise BadInput(f"a file of {size} bytes was to be sent, and {found.size} are there")
        return replace(staged, parts=(StagedPart(found.tag, size, md5),))

    async def has_whole(self, place: Place, size: int, md5: str) -> bool:
        """Whether there is anything that was sent in one piece."""
        return await self._storage.head(_key_of_whole(place, size, md5)) is not None

    async def forget_whole(self, place: Place, size: int, md5: str) -> None:
        """Remove what was sent in one piece; nothing happens when it is not there."""
        await self._storage.delete([_key_of_whole(place, size, md5)])

    async def complete(self, place: Place, begun: Begun, tags: Sequence[str], md5: Sequence[str]) -> Staged | list[int]:
        """The object, complete, of the parts with these tags, which were sent with these MD5 (base-16) if they are
        known; or the numbers of those that are not there.
        """
        assert begun.staged
        staged, key = begun.staged, place.staged_key(begun.staged.name)
        parts = await self._store.parts(key, staged.id)
        if parts is None:
            complete = [part.tag for part in staged.parts] == list(tags) and await self._storage.head(key)
            return staged if complete else [*range(1, len(tags) + 1)]
        there = {part.number: part for part in parts}
        missing = [number for number, tag in enumerate(tags, 1) if number not in there or there[number].tag != tag]
        if missing:
            return missing
        sent = zip_longest(tags, md5, fillvalue="")
        named = tuple(StagedPart(tag, there[number].size, digest) for number, (tag, digest) in enumerate(sent, 1))
        self._ingest.check_size(sum(part.size for part in named))
        staged = replace(staged, parts=named)
        await self._parts.begin(place, replace(begun, staged=staged))
        await self._store.complete(key, staged.id, tags)
        return staged

    async def make(self, cache: ServedCache, place: Place, nar_hash: Hash, staged: Staged) -> NarRecord:
        """The NAR out of a complete object. Raises BadInput when it is not that, NotFound when it has gone."""
        try:
            return await self._make(cache, place, nar_hash, staged)
        except Altered as error:
            # What happened on the way, and not in storage, need not cost the client anything.
            _log.warning("a NAR is read back once more", cache=place.cache, upload=place.upload, error=str(error))
            return await self._make(cache, place, nar_hash, staged)
        finally:
            self._reading.pop(place, None)

    async def _make(self, cache: ServedCache, place: Place, nar_hash: Hash, staged: Staged) -> NarRecord:
        key, name = place.staged_key(staged.name), file_name(nar_hash)
        back = ReadBack(self._storage.read(key), staged.parts)
        self._reading[place].append(back)
        size = sum(part.size for part in staged.parts)
        piece = None if staged.id else Piece(staged.parts[0].tag, staged.parts[0].md5)
        async with self._copies.begin(cache.key(f"nar/{name}"), size) as copy:
            try:
                return await self._ingest.take_over(
                    cache, name, _copied(back, copy), partial(self._publish, key, copy, piece)
                )
            except BadInput:
                await back.finish_part()
                raise

    async def _publish(self, key: str, copy: LocalCopy, piece: Piece | None, to: str) -> bool:
        created = await self._store.publish(key, to, piece)
        if created:
            await copy.keep()
        return created

    def progress(self, place: Place) -> int:
        """Bytes of it that have been read, those that were read again included."""
        return sum(back.read for back in self._reading.get(place, ()))

    async def abort(self, place: Place, staged: Staged) -> None:
        """Forget the parts; what is complete is left to `PartStore.remove`."""
        self._remembered.pop(place, None)
        await self._store.abort(place.staged_key(staged.name), staged.id)

    async def is_silent(self, place: Place, staged: Staged, before: float) -> bool:
        """Whether no part has come since then, in seconds since the epoch."""
        parts = await self._store.parts(place.staged_key(staged.name), staged.id)
        return all(part.modified < before for part in parts or ())

    async def sweep(self, *, older_than: float) -> int:
        """Forget what is noted nowhere and silent for so many seconds; how many there were."""
        return await self._store.sweep(older_than=older_than)


def _name_of_whole(size: int, md5: str) -> str:
    return f"{md5}-{size}"


def _key_of_whole(place: Place, size: int, md5: str) -> str:
    return place.staged_key(_name_of_whole(size, md5))


async def _copied(chunks: AsyncIterable[bytes], copy: LocalCopy) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        await copy.write(chunk)
        yield chunk
