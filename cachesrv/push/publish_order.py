"""Which paths may be published when: a path after its NAR is there, and never before the paths that it refers to.

A state machine without I/O. Several requests may be under way: `take` what one is to hold, then `settle` it. What a
path refers to has been published before, or comes before it in the same request.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cachesrv.nix.path_info import PathInfo
    from cachesrv.nix.store_path import StorePath


class PublishOrder:
    """Over paths given with references first. References that are not among them count as there."""

    def __init__(self, infos: Sequence[PathInfo]) -> None:
        self._infos = infos
        self._position = {info.store_path: position for position, info in enumerate(infos)}
        self._referrers: dict[StorePath, list[StorePath]] = {info.store_path: [] for info in infos}
        self._lacking: dict[StorePath, int] = {}
        for info in infos:
            references = [path for path in info.references if path in self._position and path != info.store_path]
            self._lacking[info.store_path] = 1 + len(references)  # one for the NAR
            for path in references:
                self._referrers[path].append(info.store_path)
        self._ready: list[int] = []
        self._open = set(self._position)
        self._taken: set[StorePath] = set()

    @property
    def is_ready(self) -> bool:
        """Whether there is something to take."""
        return bool(self._ready)

    @property
    def is_done(self) -> bool:
        """Whether every path was published or has failed."""
        return not self._open

    def is_open(self, path: StorePath) -> bool:
        """Whether it may still be published."""
        return path in self._open

    def nar_is_there(self, path: StorePath) -> None:
        """To be told once for each path that has not failed."""
        self._one_less(path)

    def take(self, most_paths: int, most_references: int, bringing: Iterable[StorePath] = ()) -> list[PathInfo]:
        """Paths for the next request, each after those of them that it refers to; one path at least when there is
        one, however many references it has. The request brings the NARs of the paths `bringing`.
        """
        request = _Request(self._lacking, self._position)
        for path in bringing:
            if path in self._open:
                request.one_less(path)
        taken: list[PathInfo] = []
        while len(taken) < most_paths and (queue := _first(self._ready, request.ready)):
            info = self._infos[queue[0]]
            most_references -= len(info.references)
            if taken and most_references < 0:
                break
            heapq.heappop(queue)
            if info.store_path in self._open:
                taken.append(info)
                for referrer in self._referrers[info.store_path]:
                    request.one_less(referrer)
        self._taken.update(info.store_path for info in taken)
        return taken

    def put_back(self, path: StorePath) -> None:
        """What was taken is to be taken once more, unless it has failed meanwhile."""
        self._taken.discard(path)
        self._offer(path)

    def settle(self, published: Iterable[StorePath], failed: Iterable[StorePath]) -> dict[StorePath, StorePath]:
        """Tell how it went with these. Returns the paths that cannot be published any more because they refer,
        directly or not, to one that failed: each with that one.
        """
        for path in published:
            if path in self._open:
                self._open.discard(path)
                for referrer in self._referrers[path]:
                    self._one_less(referrer)
        pending = [(path, path) for path in failed]
        self._open.difference_update(path for path, _ in pending)
        hopeless: dict[StorePath, StorePath] = {}
        while pending:
            path, cause = pending.pop()
            for referrer in self._referrers[path]:
                if referrer in self._open:
                    self._open.discard(referrer)
                    hopeless[referrer] = cause
                    pending.append((referrer, cause))
        return hopeless

    def _one_less(self, path: StorePath) -> None:
        self._lacking[path] -= 1
        self._offer(path)

    def _offer(self, path: StorePath) -> None:
        if self._lacking[path] == 0 and path in self._open and path not in self._taken:
            heapq.heappush(self._ready, self._position[path])


class _Request:
    """What becomes ready by what the request itself holds."""

    def __init__(self, lacking: dict[StorePath, int], position: dict[StorePath, int]) -> None:
        self._lacking = lacking
        self._position = position
        self._brought: Counter[StorePath] = Counter()
        self.ready: list[int] = []

    def one_less(self, path: StorePath) -> None:
        self._brought[path] += 1
        if self._brought[path] == self._lacking[path]:
            heapq.heappush(self.ready, self._position[path])


def _first(one: list[int], other: list[int]) -> list[int]:
    """That of two heaps which begins with the lesser position; an empty one if both are."""
    return other if other and (not one or other[0] < one[0]) else one
