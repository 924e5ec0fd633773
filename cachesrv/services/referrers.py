"""All paths that lead to one path by their references: who needs it, however indirectly."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from cachesrv.services.marking import Bitmap

if TYPE_CHECKING:
    from cachesrv.catalog.base import Catalog

_TOGETHER = 2_000


class Referrers:
    """By their numbers, and by how many references away they are. The path itself is among them, with none."""

    def __init__(self, catalog: Catalog, number: int) -> None:
        self._catalog = catalog
        self._levels = [array("q", [number])]
        self._known = Bitmap()
        self._known.add_new([number])

    @classmethod
    async def of(cls, catalog: Catalog, number: int) -> Referrers:
        """Those of the path with this number."""
        found = cls(catalog, number)
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
        """It and all that need it, in order."""
        return array("q", sorted(number for level in self._levels for number in level))

    @property
    def direct(self) -> int:
        """How many other paths refer to it."""
        return len(self._levels[1])

    @property
    def count(self) -> int:
        """How many other paths need it."""
        return sum(map(len, self._levels[1:]))

    async def chain(self, number: int) -> list[int]:
        """A shortest way from one of them to the path, both included."""
        level = next(level for level, members in enumerate(self._levels) if number in members)
        chain = [number]
        for members in reversed(self._levels[:level]):
            referred = await self._catalog.referred([chain[-1]])
            # What has gone since then leads nowhere.
            chain += [other for other in sorted(referred) if other in members][:1]
        return chain
