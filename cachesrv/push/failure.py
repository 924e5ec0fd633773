"""Why a path will not be published: in words for people, and by a name that programs can decide by.

not-found            it is not valid in the store, or what was named leads nowhere
bad-input            it is not what can be pushed
damaged              its contents are not those that the store's database states
too-large            … for the cache
conflict             the cache has it with other contents
missing-references   it refers to what is not in the cache, or could not be published either
missing-nar          the server lost its NAR
unsigned             the cache wants a signature by one of its trusted keys
refused              the server's rules do not let it in otherwise
store                the local store, or the Nix daemon, failed
server               the server failed, each time
failed               anything else
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cachesrv.errors import (
    BadInput,
    Conflict,
    DaemonError,
    Mismatch,
    MissingNar,
    MissingReferences,
    NotFound,
    Refused,
    ServerError,
    StoreError,
    TooLarge,
    Unsigned,
)

if TYPE_CHECKING:
    from cachesrv.errors import CachesrvError

MISSING_NAR = "missing-nar"
MISSING_REFERENCES = "missing-references"
CONFLICT = "conflict"

_KINDS: dict[type[Exception], str] = {
    NotFound: "not-found",
    Mismatch: "damaged",
    TooLarge: "too-large",
    BadInput: "bad-input",
    Conflict: CONFLICT,
    MissingReferences: MISSING_REFERENCES,
    MissingNar: MISSING_NAR,
    Unsigned: "unsigned",
    Refused: "refused",
    StoreError: "store",
    DaemonError: "store",
    ServerError: "server",
}


class Failure(NamedTuple):
    """`error` is one line."""

    error: str
    kind: str = "failed"

    @classmethod
    def of(cls, error: CachesrvError) -> Failure:
        """From what was raised: the first ancestor that has a name decides."""
        return cls(str(error), next((_KINDS[one] for one in type(error).__mro__ if one in _KINDS), "failed"))
