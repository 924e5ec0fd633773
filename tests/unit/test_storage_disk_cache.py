"""The disk cache: within its limit at every moment, exact afterwards, whole or not at all."""

from __future__ import annotations

import asyncio
import errno
import os
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cachesrv.errors import BadInput, StoreError, StoreFull
from cachesrv.storage import disk_cache
from cachesrv.storage.base import ByteRange, FilePart, LocalFile
from cachesrv.storage.disk_cache import DiskCache, Incoming
from cachesrv.storage.tree import Tree

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LIMIT = 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "nar-cache"


@pytest.fixture
async def cache(root: Path) -> AsyncIterator[DiskCache]:
    cache = DiskCache(root, limit=LIMIT)
    await cache.open()
    yield cache
    await cache.close()


async def keep(cache: DiskCache, key: str, data: bytes) -> None:
    async with cache.incoming(key, len(data)) as incoming:
        await incoming.write(data)
        await incoming.commit()


def files(root: Path) -> dict[str, int]:
    """Every file but the ledger, temporary ones too, and its size."""
    found = (path for path in root.rglob("*") if path.is_file() and path.name != ".ledger")
    return {str(path.relative_to(root)): path.stat().st_size for path in found}


async def contents(cache: DiskCache, key: str) -> bytes | None:
    found = await cache.get(key)
    if found is None:
        return None
    with open(found.path, "rb") as file:  # noqa: ASYNC230, PTH123  a small file
        return file.read()


def used_at(root: Path, key: str, seconds: float) -> None:
    """Say when an object was used last."""
    os.utime(root / key, (seconds, seconds))


async def test_what_is_kept_is_there(cache: DiskCache, root: Path) -> None:
    await keep(cache, "main/nar/a", b"data")
    assert await cache.get("main/nar/a") == LocalFile(str(root / "main/nar/a"), 4)
    assert await contents(cache, "main/nar/a") == b"data"
    assert await cache.used() == 4
    warm = cache.at_once("main/nar/a", limit=4)
    assert warm is None or bytes(warm) == b"data"
    assert cache.at_once("main/nar/a", limit=3) is None


async def test_what_is_not_kept_is_not_there(cache: DiskCache) -> None:
    assert await cache.get("main/nar/a") is None
    assert cache.at_once("main/nar/a", limit=100) is None


async def test_what_is_discarded_is_gone(cache: DiskCache, root: Path) -> None:
    await keep(cache, "main/nar/a", b"data")
    await cache.discard("main/nar/a")
    await cache.discard("main/nar/never-there")
    assert await cache.get("main/nar/a") is None
    assert (await cache.used(), files(root)) == (0, {})


@pytest.mark.parametrize("key", ["", "../a", ".ledger", "main/.incoming-x", "a//b"])
async def test_no_key_leads_elsewhere(cache: DiskCache, key: str) -> None:
    with pytest.raises(BadInput):
        await cache.get(key)
    with pytest.raises(BadInput):
        await keep(cache, key, b"")
    with pytest.raises(BadInput):
        await cache.discard(key)


async def test_what_was_used_longest_ago_makes_room(cache: DiskCache, root: Path) -> None:
    for age, key in enumerate(["new", "old", "oldest", "newest"]):
        await keep(cache, key, bytes(250))
        used_at(root, key, 1000 - 10 * age)
    used_at(root, "newest", 5000)
    await keep(cache, "another", bytes(250))
    # Room for nine tenths: what goes, goes in one look at all files.
    assert files(root) == {"new": 250, "newest": 250, "another": 250}
    assert await cache.used() == 750


