"""An index in memory, of one process: for tests and for servers that live shortly. It survives nothing."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from cachesrv.index.base import (
    Absent,
    Present,
    decode,
    encode_absent,
    encode_present,
    lookup_key,
    scan_key,
    storage_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cachesrv.index.base import IndexEntry


class MemoryIndex:
    """See `cachesrv.index.base.Index`. `clock` gives seconds since the epoch."""

    def __init__(self, *, negative_limit: int = 1_000_000, clock: Callable[[], float] = time.time) -> None:
        self._negative_limit = negative_limit
        self._clock = clock
        self._values: dict[bytes, bytes] = {}
        self._absences: set[bytes] = set()
        self._held: dict[bytes, int] = {}
        # Readers take no lock: a single look into a dictionary is atomic.
        self._writing = threading.Lock()
        self._epoch = 0
        self._version = 0

    def get(self, cache: str, hash_part: str) -> Present | Absent | None:
        value = self._values.get(lookup_key(cache, hash_part))
        return None if value is None else decode(value, self._clock())

    def raw(self, key: bytes) -> bytes | None:
        return self._values.get(key)

    def epoch(self) -> int:
        return self._epoch

    def snapshot(self) -> tuple[Callable[[bytes], bytes | None], Callable[[], None], int]:
        return self._values.get, lambda: None, self._version

    def put(self, entries: Iterable[IndexEntry], *, replace: bool = True, epoch: int | None = None) -> bool:
        new = {storage_key(entry.cache, entry.hash_part): encode_present(entry.answer) for entry in entries}
        with self._writing:
            if epoch not in (None, self._epoch):
                return False
            new = {key: value for key, value in new.items() if not self._is_held(key)}
            if not replace:
                new = {key: value for key, value in new.items() if key not in self._values or key in self._absences}
            self._values.update(new)
            self._absences.difference_update(new)
            self._version += 1
        return True

    def put_absent(self, absences: Iterable[tuple[str, str]], until: int, *, epoch: int | None = None) -> bool:
        keys = [storage_key(cache, hash_part) for cache, hash_part in absences]
        value = encode_absent(until)
        with self._writing:
            if epoch not in (None, self._epoch):
                return False
            for key in keys:
                if (key not in self._values or key in self._absences) and not self._is_held(key):
                    self._values[key] = value
                    self._absences.add(key)
            self._evict()
            self._version += 1
        return True

    def _evict(self) -> None:
        excess = len(self._absences) - self._negative_limit
        if excess > 0:
            # Stored ends are big-endian, so values sort as their ends do.
            first_to_end = sorted(self._absences, key=lambda key: (self._values[key], key))[:excess]
            self._forget(first_to_end)

    def hold(self, keys: Iterable[tuple[str, str]], until: int) -> None:
        held = [storage_key(cache, hash_part) for cache, hash_part in keys]
        with self._writing:
            self._epoch += 1
            self._forget(held)
            self._held.update(dict.fromkeys(held, until))
            self._version += 1

    def delete(self, keys: Iterable[tuple[str, str]]) -> None:
        doomed = [storage_key(cache, hash_part) for cache, hash_part in keys]
        with self._writing:
            self._epoch += 1
            self._forget(doomed)
            self._version += 1

    def _is_held(self, key: bytes) -> bool:
        return self._held.get(key, 0) > self._clock()

    def _forget(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._values.pop(key, None)
            self._absences.discard(key)
            self._held.pop(key, None)

    def clear(self, cache: str) -> None:
        prefix = scan_key(cache)
        with self._writing:
            self._epoch += 1
            self._forget([key for key in self._values if key.startswith(prefix)])
            self._version += 1

    def scan(self, cache: str, after: str = "") -> Iterator[tuple[str, Present | Absent]]:
        prefix, start = scan_key(cache), scan_key(cache, after)
        with self._writing:
            found = sorted(item for item in self._values.items() if item[0].startswith(prefix) and item[0] >= start)
        for key, value in found:
            answer = decode(value, self._clock())
            if answer is not None:
                yield key[len(prefix) :].decode("ascii"), answer

    def warm(self) -> Iterator[int]:
        return iter(())

    def count(self) -> tuple[int, int]:
        with self._writing:
            return len(self._values) - len(self._absences), len(self._absences)

    def close(self) -> None:
        with self._writing:
            self._values.clear()
            self._absences.clear()
