"""Both ends of a push, and stores at a time that is moved by hand, for all tests that need them as they are; a test
that needs more has a fixture of the same name that asks for these, or makes its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cachesrv.push import nar_upload
from tests.collecting import Clock, Process, Stores, open_stores
from tests.push_doubles import FakeCache, TemporaryStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> TemporaryStore:
    """A store with nothing in it."""
    directory = tmp_path / "store"
    directory.mkdir()
    return TemporaryStore(directory)


@pytest.fixture
async def cache() -> AsyncIterator[FakeCache]:
    """A server with nothing in it, that takes NARs one by one and whole."""
    async with FakeCache() as running:
        yield running


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NAR that is refused, or whose connection breaks, is sent again at once."""
    monkeypatch.setattr(nar_upload, "_PAUSE", 0.01)


@pytest.fixture
def clock() -> Iterator[Clock]:
    """The time, for the whole process."""
    clock = Clock()
    with clock.in_force():
        yield clock


@pytest.fixture
async def stores(clock: Clock) -> AsyncIterator[Stores]:
    """Stores with nothing in them."""
    async with open_stores() as stores:
        yield stores


@pytest.fixture
async def process(stores: Stores) -> AsyncIterator[Process]:
    """The services of a process on these stores."""
    process = Process(stores)
    yield process
    await process.end()
