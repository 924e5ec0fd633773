"""The contract of the index: (cache, hash part) to what is known of it, in microseconds.

The index is derived: while nobody has it open it can be deleted at the price of slower answers until it has filled
again. What every implementation promises:

- `get` never blocks on anything but a page fault and never raises for a key that is merely unknown.
- **A publish wins.** `put` stores the answer and clears an absence in one transaction; `put_absent` never replaces
  an answer, so that a slow lookup cannot hide a path that was published meanwhile.
- **Durable.** When `put` has returned, neither kill -9 nor power loss brings the absence back that it cleared.
- **What was deleted does not come back.** `delete` and `clear` move the epoch on, in the same transaction. Who learns
  something somewhere else in order to store it gets the epoch first and stores with it: nothing is stored when
  something was deleted meanwhile. So what was read before a path was removed is not stored after that.
- **What is about to be removed is looked up where it lies.** While a key is held (`hold`) nothing is stored under it,
  by whomever. So no answer comes back into the index between the moment that it was deleted there and the one that
  the path is removed: paths that are removed together are seen to go together.
- Absences are bounded in number: over the limit, those that end first go first (of those that end together, in the
  order of their keys). An absence that has ended reads as unknown.
- All worker processes of one host share it; what one has put, the next `get` of any of them sees.

Writes take milliseconds (they are synced): call them from a thread, in batches. Any method may be called from any
thread.

Stored values, as `raw` and `snapshot` give them, are told apart by their first byte:

- present: the answer to a GET as it is sent, head and body; `head_of` gives that to a HEAD. It begins with a letter.
- absent: a byte 0, and the end of the absence in seconds since the epoch (u64, big-endian).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cachesrv.errors import BadInput, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ABSENT = 0
"""The first byte of the stored value of an absence, and of no other."""

_ABSENT = struct.Struct(">BQ")
_END_OF_HEAD = b"\r\n\r\n"
_MAX_UNTIL = 0xFFFF_FFFF_FFFF_FFFF
_NAME = re.compile(r"[0-9A-Za-z_+.-]{1,200}\Z")


@dataclass(frozen=True, slots=True)
class Present:
    """A path that is there: `head`, the header fields of its answer, each with its line end and followed by an empty
    line; `body`, its narinfo. What stands before the head (status line, date) is made anew for each answer.
    """

    head: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class Absent:
    """Known not to be there, to be believed until `until` (seconds since the epoch), and then no more."""

    until: int


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A path to be made visible."""

    cache: str
    hash_part: str
    answer: Present


def lookup_key(cache: str, hash_part: str) -> bytes:
    """The key to look up by `raw`: `main/<hash part>`. Takes anything; what cannot be stored is never found."""
    return f"{cache}/{hash_part}".encode("ascii", "replace")


def storage_key(cache: str, hash_part: str) -> bytes:
    """The key to store by. Raises BadInput unless both names have 1 to 200 characters of `0-9A-Za-z_+.-`."""
    if not (_NAME.match(cache) and _NAME.match(hash_part)):
        raise BadInput(f"not the names of a cache and a hash part: {cache[:200]!r}, {hash_part[:200]!r}")
    return lookup_key(cache, hash_part)


def scan_key(cache: str, after: str = "") -> bytes:
    """What sorts just before all keys of a cache beyond `after`. Raises BadInput as `storage_key` does."""
    if after:
        return storage_key(cache, after) + b"\0"
    return storage_key(cache, "-")[:-1]


def encode_present(answer: Present) -> bytes:
    """The stored value of an answer. Raises BadInput for a head that is none."""
    if not answer.head or _head_length(answer.head) != len(answer.head):
        raise BadInput(f"not the head of an answer: {answer.head[:200]!r}")
    return answer.head + answer.body


def head_of(value: bytes) -> bytes:
    """The head in the stored value of an answer."""
    return value[: _head_length(value)]


