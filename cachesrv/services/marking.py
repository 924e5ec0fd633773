"""Which paths of a cache may go: decided from their numbers, over a bitmap, in short transactions.

Kept is what pins and leases point to, what was used lately, and then one path after the other as it was used last,
each with all that it refers to, until the next one would be too old or would not fit. So the closures that were used
the longest time ago go first, and nothing goes that something kept refers to.

The decision may be overtaken by what happens meanwhile: `Retention.remove_unneeded` looks again.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cachesrv.catalog.base import Catalog

_EXPANDED_TOGETHER = 2_000
_SEEDS_TOGETHER = 4_096
_PARTS = 64


@dataclass(frozen=True, slots=True)
class Policy:
    """What a cache keeps beside what is pinned or leased: paths used within `max_age` seconds, as long as the NARs come
    to `max_size` bytes or less; None for no limit. What was used within `spared` seconds stays whatever it comes to.
    """

    max_age: int | None
    max_size: int | None
    spared: int


class Plan:
    """What may go. `count` paths; `size` is the bytes of the NARs that no kept path of the cache has; `used_before` is
    later than the last use of all of them; those used at `oldest` or later go because there is no room for them.
    """

    def __init__(self, numbers: array[int], kept: Bitmap, *, size: int, used_before: int, oldest: int) -> None:
        self._numbers = numbers
        self._kept = kept
        self.count = sum(1 for number in numbers if number not in kept)
        self.size = size
        self.used_before = used_before
        self.oldest = oldest

    def __contains__(self, number: int) -> bool:
        """Whether this one may go; only for numbers of published paths."""
        return number not in self._kept

    def batches(self, size: int) -> Iterator[list[int]]:
        """All that may go, the latest numbers first: what refers to others is mostly later than they are."""
        batch: list[int] = []
        for number in reversed(self._numbers):
            if number not in self._kept:
                batch.append(number)
                if len(batch) == size:
                    yield batch
                    batch = []
        if batch:
            yield batch


class Bitmap:
    """A set of numbers, an eighth of a byte for each up to the largest."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __contains__(self, number: int) -> bool:
        at = number >> 3
        return at < len(self._bytes) and bool(self._bytes[at] & 1 << (number & 7))

    def add_new(self, numbers: Iterable[int]) -> list[int]:
        """Add them; those that were not in the set."""
        data = self._bytes
        new = []
        for number in numbers:
            at = number >> 3
            if at >= len(data):
                data.extend(bytes(at + 1 - len(data) + (len(data) >> 3)))
            bit = 1 << (number & 7)
            if not data[at] & bit:
                data[at] |= bit
                new.append(number)
        return new

    def discard(self, numbers: Iterable[int]) -> None:
        """Take them out; they have to be in the set."""
        for number in numbers:
            self._bytes[number >> 3] ^= 1 << (number & 7)


