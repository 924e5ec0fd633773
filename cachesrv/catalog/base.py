"""The contract of the catalog: what is published and what it needs, who may come in, what was refused; in SQL.

What every implementation promises:

- **Atomic.** Each method is one transaction; when it has returned it survives kill -9 and power loss. When its caller
  is cancelled, it is done whole or not at all.
- **Idempotent.** To write again what is there already changes nothing and is no error.
- Reads see every write that returned before they began, on this process and on all others.
- Batches have no limit that a caller has to know; they are cut into statements inside.
- Raises StoreError when the store fails (StoreFull, StoreUnavailable where that is known to be why), BadInput for
  values that no store takes (numbers of more than 64 bits, text that is not Unicode), and nothing else but what a
  method names. A store that failed says nothing about what it holds.

Names of caches are stored as they are configured; a `scope` is the storage prefix that caches with the same NARs
share (`cachesrv.storage.base` keys begin with it). Times are whole seconds since the epoch. The catalog is never
written inside a GET.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cachesrv.catalog.retention import Retention

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence

    from cachesrv.catalog.retention import Reliance


@dataclass(frozen=True, slots=True)
class PathRecord:
    """A published path. `narinfo` is its rendered text; `references` are base names, itself included where it refers
    to itself, and come back sorted, each once; `nar_hash` is `sha256:<nix32>`; `nar_key` is the storage key of its NAR;
    sizes in bytes; `pusher` is who published it first, where that is known.
    """

    cache: str
    hash_part: str
    name: str
    narinfo: bytes
    nar_key: str
    nar_hash: str
    nar_size: int
    file_size: int
    references: tuple[str, ...]
    deriver: str | None
    ca: str | None
    registered_at: int
    pusher: str | None = None


@dataclass(frozen=True, slots=True)
class NarRecord:
    """A NAR whose bytes were verified: hashes are `sha256:<nix32>`, sizes in bytes, `compression` a Nix name;
    `listing` the zstd-compressed `.ls` object, kept until a path that uses it is published.
    """

    key: str
    scope: str
    compression: str
    file_hash: str
    file_size: int
    nar_hash: str
    nar_size: int
    listing: bytes | None
    verified_at: int


@dataclass(frozen=True, slots=True)
class ConflictRecord:
    """A push that would have changed a published path: the build is not deterministic. `publisher` is the `pusher` of
    the published path.
    """

    cache: str
    hash_part: str
    name: str
    published_nar_hash: str
    refused_nar_hash: str
    pusher: str
    at: int
    publisher: str | None = None


@dataclass(frozen=True, slots=True)
class RefusalRecord:
    """A push of a path that was refused by the rules of the cache, or for what is wrong with it: `reason`, a line."""

    cache: str
    hash_part: str
    name: str
    reason: str
    pusher: str
    at: int


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A token by its sha256 (base-16); `caches` are globs, `permissions` of pull, push, delete, admin; `expires_at`
    and `revoked_at` are None where they do not apply.
    """

    name: str
    sha256: str
    caches: tuple[str, ...]
    permissions: tuple[str, ...]
    created_at: int
    expires_at: int | None
    revoked_at: int | None


