"""The index in LMDB: a file mapped into memory, shared by all processes of one host.

A lookup is one short read transaction of about two microseconds; readers and the one writer at a time never wait
for each other. Databases of the environment:

- `entries`: `<cache>/<hash part>` to the stored value (see `cachesrv.index.base`);
- `absences`: the end of an absence (u64, big-endian) and its key, to nothing: what to evict, in order;
- `held`: keys under which nothing is stored for a while, to the end of that (u64, big-endian);
- `about`: `format`, the version of all this; `epoch`, how often something was deleted (u64, big-endian).

Open it after a fork, never across one. LMDB needs a local disk, not a network's.
"""

from __future__ import annotations

import struct
import sys
import threading
import time
from typing import TYPE_CHECKING, TypeVar

import lmdb

from cachesrv.errors import StoreFull
from cachesrv.index.base import (
    ABSENT,
    Absent,
    Present,
    decode,
    encode_absent,
    encode_present,
    lookup_key,
    scan_key,
    storage_key,
)
from cachesrv.index.environment import SharedEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cachesrv.index.base import IndexEntry

T = TypeVar("T")

DEFAULT_SIZE_LIMIT = 64 * 2**30 if sys.maxsize > 2**32 else 2**30

# A write copies the pages that it touches, and what it replaces is free only some transactions later: the map needs
# room beyond the limit, and a full index must still be able to delete.
_MIN_HEADROOM = 16 * 2**20
_HEADROOM_SHARE = 8

_EVICTED_TOGETHER = 64
_PAGE_ITEMS = 512
_PAGE_BYTES = 2**20

_END = struct.Struct(">Q")
_EPOCH = b"epoch"


