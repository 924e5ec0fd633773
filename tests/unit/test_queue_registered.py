"""What becomes valid in a store comes into the queue: all of it, once, when Nix has unlocked it."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import StoreError
from cachesrv.push.changes import Changes
from cachesrv.push.queue import registered as module
from cachesrv.push.queue.entries import PATH, Entries
from cachesrv.push.queue.registered import Registered
from cachesrv.push.store_location import locate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Store:
    """The database of a store, and locks in its directory."""

    def __init__(self, root: Path) -> None:
        self.location = locate(str(root), {})
        self.file = self.location.state_dir / "db" / "db.sqlite"
        self.file.parent.mkdir(parents=True)
        self.directory = root / "nix" / "store"
        self.directory.mkdir()
        self.make()

    def make(self) -> None:
        self.file.unlink(missing_ok=True)
        with closing(sqlite3.connect(self.file)) as db:
            db.execute("CREATE TABLE ValidPaths (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, path TEXT UNIQUE)")

    def execute(self, statement: str, *values: object) -> None:
        with closing(sqlite3.connect(self.file)) as db, db:
            db.execute(statement, values)

    def add(self, *names: str) -> None:
        for name in names:
            self.execute("INSERT INTO ValidPaths (path) VALUES (?)", full(name))

    def remove(self, name: str) -> None:
        self.execute("DELETE FROM ValidPaths WHERE path = ?", full(name))

    def lock(self, name: str) -> Path:
        file = self.directory / f"{full(name).rpartition('/')[2]}.lock"
        file.touch()
        return file


def full(name: str) -> str:
    return name if name.startswith("/") else f"/nix/store/{'0' * 32}-{name}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "root")


@pytest.fixture
def entries(tmp_path: Path) -> Iterator[Entries]:
    with closing(Entries.open(str(tmp_path))) as opened:
        yield opened


def queued(entries: Entries) -> list[str]:
    found = entries.due(PATH, 10_000, again=False, now=0)
    entries.done(found)
    return sorted(entry.path.partition("-")[2] for entry in found)


async def begun(store: Store, entries: Entries, *, derivations: bool = False) -> Registered:
    source = Registered(store.location, derivations=derivations)
    await source.take_in(entries)
    return source


async def test_what_was_there_before_is_left_alone(store: Store, entries: Entries) -> None:
    store.add("old")
    source = await begun(store, entries)
    assert queued(entries) == []

    store.add("new", "newer")
    await source.take_in(entries)
    assert queued(entries) == ["new", "newer"]
    await source.take_in(entries)
    assert queued(entries) == []


async def test_any_number_at_once(store: Store, entries: Entries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 3)
    source = await begun(store, entries)
    names = [f"{number:02}" for number in range(10)]
    store.add(*names)
    await source.take_in(entries)

    assert queued(entries) == names


async def test_derivations_only_if_asked_for(store: Store, entries: Entries) -> None:
    without = await begun(store, entries)
    store.add("x.drv", "x", "x.drv-not")
    await without.take_in(entries)
    assert queued(entries) == ["x", "x.drv-not"]

    asked = await begun(store, entries, derivations=True)
    store.add("y.drv", "y")
    await asked.take_in(entries)
    assert queued(entries) == ["y", "y.drv"]


async def test_locked_ones_are_waited_for(store: Store, entries: Entries) -> None:
    source = await begun(store, entries)
    lock = store.lock("one")
    store.add("one", "two")
    await source.take_in(entries)
    assert queued(entries) == ["two"]
    await source.take_in(entries)
    assert queued(entries) == []

    lock.unlink()
    await source.take_in(entries)
    assert queued(entries) == ["one"]


async def test_the_lock_of_one_that_was_killed_is_not_waited_for(
    store: Store, entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = await begun(store, entries)
    store.lock("one")
    store.add("one")
    await source.take_in(entries)
    monkeypatch.setattr(module, "LOCK_PATIENCE", 0)
    await source.take_in(entries)

    assert queued(entries) == ["one"]


async def test_the_next_process_goes_on_where_this_one_ended(store: Store, entries: Entries) -> None:
    await begun(store, entries)
    store.add("meanwhile")
    await begun(store, entries)

    assert queued(entries) == ["meanwhile"]


async def test_also_with_what_was_locked(store: Store, entries: Entries) -> None:
    source = await begun(store, entries)
    store.lock("one").touch()
    store.add("zero", "one", "two")
    await source.take_in(entries)
    assert queued(entries) == ["two", "zero"]
    store.lock("one").unlink()
    await begun(store, entries)

    assert queued(entries) == ["one", "two"]


async def test_numbers_of_paths_that_are_gone_are_not_used_again(store: Store, entries: Entries) -> None:
    store.add("one", "two")
    await begun(store, entries)
    store.remove("two")
    store.add("two")
    await begun(store, entries)

    assert queued(entries) == ["two"]


async def test_a_store_that_was_made_anew_begins_anew(store: Store, entries: Entries) -> None:
    store.add("one", "two")
    await begun(store, entries)
    store.make()
    store.add("other")
    source = await begun(store, entries)
    assert queued(entries) == []

    store.add("new")
    await source.take_in(entries)
    assert queued(entries) == ["new"]


async def test_all_of_a_store_that_is_made_anew_while_it_is_watched_is_new(store: Store, entries: Entries) -> None:
    store.add("one", "two")
    source = await begun(store, entries)
    store.lock("three")
    store.add("three")
    await source.take_in(entries)
    store.make()
    store.add("new")
    await source.take_in(entries)
    store.add("newer")
    await source.take_in(entries)

    assert queued(entries) == ["new", "newer"]


async def test_what_no_nix_writes_is_passed_over(store: Store, entries: Entries) -> None:
    source = await begun(store, entries)
    store.add("/nix/store/garbage", "/elsewhere/x", "good")
    await source.take_in(entries)

    assert queued(entries) == ["good"]


async def test_a_store_without_a_database_is_told(store: Store, entries: Entries) -> None:
    store.file.unlink()

    with pytest.raises(StoreError, match=r"db.sqlite cannot be read"):
        await begun(store, entries)


async def test_unlocking_wakes(store: Store, entries: Entries) -> None:
    source = await begun(store, entries)
    lock = store.lock("one")
    with Changes() as changes:
        source.watch(changes)
        await source.take_in(entries)
        await changes.wait(0.05)
        assert not changes.pending
        lock.unlink()
        async with asyncio.timeout(20):
            await changes.wait()
