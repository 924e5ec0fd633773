"""The contract of the catalog, continued: what keeps paths, how they go, and what is remembered of those that went.

What holds beside what `cachesrv.catalog.base` says:

- **Nothing goes from under what stays.** `remove_unneeded` takes away paths in one transaction that looks again
  whether somebody needs them. `publish` looks in its own transaction whether what a path relies on is still there. So
  nobody has to be kept out while it is decided what may go.
- **What is being deleted is not used.** Objects are *doomed* in the transaction that takes their users away, then
  deleted from storage, then `settle`d. Until then `publish` and `put_nar` refuse them with BeingRemoved. Who wrote an
  object before its record has to compare the `fence` from before the write with the one that `publish` and `put_nar`
  return: when it moved, something was deleted meanwhile, and storage has to be asked whether the object is still there.
- **Who needs a NAR is derived**, from the paths that name it, and never counted.

Paths are also known by *numbers*: integers, small and dense, so that sets of millions of them fit into bitmaps. A
number stands for the same path as long as that is published; then it may come to stand for another one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Generation:
    """What a pin pointed to from `at` on; `by` is who said so."""

    base_name: str
    at: int
    by: str


@dataclass(frozen=True, slots=True)
class PinRecord:
    """A named root. The latest `keep` paths that it pointed to are kept with all that they refer to, latest first in
    `generations`, until it expires.
    """

    cache: str
    name: str
    keep: int
    expires_at: int | None
    generations: tuple[Generation, ...]


@dataclass(frozen=True, slots=True)
class PathUse:
    """`used_at` is when the path was published or last asked for; `file_size` the bytes of its NAR as stored."""

    number: int
    used_at: int
    leased: bool
    file_size: int


@dataclass(frozen=True, slots=True)
class PathSummary:
    """What has to be said of a path that may go."""

    number: int
    hash_part: str
    name: str
    nar_key: str
    file_size: int
    used_at: int

    @property
    def base_name(self) -> str:
        return f"{self.hash_part}-{self.name}"


class Keeper(Enum):
    """Why a path stays that was to be removed."""

    REFERRER = "another path refers to it"
    PIN = "it is pinned"
    LEASE = "a push relies on it"
    USE = "it was used meanwhile"


@dataclass(frozen=True, slots=True)
class Removal:
    """How paths of a cache are removed, by whom and why (a line on each). `holder` is who holds the lock `MAINTENANCE`.

    `objects` gives the keys of the objects that belong to the path with a hash part alone; they go with it, unless it
    is published in one of the `siblings` too, other caches with the same storage prefix. Spared are paths that were
    used at `used_before` or later, those that a lease protects (unless `despite_leases`), those that are pinned (unless
    `despite_pins`), and always those that other paths refer to.
    """

    cache: str
    objects: Callable[[str], Collection[str]]
    holder: str
    reason: Callable[[PathSummary], str]
    by: str
    at: int
    siblings: Collection[str] = ()
    used_before: int | None = None
    despite_leases: bool = False
    despite_pins: bool = False


@dataclass(frozen=True, slots=True)
class Removed:
    """`gone` come before what they refer to. `doomed` are the keys of the objects to be deleted now, in this order, and
    then to be settled; `referred` the numbers of the published paths that those which have gone referred to; `kept`
    says why the others stay.
    """

    gone: list[PathSummary]
    kept: dict[int, Keeper]
    referred: set[int]
    doomed: list[str]


@dataclass(frozen=True, slots=True)
class RemovalRecord:
    """A path that was taken away, the last time that this happened."""

    cache: str
    hash_part: str
    name: str
    nar_hash: str
    reason: str
    by: str
    at: int


@dataclass(frozen=True, slots=True)
class UnusedNar:
    """A NAR that no path names; `unused_since` is when the last one went, or when it was stored."""

    key: str
    file_size: int
    unused_since: int


@dataclass(frozen=True, slots=True)
class Reliance:
    """What has to hold when paths are published: by cache, the hash parts that have to be published, by then or with
    them; and the keys of objects beside the NARs that must not be about to be deleted.
    """

    references: Mapping[str, Collection[str]] = field(default_factory=dict)
    objects: Collection[str] = ()


MAINTENANCE = "maintenance"
"""The lock of whoever deletes."""


class Retention(Protocol):
    """See the module's docstring for what all implementations promise."""

    async def pin(
        self, cache: str, name: str, base_name: str, *, keep: int, expires_at: int | None, at: int, by: str
    ) -> None:
        """Let the pin point to a published path; it is made when it is missing. Where it points to it already, only
        `keep` and `expires_at` change. Raises NotFound.
        """

    async def unpin(self, cache: str, name: str) -> bool:
        """Whether there was such a pin."""

    async def pins(self, cache: str) -> list[PinRecord]:
        """All pins by name, those that have expired too."""

    async def pinned(self, cache: str, now: int) -> set[int]:
        """Numbers of the published paths that pins point to which have not expired."""

    async def lease(self, cache: str, hash_parts: Collection[str], until: int) -> None:
        """Let those of them that are published stay until then at least."""

    async def lease_nars(self, scope: str, nar_hashes: Collection[str], until: int) -> None:
        """Let verified NARs stay until then at least."""

    async def uses(self, cache: str, now: int, after: int = 0) -> list[PathUse]:
        """The next published paths by number, beyond `after`; none when that was all."""

    async def referred(self, numbers: Collection[int]) -> list[int]:
        """Numbers of all that these paths refer to, each once; some may be of paths that are not published."""

    async def referring(self, numbers: Collection[int]) -> list[int]:
        """Numbers of the published paths that refer to any of these, each once."""

    async def twins(self, cache: str) -> dict[int, int]:
        """Paths whose NAR another path of the cache with a smaller number has too; to the smallest such number."""

    async def numbers(self, cache: str, hash_parts: Collection[str]) -> dict[str, int]:
        """Numbers of those that are published, by hash part."""

    async def summaries(self, cache: str, numbers: Collection[int]) -> list[PathSummary]:
        """What there is to say of those that are published in the cache, by number."""

    async def remove_unneeded(self, removal: Removal, numbers: Collection[int]) -> Removed:
        """Remove paths, but for those that something keeps; a few hundred at a time, those that refer to others before
        them or together with them. Raises LockLost.
        """

    async def unused_nars(self, scope: str, before: int, now: int, after: str = "") -> list[UnusedNar]:
        """The next NARs by key, beyond `after`, that no path has named since `before` and no lease protects; none when
        that was all.
        """

    async def stray_nars(self, keys: Collection[str]) -> set[str]:
        """Those of these objects that nothing is known of: no path names them as its NAR, none did, nobody verified
        them, and they are not about to be deleted.
        """

    async def release_strays(self, keys: Collection[str], at: int) -> set[str]:
        """Note that no path has named these since `at`, if they are still stray: so they become garbage like others.
        Those that were.
        """

    async def doom(self, keys: Collection[str], *, holder: str, before: int, now: int) -> list[str]:
        """Forget NARs, those that are still as `unused_nars` says or of which nothing is known; their keys, which are
        to be deleted now and then to be settled. Raises LockLost.
        """

    async def doom_damaged(self, keys: Collection[str], *, holder: str) -> list[str]:
        """Forget NARs that no path names, whatever protects them; their keys, which are to be deleted now and then to
        be settled. Raises LockLost.
        """

    async def doom_unpublished(
        self, caches: Collection[str], objects: Mapping[str, Collection[str]], *, holder: str
    ) -> list[str]:
        """Of objects by the hash part that they belong to, the keys of those whose paths are published in none of these
        caches; they are to be deleted now and then to be settled. Raises LockLost.
        """

    async def doomed(self) -> list[str]:
        """Keys of objects that were doomed and not settled: those to be deleted first; none when there are none."""

    async def settle(self, keys: Collection[str]) -> None:
        """The objects are gone from storage; moves the fence."""

    async def fence(self, objects: Collection[str] = ()) -> int:
        """See the module's docstring. Raises BeingRemoved when one of these objects is doomed."""

    async def removal(self, cache: str, hash_part: str) -> RemovalRecord | None:
        """How a path was taken away, when it was."""

    async def removals(self, cache: str, since: int) -> Sequence[RemovalRecord]:
        """The latest of those taken away since then, latest first, at most a thousand."""

    async def forget_removals(self, before: int) -> None:
        """Remember no longer what was taken away before then."""

    async def lock(self, name: str, holder: str, *, now: int, until: int, in_place_of: str | None = None) -> str:
        """Take a lock, or prolong it, until then, when nobody holds it (or no longer, or `in_place_of` does); who has
        it after that. Who else has it keeps it for no longer than that either.
        """

    async def unlock(self, name: str, holder: str) -> None:
        """Give it back, if this holder has it."""

    async def note(self, name: str, value: str) -> None:
        """Keep a small text."""

    async def noted(self, name: str) -> str | None:
        """What was kept last under this name."""