def _head_length(value: bytes) -> int:
    """Bytes up to the first empty line and with it; 0 when it does not begin with a head."""
    end = value.find(_END_OF_HEAD)
    return end + len(_END_OF_HEAD) if end > 0 and value[:1].isalpha() else 0


def encode_absent(until: int) -> bytes:
    """The stored value of an absence. Raises BadInput for a time that is no u64."""
    if not 0 <= until <= _MAX_UNTIL:
        raise BadInput(f"not the end of an absence, in seconds since the epoch: {until}")
    return _ABSENT.pack(ABSENT, until)


def decode(value: bytes, now: float) -> Present | Absent | None:
    """What a stored value says at the time `now`; None for an absence that has ended. Raises StoreError."""
    if length := _head_length(value):
        return Present(value[:length], value[length:])
    if len(value) == _ABSENT.size and value[0] == ABSENT:
        until: int = _ABSENT.unpack(value)[1]
        return Absent(until) if until > now else None
    raise StoreError("the index holds a value that it did not write; stop cachesrv and delete the index")


class Index(Protocol):
    """See the module's docstring for what all implementations promise."""

    def get(self, cache: str, hash_part: str) -> Present | Absent | None:
        """What is known; None when nothing is."""

    def raw(self, key: bytes) -> bytes | None:
        """The stored value under a ready-made key (`lookup_key`), in the format that the module's docstring gives; the
        fastest door. An absence is given even when it has ended: the caller compares its end with the clock.
        """

    def epoch(self) -> int:
        """See the module's docstring."""

    def snapshot(self) -> tuple[Callable[[bytes], bytes | None], Callable[[], None], int]:
        """For many lookups in a row, all at one moment: a function that gives the stored value under a key of 1 to 500
        bytes, as `raw` does; one that has to be called in the end; and a number that is another after each change of
        the index. Hold it for as long as it takes to look, no longer. All may raise what the implementation's library
        raises.
        """

    def put(self, entries: Iterable[IndexEntry], *, replace: bool = True, epoch: int | None = None) -> bool:
        """Make paths visible, all in one transaction; without `replace`, answers that are stored already stay as they
        are (what was looked up may be older than what was published meanwhile). False, and nothing is written, when the
        epoch is no longer the one given. Raises BadInput for names that cannot be stored, StoreFull, StoreError.
        """

    def put_absent(self, absences: Iterable[tuple[str, str]], until: int, *, epoch: int | None = None) -> bool:
        """Remember (cache, hash part) as absent until then, except where an answer is stored; all in one transaction.
        Where there is no room, fewer are remembered. False as for `put`. Raises BadInput, StoreError.
        """

    def hold(self, keys: Iterable[tuple[str, str]], until: int) -> None:
        """Delete what is known of (cache, hash part), and have nothing stored there until then (seconds since the
        epoch) or until the next `delete` of it: `put` and `put_absent` pass over it. In one transaction; moves the
        epoch. Raises BadInput, StoreError.
        """

    def delete(self, keys: Iterable[tuple[str, str]]) -> None:
        """Forget all that is known of (cache, hash part), and that it is held, in one transaction; moves the epoch.
        Raises BadInput, StoreError.
        """

    def clear(self, cache: str) -> None:
        """Forget all that is known of a cache; in several transactions, so that no other writer waits for long."""

    def scan(self, cache: str, after: str = "") -> Iterator[tuple[str, Present | Absent]]:
        """What is known of a cache, ordered by hash part, beyond `after`; sees writes that happen meanwhile or not.
        Can be left at any point, and holds nothing between two steps.
        """

    def warm(self) -> Iterator[int]:
        """Have it read into memory, where there is room for it, so that lookups need not wait for a disk. Each step
        takes some of the time and gives the bytes that were asked for.
        """

    def count(self) -> tuple[int, int]:
        """How many answers and how many absences are stored (ended ones included until they are evicted)."""

    def close(self) -> None:
        """Let go of the files; nothing may be called afterwards."""