class Catalog(Retention, Protocol):
    """See the module's docstring for what all implementations promise."""

    async def publish(self, records: Sequence[PathRecord], reliance: Reliance | None = None) -> int:
        """Make paths known, or update known ones: all may change but the name, the NAR hash, and who registered it
        first and when. References need not be published. Raises Conflict, and writes nothing, when one of them is
        published with another NAR hash or another name; BadInput when a reference is no base name; BeingRemoved when a
        NAR or an object of theirs is just being deleted. Returns the fence.

        With a `reliance`, that of a push, it counts as use of paths that are published already, and it raises
        MissingReferences or MissingNar unless all that they rely on is there, verified NARs among it.

        The listings of their NARs have been written to storage by now, and are kept here no longer.
        """

    async def restore(
        self, records: Sequence[PathRecord], *, used_at: int, objects: Collection[str] = ()
    ) -> dict[str, PathRecord]:
        """Make paths of one cache known that are not known, as if they were used last at that time. What is published
        stays as it is; where that is something else than the record says (who published it and when does not count),
        it is returned, by hash part. Raises as `publish` does, but no Conflict with what is published, and BeingRemoved
        also for these `objects`.
        """

    async def path(self, cache: str, hash_part: str) -> PathRecord | None:
        """A published path."""

    def lacks(self, cache: str, hash_part: str) -> bool:
        """Whether it is certain that a path is not published: in microseconds, and so without waiting for a disk or
        another machine. False too where that does not suffice to tell. To be called from the thread of the event loop.
        """

    async def paths(self, cache: str, hash_parts: Collection[str]) -> dict[str, PathRecord]:
        """Those of them that are published, by hash part."""

    async def present(self, cache: str, hash_parts: Collection[str]) -> set[str]:
        """Those of them that are published."""

    async def nar_hashes(self, cache: str, hash_parts: Collection[str]) -> dict[str, str]:
        """The NAR hashes (`sha256:<nix32>`) of those of them that are published, by hash part."""

    def scan(self, cache: str, after: str = "") -> AsyncIterator[PathRecord]:
        """All published paths by hash part, beyond `after`, in bounded memory and short transactions."""

    async def referrers(self, cache: str, hash_part: str) -> set[str]:
        """Hash parts of the published paths that refer to this one, without itself."""

    async def dangling(self, cache: str, limit: int) -> list[tuple[str, str]]:
        """References of published paths to what is not published in this cache: hash part of the path and base name
        that it refers to, in order, at most `limit` of them. Goes over all names of the cache.
        """

    async def remove(self, cache: str, hash_parts: Collection[str]) -> None:
        """Forget paths; those that are not there are passed over."""

    async def remove_dangling(self, cache: str, hash_parts: Collection[str]) -> set[str]:
        """Forget those of the paths that refer to what is not published in this cache; which they were."""

    async def count(self, cache: str) -> tuple[int, int]:
        """How many paths are published, and the sum of their NAR sizes."""

    async def touch(self, cache: str, last_used: Mapping[str, int]) -> None:
        """Note when paths were last used; never moves back, passes over what is not there."""

    async def touch_nars(self, keys: Collection[str], at: int) -> None:
        """Note that the paths with these NARs were used; as `touch`."""

    async def put_nar(self, record: NarRecord, *, leased_until: int | None = None) -> int:
        """Note a verified NAR, which stays until then at least; one with the same key is replaced. Returns the fence.
        Raises BeingRemoved.
        """

    async def put_nars(self, records: Collection[NarRecord], *, leased_until: int | None = None) -> int:
        """Note NARs, all or none, each as `put_nar` does; no two with the same key."""

    async def nar(self, key: str) -> NarRecord | None:
        """A verified NAR by its key."""

    async def listings(self, keys: Collection[str]) -> dict[str, bytes]:
        """The listings of those NARs of which one is kept, by their keys."""

    async def nars_by_hash(self, scope: str, nar_hashes: Collection[str]) -> dict[str, NarRecord]:
        """Verified NARs by NAR hash; where several have it, the one verified first. Their listing is left out."""

    async def nars_alike(self, scope: str, nar_hash: str) -> list[NarRecord]:
        """All verified NARs with this hash, by the time at which they were verified. Their listing is left out."""

    async def remove_nars(self, keys: Collection[str]) -> None:
        """Forget NARs; those that are not there are passed over."""

    async def record_conflicts(self, records: Sequence[ConflictRecord]) -> None:
        """Remember refused pushes; the same one again (cache, path, both hashes, pusher) counts once, at its latest
        time. Of each path the latest are kept, and of all paths a limited number.
        """

    async def conflicts(self, cache: str, hash_part: str | None = None) -> list[ConflictRecord]:
        """Refused pushes, latest first."""

    async def record_refusals(self, records: Sequence[RefusalRecord]) -> None:
        """Remember refused pushes: of each path the latest, of all paths a limited number."""

    async def refusal(self, cache: str, hash_part: str) -> RefusalRecord | None:
        """The push of this path that was refused last, when one was."""

    async def put_token(self, record: TokenRecord) -> None:
        """Add a token. Raises Conflict when its name is in use by one that is not revoked, or its hash by another."""

    async def token(self, sha256: str) -> TokenRecord | None:
        """The token with this hash, revoked and expired ones too."""

    async def tokens(self) -> list[TokenRecord]:
        """All tokens, by name."""

    async def revoke_token(self, name: str, at: int) -> bool:
        """Whether there was one to revoke."""

    async def close(self) -> None:
        """Wait for what is running, then let go of connections and threads; may be called again. Whatever else is
        called afterwards raises StoreUnavailable.
        """
