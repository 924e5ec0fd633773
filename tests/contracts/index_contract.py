"""What every index promises, as tests: a subclass gives the fixture `open_index`, and a state machine a factory."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cachesrv.errors import BadInput
from cachesrv.index.base import (
    ABSENT,
    Absent,
    Index,
    IndexEntry,
    Present,
    head_of,
    lookup_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = 1_700_000_000
LATER = NOW + 3600

HASH = "syd87l2rxw8cbsxmxl853h0r6pdwhwjr"
ANSWER = Present(b"Content-Type: text/x-nix-narinfo\r\n\r\n", b"StorePath: /nix/store/syd87l2r-curl\n")
OTHER = Present(b"Content-Length: 0\r\n\r\n", b"")


class Clock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self) -> None:
        self.now: float = NOW

    def __call__(self) -> float:
        return self.now


class OpenIndex(Protocol):
    def __call__(self, *, negative_limit: int = ..., clock: Callable[[], float] = ...) -> Index: ...


def entry(hash_part: str, answer: Present = ANSWER, cache: str = "main") -> IndexEntry:
    return IndexEntry(cache, hash_part, answer)


class IndexContract:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def index(self, open_index: OpenIndex, clock: Clock) -> Index:
        return open_index(clock=clock)

    def test_nothing_is_known_at_first(self, index: Index) -> None:
        assert index.get("main", HASH) is None
        assert index.raw(lookup_key("main", HASH)) is None
        assert index.count() == (0, 0)
        assert list(index.scan("main")) == []

    def test_what_was_put_is_known_at_once(self, index: Index) -> None:
        index.put([entry(HASH), entry("b" * 32, OTHER)])
        assert index.get("main", HASH) == ANSWER
        assert index.get("main", "b" * 32) == OTHER
        assert index.count() == (2, 0)

    def test_what_is_learnt_does_not_replace_what_was_published(self, index: Index) -> None:
        index.put([entry(HASH)])
        index.put_absent([("main", "b" * 32)], LATER)
        index.put([entry(HASH, OTHER), entry("b" * 32, OTHER), entry("c" * 32, OTHER)], replace=False)
        assert index.get("main", HASH) == entry(HASH).answer
        assert index.get("main", "b" * 32) == OTHER
        assert index.get("main", "c" * 32) == OTHER
        assert index.count() == (3, 0)

    def test_what_was_learnt_before_a_deletion_is_not_stored_after_it(self, index: Index) -> None:
        before = index.epoch()
        assert index.put([entry(HASH)], epoch=before) is True
        assert index.put_absent([("main", "b" * 32)], LATER, epoch=before) is True
        assert index.epoch() == before
        index.delete([("main", HASH)])
        after = index.epoch()
        assert after > before
        for replace in (True, False):
            assert index.put([entry(HASH)], replace=replace, epoch=before) is False
        assert index.put_absent([("main", "c" * 32)], LATER, epoch=before) is False
        assert index.count() == (0, 1)
        assert index.put([entry(HASH)], replace=False, epoch=after) is True
        for _ in range(2):
            after = index.epoch()
            index.clear("main")
            assert index.put([entry(HASH)], epoch=after) is False
        assert index.put([entry(HASH)]) is True
        assert index.get("main", HASH) == ANSWER

    def test_nothing_is_stored_of_what_is_held(self, index: Index, clock: Clock) -> None:
        held, other = ("main", HASH), ("main", "b" * 32)
        index.put([entry(HASH), entry("b" * 32)])
        before = index.epoch()
        index.hold([held], LATER)
        assert index.epoch() > before
        assert index.get(*held) is None
        assert index.get(*other) == ANSWER
        for replace in (True, False):
            assert index.put([entry(HASH), entry("b" * 32, OTHER)], replace=replace) is True
        assert index.put_absent([held], LATER) is True
        assert index.get(*held) is None
        assert index.get(*other) == OTHER
        assert index.count() == (1, 0)
        index.delete([held])
        index.put([entry(HASH)])
        assert index.get(*held) == ANSWER

    def test_a_hold_ends_by_itself(self, index: Index, clock: Clock) -> None:
        index.put_absent([("main", HASH)], LATER + 5)
        index.hold([("main", HASH), ("main", "b" * 32)], LATER)
        index.hold([("main", "b" * 32)], LATER + 2)
        assert index.count() == (0, 0)
        clock.now = LATER
        index.put([entry(HASH), entry("b" * 32)])
        assert index.get("main", HASH) == ANSWER
        assert index.get("main", "b" * 32) is None
        clock.now = LATER + 2
        index.put_absent([("main", "b" * 32)], LATER + 5)
        assert index.get("main", "b" * 32) == Absent(LATER + 5)

    def test_put_replaces(self, index: Index) -> None:
        index.put([entry(HASH)])
        index.put([entry(HASH, OTHER)])
        assert index.get("main", HASH) == OTHER
        assert index.count() == (1, 0)

    def test_the_last_of_equal_keys_wins(self, index: Index) -> None:
        index.put([entry(HASH), entry(HASH, OTHER)])
        assert index.get("main", HASH) == OTHER

    def test_caches_are_apart(self, index: Index) -> None:
        index.put([entry(HASH, cache="one"), entry(HASH, OTHER, cache="one-more")])
        assert index.get("two", HASH) is None
        assert list(index.scan("one")) == [(HASH, ANSWER)]
        index.clear("one")
        assert index.get("one", HASH) is None
        assert index.get("one-more", HASH) == OTHER

    def test_large_answers_come_back_whole(self, index: Index) -> None:
        large = Present(b"h" * 65535 + b"\r\n\r\n", bytes(range(256)) * 4096)
        index.put([entry(HASH, large)])
        assert index.get("main", HASH) == large

    def test_an_absence_is_believed_until_it_ends(self, index: Index, clock: Clock) -> None:
        index.put_absent([("main", HASH)], LATER)
        assert index.get("main", HASH) == Absent(LATER)
        assert index.count() == (0, 1)
        clock.now = LATER - 0.5
        assert index.get("main", HASH) == Absent(LATER)
        clock.now = LATER
        assert index.get("main", HASH) is None
        assert list(index.scan("main")) == []

    def test_a_newer_absence_replaces_an_older_one(self, index: Index) -> None:
        index.put_absent([("main", HASH)], LATER)
        index.put_absent([("main", HASH)], LATER + 5)
        assert index.get("main", HASH) == Absent(LATER + 5)
        assert index.count() == (0, 1)

    def test_a_publish_clears_the_absence(self, index: Index) -> None:
        index.put_absent([("main", HASH)], LATER)
        index.put([entry(HASH)])
        assert index.get("main", HASH) == ANSWER
        assert index.count() == (1, 0)

    def test_an_absence_never_hides_an_answer(self, index: Index) -> None:
        index.put([entry(HASH)])
        index.put_absent([("main", HASH), ("main", "b" * 32)], LATER)
        assert index.get("main", HASH) == ANSWER
        assert index.get("main", "b" * 32) == Absent(LATER)
        assert index.count() == (1, 1)

    def test_delete_forgets_answers_and_absences(self, index: Index) -> None:
        index.put([entry(HASH)])
        index.put_absent([("main", "b" * 32)], LATER)
        index.delete([("main", HASH), ("main", "b" * 32), ("main", "unknown")])
        assert index.get("main", HASH) is None
        assert index.get("main", "b" * 32) is None
        assert index.count() == (0, 0)

    def test_clear_forgets_a_cache_of_any_size(self, index: Index) -> None:
        index.put([entry(f"{n:032}") for n in range(1300)])
        index.put_absent([("main", f"absent{n}") for n in range(10)], LATER)
        index.put([entry(HASH, cache="other")])
        index.clear("main")
        assert index.count() == (1, 0)
        assert list(index.scan("main")) == []

    def test_absences_beyond_the_limit_go_in_the_order_in_which_they_end(self, open_index: OpenIndex) -> None:
        index = open_index(negative_limit=3, clock=lambda: NOW)
        index.put([entry(HASH)])
        index.put_absent([("main", "a")], NOW + 30)
        index.put_absent([("main", "b")], NOW + 10)
        index.put_absent([("main", "c")], NOW + 20)
        assert index.count() == (1, 3)
        index.put_absent([("main", "d")], NOW + 40)
        assert [name for name, _ in index.scan("main")] == ["a", "c", "d", HASH]
        index.put_absent([("main", name) for name in "efghi"], NOW + 50)
        assert index.count() == (1, 3)
        assert [name for name, _ in index.scan("main")] == ["g", "h", "i", HASH]

    def test_an_absence_that_was_renewed_is_not_the_first_to_go(self, open_index: OpenIndex) -> None:
        index = open_index(negative_limit=2, clock=lambda: NOW)
        index.put_absent([("main", "a")], NOW + 10)
        index.put_absent([("main", "b")], NOW + 20)
        index.put_absent([("main", "a")], NOW + 30)
        index.put_absent([("main", "c")], NOW + 40)
        assert [name for name, _ in index.scan("main")] == ["a", "c"]

    def test_scan_is_in_order_and_goes_on_where_it_was_left(self, index: Index) -> None:
        names = [f"{n:05}" for n in range(1200)]
        index.put([entry(name) for name in reversed(names)])
        assert [name for name, _ in index.scan("main")] == names
        assert [name for name, _ in index.scan("main", names[700])] == names[701:]
        assert [name for name, _ in index.scan("main", "00700x")] == names[701:]
        assert list(index.scan("main", "z")) == []

    def test_scan_does_not_stand_in_the_way_of_writes(self, index: Index) -> None:
        index.put([entry(f"{n:05}") for n in range(1200)])
        scan = index.scan("main")
        next(scan)
        index.put([entry("zzz", OTHER)])
        index.delete([("main", "00001")])
        seen = [name for name, _ in scan]
        assert set(seen) >= {f"{n:05}" for n in range(2, 1200)}

    @pytest.mark.parametrize("name", ["", "a/b", "a b", "é", "\0", "x" * 201, "?"])
    def test_names_that_cannot_be_stored_are_refused_and_unknown(self, index: Index, name: str) -> None:
        for cache, hash_part in ((name, HASH), ("main", name)):
            with pytest.raises(BadInput):
                index.put([entry("fine"), entry(hash_part, cache=cache)])
            with pytest.raises(BadInput):
                index.put_absent([("main", "fine"), (cache, hash_part)], LATER)
            with pytest.raises(BadInput):
                index.delete([(cache, hash_part)])
            assert index.get(cache, hash_part) is None
        assert index.count() == (0, 0)

    def test_names_of_any_kind_can_be_asked_for(self, index: Index) -> None:
        index.put([entry(HASH)])
        for odd in ("\ud800", "x" * 100_000, f"{HASH}\0", f"{HASH}/", f"/{HASH}", ""):
            assert index.get("main", odd) is None
        assert index.raw(b"") is None

    def test_names_of_200_characters_can_be_stored(self, index: Index) -> None:
        index.put([entry("h" * 200, cache="c" * 200)])
        index.put_absent([("c" * 200, "a" * 200)], LATER)
        assert index.get("c" * 200, "h" * 200) == ANSWER
        assert index.get("c" * 200, "a" * 200) == Absent(LATER)

    def test_what_the_format_cannot_hold_is_refused(self, index: Index) -> None:
        for head in (b"", b"h", b"\r\n\r\n", b"\0h\r\n\r\n", b"h\r\n\r\nh\r\n\r\n"):
            with pytest.raises(BadInput):
                index.put([entry("fine"), entry(HASH, Present(head, b"body"))])
        for until in (-1, 2**64):
            with pytest.raises(BadInput):
                index.put_absent([("main", HASH)], until)
        assert index.count() == (0, 0)

    def test_an_iterable_that_fails_changes_nothing(self, index: Index) -> None:
        def entries() -> object:
            yield entry(HASH)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            index.put(entries())  # type: ignore[arg-type]  # the annotation of a generator adds nothing here
        assert index.get("main", HASH) is None

    def test_raw_gives_the_documented_format(self, index: Index, clock: Clock) -> None:
        index.put([entry(HASH)])
        index.put_absent([("main", "b" * 32)], LATER)
        value = index.raw(b"main/" + HASH.encode())
        assert value is not None
        assert value[0] != ABSENT
        assert value == ANSWER.head + ANSWER.body
        assert head_of(value) == ANSWER.head
        clock.now = LATER + 1
        absent = index.raw(b"main/" + b"b" * 32)
        assert absent is not None
        assert absent[0] == ABSENT
        assert int.from_bytes(absent[1:], "big") == LATER

    def test_a_snapshot_of_another_version_is_what_follows_a_change(self, index: Index) -> None:
        def version() -> int:
            _, done, number = index.snapshot()
            done()
            return number

        versions = [version()]
        for change in (
            lambda: index.put([entry(HASH)]),
            lambda: index.put([entry(HASH, OTHER)]),
            lambda: index.put_absent([("main", "b" * 32)], LATER),
            lambda: index.delete([("main", HASH)]),
            lambda: index.hold([("main", HASH)], LATER),
            lambda: index.clear("main"),
        ):
            change()
            versions.append(version())
            assert version() == versions[-1]
        assert len(set(versions)) == len(versions)

    def test_to_warm_it_changes_nothing(self, index: Index) -> None:
        index.put([entry(HASH)])
        assert all(size > 0 for size in index.warm())
        assert index.get("main", HASH) == ANSWER

    def test_writers_in_several_threads_lose_nothing(self, open_index: OpenIndex) -> None:
        index = open_index(negative_limit=50, clock=lambda: NOW)
        together = threading.Barrier(4)

        def write(worker: int) -> None:
            together.wait()
            for n in range(10):
                index.put([entry(f"p{worker}-{n}"), entry(f"shared{n}")])
                index.put_absent([("main", f"a{worker}-{n}-{m}") for m in range(5)], LATER)
                index.put_absent([("main", f"shared{n}")], LATER)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(write, range(4)))
        assert index.count() == (4 * 10 + 10, 50)
        assert all(index.get("main", f"shared{n}") == ANSWER for n in range(10))


NAMES = st.sampled_from([f"{cache}/{name}" for cache in ("main", "other") for name in ("a", "b", "c", "d", "ee")])
KEYS = st.lists(NAMES, max_size=4).map(lambda names: [(n.split("/")[0], n.split("/")[1]) for n in names])
NEGATIVE_LIMIT = 4


class IndexMachine(RuleBasedStateMachine):
    """Any sequence of writes leaves an index as it leaves a plain dictionary."""

    def open_index(self, *, negative_limit: int, clock: Callable[[], float]) -> Index:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.index = self.open_index(negative_limit=NEGATIVE_LIMIT, clock=self.clock)
        self.model: dict[tuple[str, str], Present | Absent] = {}
        self.held: dict[tuple[str, str], int] = {}

    def free(self, keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Those under which something can be stored."""
        return [key for key in keys if self.held.get(key, 0) <= self.clock.now]

    @rule(keys=KEYS, body=st.binary(max_size=5))
    def put(self, keys: list[tuple[str, str]], body: bytes) -> None:
        answer = Present(b"Head: yes\r\n\r\n", body * 1000)
        self.index.put(IndexEntry(cache, name, answer) for cache, name in keys)
        self.model.update(dict.fromkeys(self.free(keys), answer))

    @rule(keys=KEYS, seconds=st.integers(-5, 50))
    def put_absent(self, keys: list[tuple[str, str]], seconds: int) -> None:
        until = int(self.clock.now) + seconds
        self.index.put_absent(keys, until)
        for key in self.free(keys):
            if not isinstance(self.model.get(key), Present):
                self.model[key] = Absent(until)
        absences = sorted((value.until, key) for key, value in self.model.items() if isinstance(value, Absent))
        for _, key in absences[: max(0, len(absences) - NEGATIVE_LIMIT)]:
            del self.model[key]

    @rule(keys=KEYS, seconds=st.integers(0, 20))
    def hold(self, keys: list[tuple[str, str]], seconds: int) -> None:
        until = int(self.clock.now) + seconds
        self.index.hold(keys, until)
        for key in keys:
            self.model.pop(key, None)
            self.held[key] = until

    @rule(keys=KEYS)
    def delete(self, keys: list[tuple[str, str]]) -> None:
        self.index.delete(keys)
        for key in keys:
            self.model.pop(key, None)
            self.held.pop(key, None)

    @rule(cache=st.sampled_from(["main", "other", "third"]))
    def clear(self, cache: str) -> None:
        self.index.clear(cache)
        self.model = {key: value for key, value in self.model.items() if key[0] != cache}

    @rule(seconds=st.integers(1, 20))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    def known(self) -> dict[tuple[str, str], Present | Absent]:
        return {
            key: value
            for key, value in self.model.items()
            if isinstance(value, Present) or value.until > self.clock.now
        }

    @invariant()
    def agrees(self) -> None:
        known = self.known()
        for cache in ("main", "other"):
            assert list(self.index.scan(cache)) == [(key[1], known[key]) for key in sorted(known) if key[0] == cache]
            for name in ("a", "b", "c", "d", "ee"):
                assert self.index.get(cache, name) == known.get((cache, name))
        present = sum(isinstance(value, Present) for value in self.model.values())
        assert self.index.count() == (present, len(self.model) - present)

    def teardown(self) -> None:
        self.index.close()
