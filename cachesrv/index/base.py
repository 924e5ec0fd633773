"""The contract of the index: (cache, hash part) to what is known of it, in microseconds.

The index is derived: it can be deleted at any time at the price of slower answers until it has filled again. What
every implementation promises:

- `get` never blocks on anything but a page fault and never raises for a key that is merely unknown.
- **A publish wins.** `put` stores the answer and clears an absence in one transaction; `put_absent` never replaces
  an answer, so that a slow lookup cannot hide a path that was published meanwhile.
- **Durable.** When `put` has returned, neither kill -9 nor power loss brings the absence back that it cleared.
- Absences are bounded in number: over the limit, those that end first go first. An absence that has ended reads as
  unknown.
- All worker processes of one host share it; what one has put, the next `get` of any of them sees.

Writes take milliseconds (they are synced): call them from a thread, in batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True, slots=True)
class Present:
    """A path that is there: `head`, the header fields of its answer, each with its line end and followed by an empty
    line; `body`, its narinfo. What stands before the head (status line, date) is made anew for each answer.
    """

    head: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class Absent:
    """Known not to be there, to be believed until `until` (seconds since the epoch)."""

    until: int


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A path to be made visible."""

    cache: str
    hash_part: str
    answer: Present


class Index(Protocol):
    """See the module's docstring for what all implementations promise."""

    def get(self, cache: str, hash_part: str) -> Present | Absent | None:
        """What is known; None when nothing is."""

    def put(self, entries: Iterable[IndexEntry]) -> None:
        """Make paths visible, all in one transaction. Raises StoreFull, StoreError."""

    def put_absent(self, absences: Iterable[tuple[str, str]], until: int) -> None:
        """Remember (cache, hash part) as absent until then, except where an answer is stored."""

    def delete(self, keys: Iterable[tuple[str, str]]) -> None:
        """Forget all that is known of (cache, hash part)."""

    def clear(self, cache: str) -> None:
        """Forget all that is known of a cache."""

    def scan(self, cache: str, after: str = "") -> Iterator[tuple[str, Present | Absent]]:
        """Everything stored of a cache, by hash part, beyond `after`; sees writes that happen meanwhile or not."""

    def count(self) -> tuple[int, int]:
        """How many answers and how many absences are stored (ended ones included until they are evicted)."""

    def close(self) -> None:
        """Let go of the files; nothing may be called afterwards."""
