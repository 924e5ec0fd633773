"""What is special to objects in files: how they get to the disk, what goes wrong on the way, what is left behind."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.errors import StoreError, StoreFull
from cachesrv.storage import syncing
from cachesrv.storage.base import LocalFile
from cachesrv.storage.filesystem import FilesystemStore
from cachesrv.storage.incoming import MOST_WAITING
from cachesrv.storage.tree import Tree

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

LIMIT = 2**24
LARGE = os.urandom(2**21 + 3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "state" / "objects"


@pytest.fixture
async def store(root: Path) -> AsyncIterator[FilesystemStore]:
    store = FilesystemStore(root)
    yield store
    await store.close()


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


async def write_large(store: FilesystemStore, key: str) -> bool:
    async with store.writer(key) as writer:
        await writer.write(LARGE[: 2**20 + 1])
        await writer.write(LARGE[2**20 + 1 :])
        return await writer.commit()


async def test_the_disk_begins_with_a_large_object_before_it_is_whole(
    store: FilesystemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the sync at the end would have to wait for all of it."""
    begun: list[tuple[int, int]] = []
    real = syncing.begin_writing

    def begin_writing(descriptor: int, start: int, size: int) -> None:
        real(descriptor, start, size)
        begun.append((start, size))

    monkeypatch.setattr(syncing, "begin_writing", begin_writing)
    size = 3 * MOST_WAITING + 5
    async with store.writer("main/a", size=size) as writer:
        for start in range(0, size, 2**20):
            await writer.write(bytes(min(2**20, size - start)))
        assert await writer.commit()

    assert begun == [(number * MOST_WAITING, MOST_WAITING) for number in range(3)]
    assert await store.get("main/a", limit=size) == bytes(size)


def test_what_cannot_be_begun_is_passed_over() -> None:
    reading, writing = os.pipe()
    syncing.begin_writing(writing, 0, 2**20)
    os.close(reading)
    os.close(writing)


async def test_the_folder_is_a_binary_cache_as_it_lies_there(store: FilesystemStore, root: Path) -> None:
    await store.put_many({"main/nix-cache-info": b"StoreDir: /nix/store\n", "main/nar/a.nar": b"nar"})
    assert files(root) == ["main/nar/a.nar", "main/nix-cache-info"]
    assert await store.delivery("main/nar/a.nar") == LocalFile(str(root / "main/nar/a.nar"), 3)


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
async def test_who_may_read_is_up_to_the_umask(root: Path, umask: None, mask: int, file: int, folder: int) -> None:
    os.umask(mask)
    store = FilesystemStore(root)
    await store.put("main/nar/a", b"a")
    await write_large(store, "main/nar/b")
    await store.close()
    assert [path.stat().st_mode & 0o777 for path in (root / "main/nar/a", root / "main/nar/b")] == [file, file]
    assert [path.stat().st_mode & 0o777 for path in (root, root / "main", root / "main/nar")] == [folder] * 3


