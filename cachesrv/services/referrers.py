"""All paths that lead to some paths by their references: who needs them, however indirectly."""

from __future__ import annotations

from array import array
from itertools import chain
from typing import TYPE_CHECKING

from cachesrv.services.marking import Bitmap

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cachesrv.catalog.base import Catalog

_TOGETHER = 2_000


class Referrers:
    """By their numbers, and by how many references away they are. The paths themselves are among them, with none."""

    def __init__(self, catalog: Catalog, numbers: Iterable[int]) -> None:
        self._catalog = catalog
        self._known = Bitmap()
        self._levels = [array("q", self._known.add_new(numbers))]

    @classmethod
    async def of(cls, catalog: Catalog, numbers: Iterable[int]) -> Referrers:
        """Those of the paths with these numbers."""
        found = cls(catalog, numbers)
        while found._levels[-1]:
            found._levels.append(await found._next())
        return found

    async def _next(self) -> array[int]:
        last, ahead = self._levels[-1], array("q")
        for start in range(0, len(last), _TOGETHER):
            ahead.extend(self._known.add_new(await self._catalog.referring(last[start : start + _TOGETHER])))
        return ahead

    def __contains__(self, number: int) -> bool:
        return number in self._known

    @property
    def numbers(self) -> array[int]:
        """They and all that need them, in ascending order."""
        return array("q", sorted(chain.from_iterable(self._levels)))

    @property
    def direct(self) -> array[int]:
        """Other paths that refer to one of them."""
        return self._levels[1]

    @property
    def count(self) -> int:
        """How many other paths need them."""
        return sum(map(len, self._levels[1:]))

    async def way(self, number: int) -> list[int]:
        """A shortest way from one of them to the paths, both ends included."""
        level = next(level for level, members in enumerate(self._levels) if number in members)
        way = [number]
        for members in reversed(self._levels[:level]):
            referred = await self._catalog.referred([way[-1]])
            # What has gone since then leads nowhere.
            way += [other for other in sorted(referred) if other in members][:1]
        return way