class LmdbIndex:
    """See `cachesrv.index.base.Index`.

    `path` is a folder, made when it is missing. `negative_limit` bounds the number of absences, `size_limit` the bytes
    in use (the file takes what it needs and can grow an eighth beyond the limit); all processes give the same. `clock`
    gives seconds since the epoch. `fresh` tells that the index was begun anew and everything has to be learnt again.
    Raises StoreError.
    """

    def __init__(
        self,
        path: str,
        *,
        negative_limit: int = 1_000_000,
        size_limit: int = DEFAULT_SIZE_LIMIT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        map_size = size_limit + max(_MIN_HEADROOM, size_limit // _HEADROOM_SHARE)
        self._shared = SharedEnvironment(path, map_size=map_size)
        self._env = self._shared.env
        self._entries = self._shared.entries
        self._absences = self._shared.absences
        self._held = self._shared.held
        self._negative_limit = negative_limit
        self._size_limit = size_limit
        self._clock = clock
        self._one_writer, self._one_scan = threading.Lock(), threading.Lock()
        self.fresh = self._shared.fresh

    def get(self, cache: str, hash_part: str) -> Present | Absent | None:
        value = self.raw(lookup_key(cache, hash_part))
        return None if value is None else decode(value, self._clock())

    def raw(self, key: bytes) -> bytes | None:
        # A try costs nothing here, a context manager would cost as much as the lookup.
        try:
            txn = self._env.begin(self._entries)
            value = txn.get(key)
            txn.abort()
        except lmdb.BadValsizeError:
            return None
        except lmdb.Error as error:
            with self._shared.damage_marked():
                raise error from None
        return value

    def epoch(self) -> int:
        with self._shared.damage_marked(), self._env.begin() as txn:
            return self._epoch(txn)

    def snapshot(self) -> tuple[Callable[[bytes], bytes | None], Callable[[], None], int]:
        txn = self._env.begin(self._entries)
        return txn.get, txn.abort, txn.id()

    def put(self, entries: Iterable[IndexEntry], *, replace: bool = True, epoch: int | None = None) -> bool:
        items = {storage_key(entry.cache, entry.hash_part): encode_present(entry.answer) for entry in entries}

        def store(txn: lmdb.Transaction[bytes]) -> bool:
            if epoch not in (None, self._epoch(txn)):
                return False
            for key, value in sorted(items.items()):
                old = txn.get(key)
                if self._is_held(txn, key):
                    continue
                if replace or old is None or old[0] == ABSENT:
                    txn.put(key, value)
                    self._unlist_absence(txn, key, old)
            if not self._make_room(txn):
                raise StoreFull("the index has reached its size limit; raise [index] size_limit")
            return True

        return self._write(store)

    def put_absent(self, absences: Iterable[tuple[str, str]], until: int, *, epoch: int | None = None) -> bool:
        keys = {storage_key(cache, hash_part) for cache, hash_part in absences}
        value = encode_absent(until)

        def store(txn: lmdb.Transaction[bytes]) -> bool:
            if epoch not in (None, self._epoch(txn)):
                return False
            for key in sorted(keys):
                old = txn.get(key)
                if (old is not None and old[0] != ABSENT) or self._is_held(txn, key):
                    continue
                self._unlist_absence(txn, key, old)
                txn.put(key, value)
                txn.put(_END.pack(until) + key, b"", db=self._absences)
            excess = txn.stat(self._absences)["entries"] - self._negative_limit
            self._evict(txn, excess)
            self._make_room(txn)
            return True

        return self._write(store)

    def hold(self, keys: Iterable[tuple[str, str]], until: int) -> None:
        self._delete([storage_key(cache, hash_part) for cache, hash_part in keys], held_until=_END.pack(until))

    def delete(self, keys: Iterable[tuple[str, str]]) -> None:
        self._delete([storage_key(cache, hash_part) for cache, hash_part in keys])

    def _delete(self, keys: list[bytes], *, held_until: bytes | None = None) -> None:
        def forget(txn: lmdb.Transaction[bytes]) -> None:
            txn.put(_EPOCH, _END.pack(self._epoch(txn) + 1), db=self._shared.about)
            for key in keys:
                self._unlist_absence(txn, key, txn.pop(key))
                if held_until is None:
                    txn.delete(key, db=self._held)
                else:
                    txn.put(key, held_until, db=self._held)

        self._write(forget)

    def clear(self, cache: str) -> None:
        start = prefix = scan_key(cache)
        self._delete([])
        while page := self._page(prefix, start):
            self._delete([key for key, _ in page])
            start = page[-1][0] + b"\0"

    def scan(self, cache: str, after: str = "") -> Iterator[tuple[str, Present | Absent]]:
        prefix, start = scan_key(cache), scan_key(cache, after)
        while page := self._page(prefix, start):
            for key, value in page:
                answer = decode(value, self._clock())
                if answer is not None:
                    yield key[len(prefix) :].decode("ascii"), answer
            start = page[-1][0] + b"\0"

    def warm(self) -> Iterator[int]:
        return self._shared.read_ahead()

    def count(self) -> tuple[int, int]:
        with self._shared.damage_marked(), self._env.begin() as txn:
            absences = txn.stat(self._absences)["entries"]
            return txn.stat(self._entries)["entries"] - absences, absences

    def close(self) -> None:
        # Nobody waits for threads whose callers were cancelled, and LMDB does not bear transactions of theirs here.
        with self._one_writer, self._one_scan:
            self._shared.close()

    def _page(self, prefix: bytes, start: bytes) -> list[tuple[bytes, bytes]]:
        """The next items from `start` on, in a transaction of their own: one that stays open would keep all pages from
        being used again that are freed meanwhile.
        """
        items: list[tuple[bytes, bytes]] = []
        size = 0
        with (
            self._one_scan,
            self._shared.damage_marked(),
            self._env.begin(self._entries) as txn,
            txn.cursor() as cursor,
        ):
            more = cursor.set_range(start)
            while more and len(items) < _PAGE_ITEMS and size < _PAGE_BYTES:
                key, value = cursor.item()
                if not key.startswith(prefix):
                    break
                items.append((key, value))
                size += len(value)
                more = cursor.next()
        return items

    def _write(self, work: Callable[[lmdb.Transaction[bytes]], T]) -> T:
        """Run `work` in a write transaction; it is committed, and so synced, on return."""
        with self._one_writer, self._shared.damage_marked():
            try:
                return self._commit(work)
            except lmdb.MapFullError:
                # A process that was killed while it read keeps freed pages from being used again.
                if self._env.reader_check() == 0:
                    raise
                return self._commit(work)

    def _commit(self, work: Callable[[lmdb.Transaction[bytes]], T]) -> T:
        with self._env.begin(self._entries, write=True) as txn:
            done = work(txn)
        self._shared.complete()
        return done

    def _epoch(self, txn: lmdb.Transaction[bytes]) -> int:
        epoch: int = _END.unpack(txn.get(_EPOCH, db=self._shared.about) or bytes(_END.size))[0]
        return epoch

    def _is_held(self, txn: lmdb.Transaction[bytes], key: bytes) -> bool:
        end = txn.get(key, db=self._held)
        return end is not None and bool(_END.unpack(end)[0] > self._clock())

    def _unlist_absence(self, txn: lmdb.Transaction[bytes], key: bytes, old: bytes | None) -> None:
        if old is not None and old[0] == ABSENT:
            txn.delete(old[1:] + key, db=self._absences)

    def _make_room(self, txn: lmdb.Transaction[bytes]) -> bool:
        """Evict absences until the databases are within the size limit; False when they cannot be."""
        while self._used(txn) > self._size_limit:
            if not self._evict(txn, _EVICTED_TOGETHER):
                return False
        return True

    def _used(self, txn: lmdb.Transaction[bytes]) -> int:
        stats = [txn.stat(self._entries), txn.stat(self._absences)]
        pages = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        return pages * stats[0]["psize"]

    def _evict(self, txn: lmdb.Transaction[bytes], number: int) -> bool:
        """Forget the `number` absences that end first; False when there is none left."""
        evicted = False
        with txn.cursor(self._absences) as cursor:
            while number > 0 and cursor.first():
                txn.delete(cursor.key()[_END.size :])
                cursor.delete()
                number -= 1
                evicted = True
        return evicted