class Trace:
    """The system calls that decide what survives, in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.calls: list[tuple[str, str]] = []
        real = {name: getattr(os, name) for name in ("fsync", "link", "rename", "mkdir", "unlink")}

        def fsync(descriptor: int) -> None:
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(root))
            self.calls.append(("sync", "a file" if ".incoming-" in path else path))
            real["fsync"](descriptor)

        def link(source: str, target: str, **keywords: object) -> None:
            self.calls.append(("link", target))
            real["link"](source, target, **keywords)

        def rename(source: str, target: str, **keywords: object) -> None:
            self.calls.append(("rename", target))
            real["rename"](source, target, **keywords)

        def mkdir(name: str, mode: int, **keywords: object) -> None:
            real["mkdir"](name, mode, **keywords)
            self.calls.append(("mkdir", name))

        def unlink(name: str, **keywords: object) -> None:
            real["unlink"](name, **keywords)
            if not name.startswith("."):
                self.calls.append(("unlink", name))

        for function in (fsync, link, rename, mkdir, unlink):
            monkeypatch.setattr(os, function.__name__, function)


@pytest.fixture
def trace(store: FilesystemStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> Trace:
    return Trace(monkeypatch, root)


async def test_an_object_is_on_disk_before_its_name_and_its_name_before_the_answer(
    store: FilesystemStore, trace: Trace
) -> None:
    await store.put("main/nar/a", b"a")
    # Each new folder's entry first, then the contents, then the name.
    assert trace.calls == [
        ("mkdir", "main"),
        ("sync", "."),
        ("mkdir", "nar"),
        ("sync", "main"),
        ("sync", "a file"),
        ("link", "a"),
        ("sync", "main/nar"),
    ]
    for change in (store.put("main/nar/a", b"b", replace=True), write_large(store, "main/nar/b")):
        trace.calls.clear()
        await change
        assert [call for call, _ in trace.calls] in (["sync", "rename", "sync"], ["sync", "link", "sync"])


async def test_that_an_object_was_there_is_as_durable_as_a_write(store: FilesystemStore, trace: Trace) -> None:
    await store.put("main/a", b"a")
    trace.calls.clear()
    assert not await store.put("main/a", b"b")
    assert trace.calls[-1] == ("sync", "main")


async def test_folders_that_others_made_are_synced_too(root: Path, store: FilesystemStore, trace: Trace) -> None:
    (root / "main").mkdir()
    trace.calls.clear()
    await store.put("main/a", b"a")
    assert ("sync", ".") in trace.calls


async def test_of_a_few_objects_each_file_is_synced_and_each_folder_once(store: FilesystemStore, trace: Trace) -> None:
    await store.put_many({"main/x": b"", "main/nar/x": b""})
    trace.calls.clear()
    await store.put_many({f"main/{name}": b"" for name in ("a", "nar/b", "c", "nar/d", "e")})
    assert trace.calls[:5] == [("sync", "a file")] * 5
    assert sorted(trace.calls[5:]) == sorted(
        [("link", name) for name in "abcde"] + [("sync", "main"), ("sync", "main/nar")]
    )


@pytest.mark.parametrize("together", [True, False])
async def test_many_objects_are_synced_together_and_appear_in_order(
    store: FilesystemStore, trace: Trace, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """But each by itself while much else waits to be written."""
    await store.put("main/x", b"")
    trace.calls.clear()
    monkeypatch.setattr(syncing, "waiting", lambda: 0 if together else 2**40)
    real = syncing.syncfs

    def syncfs(descriptor: int) -> None:
        trace.calls.append(("sync", "everything"))
        real(descriptor)

    monkeypatch.setattr(syncing, "syncfs", syncfs)
    names = [f"{number:02}" for number in range(20)]
    groups = [{f"main/{name}": b"" for name in names[start : start + 5]} for start in (15, 10, 5, 0)]
    await store.put_in_order(groups)

    before = [("sync", "everything")] if together else [("sync", "a file")] * 20
    links = [("link", key.removeprefix("main/")) for group in groups for key in group]
    assert trace.calls == [*before, *links, ("sync", "main")]


async def test_each_asks_by_a_file_of_its_own_what_became_of_its_files(
    store: FilesystemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an error, syncfs tells the first who asks by an open file, and nobody who asks by it after that."""
    asked: list[Path] = []
    monkeypatch.setattr(syncing, "syncfs", lambda file: asked.append(Path(f"/proc/self/fd/{file}").readlink()))
    monkeypatch.setattr(syncing, "waiting", lambda: 0)
    await asyncio.gather(*(store.put_many({f"{of}/{number}": b"" for number in range(20)}) for of in ("a", "b")))
    assert sorted(file.parent.name for file in asked) == ["a", "b"]
    assert all(file.name.startswith(".incoming-") for file in asked)


def test_each_of_several_file_systems_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(syncing, "syncfs", asked.append)
    monkeypatch.setattr(syncing, "waiting", lambda: 0)
    with ExitStack() as stack:
        here = [stack.enter_context((tmp_path / str(number)).open("wb")).fileno() for number in range(10)]
        elsewhere = stack.enter_context(open(os.memfd_create("elsewhere"), "wb")).fileno()  # noqa: PTH123  a descriptor
        monkeypatch.setattr(syncing, "TRUSTED", {syncing._type_of(at): "" for at in (here[0], elsewhere)})
        assert syncing.sync_together([*here, elsewhere])
        assert asked == [here[0], elsewhere]
        monkeypatch.setattr(syncing, "TRUSTED", {})
        assert not syncing.sync_together([*here, elsewhere])
    assert len(asked) == 2


