"""What is told of paths and NARs that go, while they go and in the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cachesrv.catalog.retention import Keeper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cachesrv.catalog.retention import PathSummary, Removed, UnusedNar


class Listener(Protocol):
    """Who is told of each path and each NAR that goes."""

    def path(self, cache: str, path: PathSummary, reason: str) -> None:
        """A path goes."""

    def nar(self, nar: UnusedNar) -> None:
        """A NAR goes."""


class Silent:
    """A Listener that keeps it to itself."""

    def path(self, cache: str, path: PathSummary, reason: str) -> None:
        """See Listener."""

    def nar(self, nar: UnusedNar) -> None:
        """See Listener."""


@dataclass(slots=True)
class Report:
    """What went, or would go: paths, and NARs with their bytes. `path_bytes` are those of the NARs that no path needs
    any more; they stay for a while. `kept`: paths that were to go, and were needed again when it came to that.
    `leased`: NARs that no path needs and a push may rely on, where these alone stay.
    """

    paths: int = 0
    path_bytes: int = 0
    nars: int = 0
    nar_bytes: int = 0
    kept: int = 0
    leased: int = 0
    leased_bytes: int = 0

    def removed(self, listener: Listener, cache: str, removed: Removed, reason: Callable[[PathSummary], str]) -> None:
        """A step was done. Paths that only wait for others to go are not counted as kept."""
        self.paths += len(removed.gone)
        self.kept += sum(1 for why in removed.kept.values() if why is not Keeper.REFERRER)
        for path in removed.gone:
            listener.path(cache, path, reason(path))

    def deleted(self, listener: Listener, nars: Iterable[UnusedNar]) -> None:
        """NARs were deleted."""
        for nar in nars:
            self.nars += 1
            self.nar_bytes += nar.file_size
            listener.nar(nar)
