"""The catalog in SQL, continued: what keeps paths and how they go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.catalog import doom, leases, marking, pins, removal

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from cachesrv.catalog.database import Database
    from cachesrv.catalog.retention import (
        PathSummary,
        PathUse,
        PinRecord,
        Removal,
        RemovalRecord,
        Removed,
        UnusedNar,
    )


class SqlRetention:
    """Implements `cachesrv.catalog.retention.Retention`."""

    _database: Database

    async def pin(
        self, cache: str, name: str, base_name: str, *, keep: int, expires_at: int | None, at: int, by: str
    ) -> None:
        await self._database.write(pins.pin, cache, name, base_name, keep=keep, expires_at=expires_at, at=at, by=by)

    async def unpin(self, cache: str, name: str) -> bool:
        return await self._database.write(pins.unpin, cache, name)

    async def pins(self, cache: str) -> list[PinRecord]:
        return await self._database.read(pins.find_all, cache)

    async def pinned(self, cache: str, now: int) -> set[int]:
        return await self._database.read(pins.pinned, cache, now)

    async def lease(self, cache: str, hash_parts: Collection[str], until: int) -> None:
        await self._database.write(leases.lease, cache, hash_parts, until)

    async def lease_nars(self, scope: str, nar_hashes: Collection[str], until: int) -> None:
        await self._database.write(leases.lease_nars, scope, nar_hashes, until)

    async def uses(self, cache: str, now: int, after: int = 0) -> list[PathUse]:
        return await self._database.read(marking.uses, cache, now, after)

    async def referred(self, numbers: Collection[int]) -> list[int]:
        return await self._database.read(marking.referred, numbers)

    async def referring(self, numbers: Collection[int]) -> list[int]:
        return await self._database.read(marking.referring, numbers)

    async def twins(self, cache: str) -> dict[int, int]:
        return await self._database.read(marking.twins, cache)

    async def numbers(self, cache: str, hash_parts: Collection[str]) -> dict[str, int]:
        return await self._database.read(marking.numbers, cache, hash_parts)

    async def summaries(self, cache: str, numbers: Collection[int]) -> list[PathSummary]:
        return await self._database.read(marking.summaries, cache, numbers)

    async def remove_unneeded(self, removal_: Removal, numbers: Collection[int]) -> Removed:
        return await self._database.write(removal.remove_unneeded, removal_, numbers)

    async def unused_nars(self, scope: str, before: int, now: int, after: str = "") -> list[UnusedNar]:
        return await self._database.read(doom.unused, scope, before, now, after)

    async def stray_nars(self, keys: Collection[str]) -> set[str]:
        return await self._database.read(doom.strays, keys)

    async def release_strays(self, keys: Collection[str], at: int) -> set[str]:
        return await self._database.write(doom.release_strays, keys, at)

    async def doom(self, keys: Collection[str], *, holder: str, before: int, now: int) -> list[str]:
        return await self._database.write(doom.doom_nars, keys, holder=holder, before=before, now=now)

    async def doom_damaged(self, keys: Collection[str], *, holder: str) -> list[str]:
        return await self._database.write(doom.doom_damaged, keys, holder=holder)

    async def doom_unpublished(
        self, caches: Collection[str], objects: Mapping[str, Collection[str]], *, holder: str
    ) -> list[str]:
        return await self._database.write(doom.doom_unpublished, caches, objects, holder=holder)

    async def doomed(self) -> list[str]:
        return await self._database.read(doom.some_doomed)

    async def settle(self, keys: Collection[str]) -> None:
        await self._database.write(doom.settle, keys)

    async def fence(self, objects: Collection[str] = ()) -> int:
        return await self._database.read(doom.fence, objects)

    async def removal(self, cache: str, hash_part: str) -> RemovalRecord | None:
        return await self._database.read(removal.find, cache, hash_part)

    async def removals(self, cache: str, since: int) -> Sequence[RemovalRecord]:
        return await self._database.read(removal.later, cache, since)

    async def forget_removals(self, before: int) -> None:
        await self._database.write(removal.forget, before)

    async def lock(self, name: str, holder: str, *, now: int, until: int, in_place_of: str | None = None) -> str:
        return await self._database.write(leases.lock, name, holder, now=now, until=until, in_place_of=in_place_of)

    async def unlock(self, name: str, holder: str) -> None:
        await self._database.write(leases.unlock, name, holder)

    async def note(self, name: str, value: str) -> None:
        await self._database.write(leases.note, name, value)

    async def noted(self, name: str) -> str | None:
        return await self._database.read(leases.noted, name)
