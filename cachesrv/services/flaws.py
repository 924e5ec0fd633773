"""What can be wrong with a cache, in words that say what it is and what to do."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from typing import Self

_REPAIR = "`cachesrv verify --repair`"
_MENDS = f"{_REPAIR} mends it from another copy, or takes the path out of sight"


class Kind(Enum):
    """A kind of flaw: its name in reports, and what to do about it."""

    UNREADABLE_NARINFO = "unreadable-narinfo", _MENDS
    FOREIGN_NARINFO = "foreign-narinfo", _MENDS
    MISSING_NARINFO = "missing-narinfo", f"{_REPAIR} writes it again, as the catalog knows it"
    WRONG_SIGNATURE = "wrong-signature", f"{_MENDS}; if the key is a new one, `cachesrv reindex --sign` signs with it"
    DISAGREEMENT = "disagreement", f"{_REPAIR} makes storage and catalog say the same again"
    UNPUBLISHED = "unpublished-path", "`cachesrv reindex` publishes it, if all that it needs is there"
    MISSING_NAR = "missing-nar", _MENDS
    WRONG_SIZE = "wrong-size", _MENDS
    DAMAGED_NAR = "damaged-nar", _MENDS
    MISSING_REFERENCE = "missing-reference", _MENDS
    DANGLING_INDEX_ENTRY = "dangling-index-entry", f"{_REPAIR} removes it from the index"
    WRONG_INDEX_ENTRY = "wrong-index-entry", f"{_REPAIR} has the index learn it anew"
    EMPTY_STORAGE = "empty-storage", "make sure that the storage is mounted, and that it is the right one"
    UNTRUSTED_NARINFO = "untrusted-narinfo", "let a key that the cache trusts sign it, or have no trusted_keys"
    ORPHAN_NAR = "orphan-nar", f"{_REPAIR} leaves it to the next collection after [collect] nar_grace"
    LEFTOVER = "stale-temporary-file", f"{_REPAIR} removes it; a server does so too, after a day"
    BAD_REALISATION = "bad-realisation", f"{_REPAIR} takes it out of sight; a push of the same output brings it back"
    DANGLING_REALISATION = "dangling-realisation", f"{_REPAIR} takes it out of sight"
    FOREIGN_OBJECT = "foreign-object", "no client asks for it by this name: move it away"
    UNDECIDED = "undecided", "run `cachesrv verify` again when it answers"

    def __init__(self, label: str, advice: str) -> None:
        self.label = label
        self.advice = advice

    @property
    def is_loss(self) -> bool:
        """Whether something is not there that the path needs. A narinfo that is merely no good leaves what is known of
        the path from elsewhere as good as it was.
        """
        return self in (Kind.MISSING_NAR, Kind.WRONG_SIZE, Kind.MISSING_REFERENCE)

    @classmethod
    def of(cls, label: str) -> Self:
        """The kind with this name."""
        return next(kind for kind in cls if kind.label == label)


class Flaw(msgspec.Struct, frozen=True):
    """Something wrong. `kind` is the label of a `Kind`; `cache` is empty for what belongs to none; `path` is a base
    name, or a hash part where no more is known; `object` the storage key that it is about.
    """

    kind: str
    cache: str
    what: str
    path: str = ""
    object: str = ""

    @property
    def advice(self) -> str:
        """What to do about it."""
        return Kind.of(self.kind).advice