class Marking:
    """Decides for one cache, once."""

    def __init__(self, catalog: Catalog, cache: str) -> None:
        self._catalog = catalog
        self._cache = cache
        self._numbers = array("q")
        self._used = array("q")
        self._sizes = array("q")
        self._kept = Bitmap()
        self._twins: dict[int, int] = {}
        self._shared: set[int] = set()

    async def plan(self, policy: Policy, now: int) -> Plan:
        """What may go by this policy at this time."""
        roots = await self._gather(now, now - policy.spared)
        oldest = 0 if policy.max_age is None else now - policy.max_age
        if policy.max_size is None:
            seeds = (number for number, used in zip(self._numbers, self._used, strict=True) if used >= oldest)
            await self._reach([*roots, *seeds])
        else:
            await self._fill(roots, policy.max_size, oldest)
        return self._result(oldest)

    async def _gather(self, now: int, spared: int) -> set[int]:
        """Read all paths; those that stay in any case."""
        roots = await self._catalog.pinned(self._cache, now)
        after = 0
        while page := await self._catalog.uses(self._cache, now, after):
            for use in page:
                self._numbers.append(use.number)
                self._used.append(use.used_at)
                self._sizes.append(use.file_size)
                if use.leased or use.used_at > spared:
                    roots.add(use.number)
            after = page[-1].number
        self._twins = await self._catalog.twins(self._cache)
        self._shared = set(self._twins.values())
        return roots

    async def _reach(self, seeds: Iterable[int], room: Room | None = None) -> bool:
        """Keep these and all that they refer to, when there is room for it."""
        ahead = self._kept.add_new(seeds)
        reached: list[int] = []
        taking = room.begin() if room else None
        while ahead:
            if taking:
                reached += ahead
                if not taking.take(ahead):
                    self._kept.discard(reached)
                    return False
            frontier, ahead = ahead, []
            for start in range(0, len(frontier), _EXPANDED_TOGETHER):
                referred = await self._catalog.referred(frontier[start : start + _EXPANDED_TOGETHER])
                ahead += self._kept.add_new(referred)
        if room and taking:
            room.commit(taking)
        return True

    async def _fill(self, roots: Iterable[int], max_size: int, oldest: int) -> None:
        """Keep the roots, and then what was used last, until something is too old or does not fit."""
        await self._reach(roots)
        room = Room(self, max_size, (number for number in self._numbers if number in self._kept))
        order = sorted(range(len(self._used)), key=self._used.__getitem__, reverse=True)
        for start in range(0, len(order), _SEEDS_TOGETHER):
            seeds = [at for at in order[start : start + _SEEDS_TOGETHER] if self._numbers[at] not in self._kept]
            young = [at for at in seeds if self._used[at] >= oldest]
            if not await self._fit(young, room) or len(young) < len(seeds):
                break

    async def _fit(self, seeds: list[int], room: Room) -> bool:
        """Keep as many of these as there is room for, in order; whether these were all."""
        if await self._reach((self._numbers[at] for at in seeds), room):
            return True
        if len(seeds) == 1:
            return False
        # Each failure costs a walk over all that there is room for: a few large steps instead of many small ones.
        part = -(-len(seeds) // _PARTS)
        for start in range(0, len(seeds), part):
            if not await self._fit(seeds[start : start + part], room):
                return False
        return True

    def _result(self, oldest: int) -> Plan:
        used_before = size = 0
        kept_shared = {self._twins.get(number, number) for number in self._those_sharing() if number in self._kept}
        for number, used, file_size in zip(self._numbers, self._used, self._sizes, strict=True):
            if number not in self._kept:
                used_before = max(used_before, used + 1)
                if number not in self._twins and number not in kept_shared:
                    size += file_size
        return Plan(self._numbers, self._kept, size=size, used_before=used_before, oldest=oldest)

    def _those_sharing(self) -> Iterator[int]:
        yield from self._twins
        yield from self._shared

    def size_of(self, number: int) -> int:
        """The bytes of a path's NAR, 0 for what is not published."""
        at = bisect_left(self._numbers, number)
        return self._sizes[at] if at < len(self._numbers) and self._numbers[at] == number else 0

    def nar_of(self, number: int) -> int | None:
        """What stands for a NAR that several paths have; None for one of its own."""
        return self._twins.get(number, number if number in self._shared else None)


class Room:
    """Bytes that may be kept, less those of the NARs of `kept`."""

    def __init__(self, marking: Marking, size: int, kept: Iterable[int]) -> None:
        self._marking = marking
        self._left = size
        self._shared: set[int] = set()
        all_kept = self.begin()
        all_kept.take(kept)
        self.commit(all_kept)

    def begin(self) -> Taking:
        """Take a part of it."""
        return Taking(self._marking, self._left, self._shared)

    def commit(self, taking: Taking) -> None:
        """It is taken for good."""
        self._left = taking.left
        self._shared |= taking.shared


class Taking:
    """A part of a room, on trial; `shared` stand for NARs that several paths have, which are counted once."""

    def __init__(self, marking: Marking, left: int, known: set[int]) -> None:
        self.left = left
        self.shared: set[int] = set()
        self._marking = marking
        self._known = known

    def take(self, numbers: Iterable[int]) -> bool:
        """Whether there is room for the NARs of these paths as well."""
        for number in numbers:
            nar = self._marking.nar_of(number)
            if nar is None:
                self.left -= self._marking.size_of(number)
            elif nar not in self._known and nar not in self.shared:
                self.shared.add(nar)
                self.left -= self._marking.size_of(number)
        return self.left >= 0