async def test_a_disk_that_fails_is_told(store: FilesystemStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def syncfs(descriptor: int) -> None:
        raise OSError(errno.EIO, "as told")

    monkeypatch.setattr(syncing, "syncfs", syncfs)
    monkeypatch.setattr(syncing, "waiting", lambda: 0)
    with pytest.raises(StoreError, match="as told"):
        await store.put_many({f"main/{number}": b"" for number in range(20)})
    assert [info async for info in store.list("")] == []


def test_how_much_waits_to_be_written() -> None:
    assert 0 <= syncing.waiting() < 2**50


async def test_a_deletion_is_synced_once_a_folder(store: FilesystemStore, trace: Trace) -> None:
    await store.put_many({"main/a": b"", "main/nar/b": b"", "main/c": b""})
    trace.calls.clear()
    await store.delete(["main/a", "main/nar/b", "main/unknown", "main/c"])
    assert trace.calls == [
        ("unlink", "a"),
        ("unlink", "c"),
        ("sync", "main"),
        ("unlink", "b"),
        ("sync", "main/nar"),
    ]


async def test_a_folder_that_vanished_is_made_again(store: FilesystemStore, root: Path) -> None:
    await store.put("main/log/a", b"a")
    await store.delete(["main/log/a"])
    (root / "main" / "log").rmdir()
    assert await store.put("main/log/a", b"again")


async def test_a_stated_size_is_reserved(store: FilesystemStore, root: Path) -> None:
    async with store.writer("main/a", size=len(LARGE)) as writer:
        (temporary,) = files(root)
        assert (root / temporary).stat().st_blocks * 512 >= len(LARGE)
        await writer.write(LARGE)
        await writer.commit()
    assert await store.get("main/a", limit=LIMIT) == LARGE


async def test_a_file_system_that_cannot_reserve_still_stores(
    store: FilesystemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert await store.put("main/a", b"a")


@pytest.mark.parametrize("call", ["pwrite", "fsync", "link", "posix_fallocate"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
async def test_what_fails_on_the_way_is_told_and_leaves_nothing(
    store: FilesystemStore, root: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    await store.put("main/there", b"there")

    def fail(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        for attempt in (
            store.put("main/a", b"a"),
            # neither of these two reserves room
            *([store.put_many({f"main/{n}": b"a" for n in range(5)})] if call != "posix_fallocate" else []),
            *([write_large(store, "main/b")] if call != "posix_fallocate" else []),
        ):
            with pytest.raises(StoreError, match=os.strerror(error)) as caught:
                await attempt
            assert isinstance(caught.value, StoreFull) == (error in (errno.ENOSPC, errno.EDQUOT))
    assert files(root) == ["main/there"]
    assert await write_large(store, "main/b")


async def test_after_a_failed_write_the_writer_cannot_commit(
    store: FilesystemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with store.writer("main/a") as writer:
        await writer.write(b"begin")
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", fail)
            with pytest.raises(StoreFull):
                await writer.write(LARGE)
        with pytest.raises(StoreError):
            await writer.write(b"end")
        with pytest.raises(StoreError):
            await writer.commit()
    assert await store.head("main/a") is None


async def test_short_writes_and_reads_are_continued(store: FilesystemStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, pread = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:100_001], at))
    monkeypatch.setattr(os, "pread", lambda fd, length, at: pread(fd, min(length, 99_999), at))
    await write_large(store, "main/a")
    assert await store.get("main/a", limit=LIMIT) == LARGE
    assert b"".join([chunk async for chunk in store.read("main/a")]) == LARGE


async def test_errors_while_reading_are_told(store: FilesystemStore, monkeypatch: pytest.MonkeyPatch) -> None:
    await store.put("main/a", b"a")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for name, call in (("pread", store.get("main/a", limit=9)), ("stat", store.head("main/a"))):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, fail)
            with pytest.raises(StoreError, match="main/a: Input/output error"):
                await call


async def test_a_file_that_is_cut_off_while_it_is_read_does_not_just_end(store: FilesystemStore, root: Path) -> None:
    await store.put("main/a", LARGE)
    chunks = store.read("main/a")
    await anext(chunks)
    os.truncate(root / "main/a", 2**20)
    with pytest.raises(StoreError, match="shorter"):
        async for _ in chunks:
            pass


async def test_a_root_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot open the object store"):
        FilesystemStore(tmp_path / "file" / "objects")


async def test_two_stores_of_one_folder_agree_who_creates(store: FilesystemStore, root: Path) -> None:
    other = FilesystemStore(root)
    for n in range(20):
        created = await asyncio.gather(store.put(f"main/{n}", b"one"), other.put(f"main/{n}", b"two"))
        assert sorted(created) == [False, True]
        assert await store.get(f"main/{n}", limit=9) == (b"one" if created[0] else b"two")
    await other.close()


def plant(path: Path, *, age: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age, time.time() - age))


async def test_what_is_deleted_just_then_is_created(
    store: FilesystemStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the call that finds the name taken and the look at who has it."""
    await store.put("main/nar/file", b"before")
    truly = os.link

    def link(*names: str, **options: Any) -> None:
        try:
            truly(*names, **options)
        except FileExistsError:
            (root / "main" / "nar" / "file").unlink()
            raise

    monkeypatch.setattr(os, "link", link)
    assert await store.put("main/nar/file", b"after")
    assert await store.get("main/nar/file", limit=LIMIT) == b"after"
    assert files(root) == ["main/nar/file"]


async def test_sweep_takes_what_was_abandoned(store: FilesystemStore, root: Path) -> None:
    await store.put("main/nar/a", b"a")
    plant(root / ".incoming-0", age=100)
    plant(root / "main/nar/.incoming-1", age=100)
    plant(root / "main/.incoming-2", age=10)
    plant(root / "main/.keep", age=100)
    plant(root / "main/.git/incoming-3", age=100)
    (root / "main/.incoming-link").symlink_to(root / "main/.keep")
    found = {info.key: (info.size, time.time() - info.modified > 50) async for info in store.leftovers(older_than=50)}
    assert found == {".incoming-0": (4, True), "main/nar/.incoming-1": (4, True)}
    assert await store.sweep(older_than=50) == 2
    assert files(root) == [
        "main/.git/incoming-3",
        "main/.incoming-2",
        "main/.incoming-link",
        "main/.keep",
        "main/nar/a",
    ]
    assert await store.sweep(older_than=5) == 1
    assert await store.sweep(older_than=0) == 0


async def test_sweep_leaves_what_somebody_is_writing_however_slowly(store: FilesystemStore, root: Path) -> None:
    other = FilesystemStore(root)
    async with store.writer("main/a") as writer:
        await writer.write(LARGE)
        (temporary,) = files(root)
        os.utime(root / temporary, (0, 0))
        assert await other.sweep(older_than=50) == 0
        await writer.commit()
    assert await other.get("main/a", limit=LIMIT) == LARGE
    await other.close()


async def test_sweep_goes_by_age_where_there_are_no_locks(
    store: FilesystemStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert await store.put("main/a", b"a")
    plant(root / "main/.incoming-1", age=100)
    plant(root / "main/.incoming-2", age=10)
    assert await store.sweep(older_than=50) == 1


async def test_what_is_somebody_elses_keeps_nothing_from_being_swept(
    store: FilesystemStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As what was begun as root, once, by mistake."""
    names = ["closed", "read-only", "sticky", "ours"]
    for name in names:
        plant(root / f".incoming-{name}", age=100)
    real_open, real_unlink = os.open, os.unlink

    def open_(path: str, flags: int, *args: Any, **kwargs: Any) -> int:
        if path == ".incoming-closed" or (path == ".incoming-read-only" and flags & os.O_RDWR):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real_open(path, flags, *args, **kwargs)

    def unlink(path: str, **kwargs: Any) -> None:
        if path == ".incoming-sticky":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        real_unlink(path, **kwargs)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "unlink", unlink)
    assert await store.sweep(older_than=50) == 2
    assert files(root) == [".incoming-closed", ".incoming-sticky"]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_close_leaves_no_temporary_file_and_no_descriptor(root: Path) -> None:
    before = descriptors()
    store = FilesystemStore(root)
    await store.put_many({f"main/{n}": b"x" for n in range(100)})
    chunks = store.read("main/1")
    await anext(chunks)
    await chunks.aclose()  # type: ignore[attr-defined]  # a generator
    assert [info async for info in store.list("")]
    async with store.writer("main/open") as writer:
        await writer.write(LARGE)
        await store.close()
    assert len(files(root)) == 100
    assert descriptors() == before


async def test_files_of_a_folder_are_deleted_in_the_given_order(
    store: FilesystemStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a folder which others read is whole at every moment."""
    keys = ["main/b", "main/nar/y", "main/a", "other/x", "main/nar/x", "main/c"]
    await store.put_many(dict.fromkeys(keys, b""))
    unlink, removed = os.unlink, []

    def noting(name: str, *, dir_fd: int) -> None:
        removed.append(name)
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", noting)
    await store.delete(keys)
    assert removed == ["b", "a", "c", "y", "x", "x"]
    assert [info async for info in store.list("")] == []


async def test_a_writer_that_is_cancelled_twice_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FilesystemStore(root, threads=1)
    begun, busy, release = asyncio.Event(), threading.Event(), threading.Event()

    def wait(_tree: Tree, _key: str) -> None:
        busy.set()
        release.wait()

    async def write() -> None:
        async with store.writer("main/nar/a") as writer:
            await writer.write(LARGE)
            begun.set()
            await asyncio.Event().wait()

    writing = asyncio.create_task(write())
    await begun.wait()
    monkeypatch.setattr(Tree, "stat", wait)
    looking = asyncio.create_task(store.head("main/nar/b"))
    await asyncio.to_thread(busy.wait)
    for _ in range(3):
        writing.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    release.set()
    await asyncio.wait([writing, looking])
    assert writing.cancelled()
    assert files(root) == []
    await store.close()