@pytest.mark.parametrize("used", ["get", "at_once", "warm_file"])
async def test_being_asked_for_is_being_used(
    cache: DiskCache, root: Path, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("a", "b"):
        await keep(cache, key, bytes(500))
        used_at(root, key, 1000 if key == "a" else 2000)
    if used == "get":
        await cache.get("a")
    elif used == "at_once":
        if cache.at_once("a", limit=LIMIT) is None:
            pytest.skip("nothing can be read at once here")
    elif (found := cache.warm_file("a", limit=LIMIT)) is not None:
        os.close(found[0])
    else:
        pytest.skip("nothing can be opened at once here")
    await keep(cache, "c", bytes(10))
    assert set(files(root)) == {"a", "c"}


async def test_it_does_not_matter_if_use_cannot_be_noted(
    cache: DiskCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    await keep(cache, "a", b"data")
    monkeypatch.setattr(os, "utime", refuse)
    assert await contents(cache, "a") == b"data"
    assert cache.at_once("a", limit=4) in (None, b"data")


async def test_what_is_larger_than_the_cache_costs_nobody_the_place(cache: DiskCache, root: Path) -> None:
    await keep(cache, "a", bytes(900))
    with pytest.raises(StoreFull, match="1001 bytes is larger than the disk cache"):
        await keep(cache, "b", bytes(LIMIT + 1))
    assert files(root) == {"a": 900}


async def test_it_leaves_room_to_others_on_its_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept goes when others fill the disk, and what does not fit then is not kept."""
    others = 0
    monkeypatch.setattr(Tree, "free", lambda _: 2000 - others - sum(files(root).values()))
    cache = DiskCache(root, limit=1000, spare=500)
    await cache.open()
    await keep(cache, "a", bytes(300))
    await keep(cache, "b", bytes(300))
    others = 900
    await keep(cache, "c", bytes(200))
    assert files(root) == {"b": 300, "c": 200}
    others = 1600
    with pytest.raises(StoreFull, match="its disk is of other things"):
        await keep(cache, "d", bytes(10))
    await cache.close()


async def test_objects_on_their_way_cost_nobody_the_place_in_vain(cache: DiskCache, root: Path) -> None:
    await keep(cache, "a", bytes(300))
    async with cache.incoming("b", 600):
        with pytest.raises(StoreFull, match="full of objects on their way"):
            await keep(cache, "c", bytes(401))
        assert "a" in files(root)
        await keep(cache, "c", bytes(400))
    assert files(root) == {"c": 400}
    assert await cache.used() == 400


async def test_room_is_reserved_before_the_bytes_come(cache: DiskCache, root: Path) -> None:
    async with cache.incoming("a", 700) as incoming:
        assert await cache.used() == 700
        assert sum(files(root).values()) == 700
        await incoming.write(bytes(10))
        assert await cache.used() == 700
    assert (await cache.used(), files(root)) == (0, {})


async def test_an_object_of_unknown_size_takes_what_it_needs(
    cache: DiskCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_cache, "_STEP", 100)
    await keep(cache, "old", bytes(500))
    async with cache.incoming("a") as incoming:
        for _ in range(13):
            await incoming.write(b"x" * 30)
            assert await cache.used() == sum(files(root).values()) <= LIMIT
        await incoming.commit()
    assert files(root) == {"old": 500, "a": 390}
    assert await cache.used() == 890
    async with cache.incoming("b") as incoming:
        await incoming.write(bytes(LIMIT))
        with pytest.raises(StoreFull):
            await incoming.write(b"x")
    assert await cache.used() == sum(files(root).values()) == 0


async def test_it_can_be_read_as_far_as_it_has_come(cache: DiskCache) -> None:
    async with cache.incoming("a", 10) as incoming:
        assert await incoming.read(0, 10) == b""
        await incoming.write(b"01234")
        assert await incoming.read(0, 10) == b"01234"
        assert await incoming.read(3, 1) == b"3"
        assert await incoming.read(7, 2) == b""
        assert await cache.get("a") is None
        await incoming.write(b"56789")
        await incoming.commit()
        assert await incoming.read(4, 10) == b"456789"
        assert await cache.get("a")
    with pytest.raises(StoreError, match="no longer on its way"):
        await incoming.read(0, 1)


async def test_its_file_outlives_it_for_who_reopened_it(cache: DiskCache) -> None:
    """And is written to by position: where readers are does not matter."""
    async with cache.incoming("a", 10) as incoming:
        await incoming.write(b"01234")
        file = incoming.reopened()
        file.seek(0)
        await incoming.write(b"56789")
        await incoming.commit()
    await cache.discard("a")
    with file:
        assert FilePart(file, ByteRange(0, 10)).read() == b"0123456789"
        with pytest.raises(StoreError, match="has become shorter"):
            FilePart(file, ByteRange(5, 11)).read()
    with pytest.raises(StoreError, match="no longer on its way"):
        incoming.reopened()


async def test_it_is_not_closed_under_a_reader(cache: DiskCache) -> None:
    """A number of a closed file may be that of another one in the next moment."""
    async with cache.incoming("a", LIMIT) as incoming:
        await incoming.write(b"x" * LIMIT)
        readers = [asyncio.create_task(incoming.read(0, LIMIT)) for _ in range(50)]
        await asyncio.sleep(0)
    assert await asyncio.gather(*readers) == [b"x" * LIMIT] * 50


async def test_who_is_second_leaves_the_first(cache: DiskCache, root: Path) -> None:
    async with cache.incoming("a", 5) as first, cache.incoming("a", 6) as second:
        await first.write(b"first")
        await second.write(b"second")
        await first.commit()
        await second.commit()
    assert await contents(cache, "a") == b"first"
    assert (await cache.used(), files(root)) == (5, {"a": 5})


async def test_a_task_that_is_cancelled_leaves_nothing(cache: DiskCache, root: Path) -> None:
    reached = asyncio.Event()

    async def work() -> None:
        async with cache.incoming("a", 600) as incoming:
            await incoming.write(bytes(100))
            reached.set()
            await asyncio.sleep(60)

    for cancels in (1, 2, 5):
        reached.clear()
        task = asyncio.create_task(work())
        await reached.wait()
        for _ in range(cancels):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await cache.used(), files(root)) == (0, {})


@pytest.mark.parametrize("steps", range(0, 40, 3))
async def test_the_ledger_is_right_wherever_a_task_is_cancelled(cache: DiskCache, root: Path, steps: int) -> None:
    task = asyncio.create_task(keep(cache, "a", bytes(600)))
    for _ in range(steps):
        await asyncio.sleep(0.0002)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await cache.used() == sum(files(root).values())
    assert set(files(root)) <= {"a"}


async def test_a_lower_limit_makes_room_at_the_opening(cache: DiskCache, root: Path) -> None:
    for number in range(4):
        await keep(cache, f"nar/{number}", bytes(200))
        used_at(root, f"nar/{number}", 1000 + number)
    lower = DiskCache(root, limit=450)
    await lower.open()
    assert files(root) == {"nar/2": 200, "nar/3": 200}
    assert await lower.used() == 400
    await lower.close()


async def test_what_others_put_there_is_counted(cache: DiskCache, root: Path) -> None:
    (root / "foreign").write_bytes(bytes(600))
    (root / "link").symlink_to("/etc/passwd")
    await cache.open()
    assert await cache.used() == 600
    await keep(cache, "a", bytes(600))
    assert files(root) == {"a": 600, "link": (root / "link").stat().st_size}


async def test_a_disk_that_is_full_is_told_from_one_that_fails(
    cache: DiskCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> None:
        def call(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "posix_fallocate", call)

    fail(errno.ENOSPC)
    with pytest.raises(StoreFull, match="No space left"):
        await keep(cache, "a", b"data")
    fail(errno.EIO)
    with pytest.raises(StoreError, match="Input/output error"):
        await keep(cache, "a", b"data")
    assert await cache.used() == sum(files(root).values())


async def test_where_nothing_can_be_reserved_sizes_count_all_the_same(
    cache: DiskCache, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    async with cache.incoming("a", 700) as incoming:
        assert sum(files(root).values()) == 700
        await incoming.write(b"x" * 700)
        await incoming.commit()
    assert await contents(cache, "a") == b"x" * 700


async def test_after_closing_nothing_is_done(root: Path) -> None:
    cache = DiskCache(root, limit=LIMIT)
    await cache.open()
    await keep(cache, "a", b"data")
    await cache.close()
    await cache.close()
    assert cache.at_once("a", limit=100) is None
    for call in (cache.get("a"), cache.used(), cache.discard("a"), keep(cache, "b", b"")):
        with pytest.raises(StoreError, match="closed"):
            await call


class Model(RuleBasedStateMachine):
    """The cache against a dict in order of use; the test says when each object was used."""

    keys = st.sampled_from([f"nar/{name}" for name in "abcdef"])
    sizes = st.integers(0, LIMIT // 2) | st.sampled_from([LIMIT, LIMIT + 1])

    @initialize()
    def start(self) -> None:
        self.folder = TemporaryDirectory()
        self.root = Path(self.folder.name) / "cache"
        self.runner = asyncio.Runner()
        self.kept: dict[str, bytes] = {}
        self.coming: list[tuple[str, int, AsyncExitStack, Incoming]] = []
        self.clock = 1000
        self.open()

    def open(self) -> None:
        async def opened() -> DiskCache:
            cache = DiskCache(self.root, limit=LIMIT)
            await cache.open()
            return cache

        self.cache = self.runner.run(opened())

    def used(self, key: str) -> None:
        self.clock += 1
        used_at(self.root, key, self.clock)
        self.kept[key] = self.kept.pop(key)

    @property
    def reserved(self) -> int:
        return sum(size for _, size, _, _ in self.coming)

    def make_room(self, size: int) -> bool:
        """What the cache should do: whether there is room, once the oldest have gone."""
        used = self.reserved + sum(map(len, self.kept.values()))
        if used + size <= LIMIT:
            return True
        if self.reserved + size > LIMIT:
            return False
        for key in list(self.kept):
            if used + size <= LIMIT * 0.9:
                break
            used -= len(self.kept.pop(key))
        return True

    @rule(key=keys, size=sizes)
    def begin(self, key: str, size: int) -> None:
        async def begun() -> tuple[AsyncExitStack, Incoming]:
            stack = AsyncExitStack()
            return stack, await stack.enter_async_context(self.cache.incoming(key, size))

        if size <= LIMIT and self.make_room(size):
            self.coming.append((key, size, *self.runner.run(begun())))
        else:
            with pytest.raises(StoreFull):
                self.runner.run(begun())

    @precondition(lambda self: self.coming)
    @rule(data=st.data(), commits=st.booleans())
    def end(self, data: st.DataObject, commits: bool) -> None:
        key, size, stack, incoming = self.coming.pop(data.draw(st.integers(0, len(self.coming) - 1)))
        content = os.urandom(size)

        async def ended() -> None:
            async with stack:
                if commits:
                    await incoming.write(content[: size // 2])
                    await incoming.write(content[size // 2 :])
                    await incoming.commit()

        self.runner.run(ended())
        if commits and key not in self.kept:
            self.kept[key] = content
            self.used(key)

    @rule(key=keys)
    def get(self, key: str) -> None:
        assert self.runner.run(contents(self.cache, key)) == self.kept.get(key)
        if key in self.kept:
            self.used(key)

    @rule(key=keys)
    def discard(self, key: str) -> None:
        self.runner.run(self.cache.discard(key))
        self.kept.pop(key, None)

    @precondition(lambda self: not self.coming)
    @rule()
    def reopen(self) -> None:
        self.runner.run(self.cache.close())
        self.open()

    @rule()
    def another_process_opens(self) -> None:
        async def look() -> int:
            other = DiskCache(self.root, limit=LIMIT)
            await other.open()
            try:
                return await other.used()
            finally:
                await other.close()

        assert self.runner.run(look()) == self.reserved + sum(map(len, self.kept.values()))

    @invariant()
    def exact(self) -> None:
        there = {key: size for key, size in files(self.root).items() if not key.rpartition("/")[2].startswith(".")}
        assert there == {key: len(content) for key, content in self.kept.items()}
        used = self.runner.run(self.cache.used())
        assert used == sum(files(self.root).values()) == self.reserved + sum(there.values())
        assert used <= LIMIT

    def teardown(self) -> None:
        for _, _, stack, _ in self.coming:
            self.runner.run(stack.aclose())
        self.runner.run(self.cache.close())
        self.runner.close()
        self.folder.cleanup()


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


async def test_what_others_have_under_way_keeps_nobody_from_opening_it(root: Path) -> None:
    async with AsyncExitStack() as stack:
        busy = DiskCache(root, limit=LIMIT)
        stack.push_async_callback(busy.close)
        await busy.open()
        await keep(busy, "nar/old", bytes(100))
        incoming = await stack.enter_async_context(busy.incoming("nar/a", 800))
        smaller = DiskCache(root, limit=LIMIT // 2)
        stack.push_async_callback(smaller.close)
        await smaller.open()
        assert await smaller.get("nar/old") is None
        assert await smaller.used() == 800
        with pytest.raises(StoreFull):
            await keep(smaller, "nar/b", bytes(1))
        await incoming.write(bytes(800))
        await incoming.commit()
        assert await contents(smaller, "nar/a") == bytes(800)


async def test_room_that_an_object_has_already_is_not_asked_for_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, disk = 100, 250
    monkeypatch.setattr(disk_cache, "_STEP", step)
    monkeypatch.setattr(Tree, "free", lambda _: disk - sum(files(root).values()))
    cache = DiskCache(root, limit=LIMIT)
    await cache.open()
    async with cache.incoming("nar/a") as incoming:
        for _ in range(2):
            await incoming.write(bytes(step))
        with pytest.raises(StoreFull):
            await incoming.write(bytes(step))
        await incoming.commit()
    assert files(root) == {"nar/a": 2 * step}
    await cache.close()
