"""Files are read at once when they are in memory, and only then."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import time
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import BadInput
from cachesrv.storage.filesystem import FilesystemStore
from cachesrv.storage.warm import WarmFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 2**20
PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "a" / "b").mkdir(parents=True)
    return folder


@pytest.fixture
def files(root: Path) -> Iterator[WarmFiles]:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    yield WarmFiles(descriptor)
    os.close(descriptor)


def read(files: WarmFiles, path: str, limit: int = LIMIT) -> bytes | None:
    view = files.read(path, limit)
    return None if view is None else bytes(view)


def chill(path: Path, start: int = 0, length: int = 0) -> None:
    """Have a file, or a part of it, on disk only."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)
        if any(pages_in_memory(file.fileno())[start // PAGE : (start + length) // PAGE if length else None]):
            pytest.skip("this file system keeps its files in memory")


def pages_in_memory(descriptor: int) -> list[bool]:
    """Asked in a way that brings none there. Source: mincore(2)."""
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * (-(-len(mapped) // PAGE)))()
        start = ctypes.c_char.from_buffer(mapped)
        status = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), pages
        )
        del start
    assert status == 0
    return [bool(page & 1) for page in pages]


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("size", [0, 1, PAGE, PAGE + 1, 512 * 1024, LIMIT])
def test_a_file_in_memory_is_read_whole(root: Path, files: WarmFiles, size: int) -> None:
    content = os.urandom(size)
    (root / "a" / "b" / "file").write_bytes(content)
    assert read(files, "a/b/file") == content


def test_sizes_in_any_order(root: Path, files: WarmFiles) -> None:
    for size in (10, 100_000, 20, 200_000, 0, 30):
        (root / "file").write_bytes(bytes([size % 256]) * size)
        assert read(files, "file") == bytes([size % 256]) * size


def test_a_cold_file_is_left_alone_until_it_was_read(root: Path, files: WarmFiles) -> None:
    file = root / "a" / "file"
    content = os.urandom(300_000)
    file.write_bytes(content)
    chill(file)
    assert read(files, "a/file") is None
    assert file.read_bytes() == content
    assert read(files, "a/file") == content


@pytest.mark.parametrize("start", [0, 2, 6])
def test_a_file_that_is_partly_cold_is_left_alone(root: Path, files: WarmFiles, start: int) -> None:
    file = root / "file"
    file.write_bytes(os.urandom(8 * LIMIT))
    chill(file, start * LIMIT, 2 * LIMIT)
    assert read(files, "file", 8 * LIMIT) is None


def test_a_file_over_the_limit_is_left_alone(root: Path, files: WarmFiles) -> None:
    (root / "file").write_bytes(bytes(LIMIT + 1))
    assert read(files, "file") is None
    assert read(files, "file", LIMIT + 1) is not None


def test_what_is_no_file_is_not_read(root: Path, files: WarmFiles) -> None:
    os.mkfifo(root / "pipe")
    (root / "file").write_bytes(b"content")
    for path in (
        "missing",
        "a",
        "a/b",
        "a/b/",
        "a/missing/x",
        "file/x",
        "file/",
        "pipe",
        "",
        ".",
        "x" * 300,
        "x/" * 3000,
    ):
        assert read(files, path) is None, path


def test_a_folder_of_no_size_is_no_empty_file() -> None:
    descriptor = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.stat("proc", dir_fd=descriptor).st_size == 0
        assert read(WarmFiles(descriptor), "proc") is None
    finally:
        os.close(descriptor)


def test_no_link_is_followed(root: Path, files: WarmFiles, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    (root / "file").write_bytes(b"content")
    (root / "to-file").symlink_to("file")
    (root / "to-outside").symlink_to(tmp_path / "outside")
    (root / "to-folder").symlink_to("a")
    (root / "to-above").symlink_to("..")
    (root / "a" / "file").write_bytes(b"content")
    for path in ("to-file", "to-outside", "to-folder/file", "to-above/outside"):
        # A link that was followed before is in memory too.
        assert (root / path).read_bytes()
        assert read(files, path) is None, path
    assert read(files, "file") == b"content"


def test_nothing_outside_is_read(root: Path, files: WarmFiles, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    (root / "file").write_bytes(b"content")
    for path in ("../outside", "a/../../outside", str(tmp_path / "outside"), str(root / "file")):
        assert read(files, path) is None, path


def test_no_descriptor_stays_open(root: Path, files: WarmFiles) -> None:
    (root / "file").write_bytes(b"content")
    (root / "large").write_bytes(bytes(100))
    before = descriptors()
    for path in ("file", "large", "missing", "a") * 50:
        read(files, path, 50)
    assert descriptors() == before


def test_a_file_that_is_replaced_meanwhile_is_read_whole(root: Path, files: WarmFiles) -> None:
    contents = [bytes([number]) * size for number, size in enumerate((50_000, 10, 0, 70_000))]
    (root / "file").write_bytes(contents[0])
    stop = Event()

    def replace() -> None:
        while not stop.is_set():
            for content in contents:
                (root / "new").write_bytes(content)
                (root / "new").rename(root / "file")

    thread = Thread(target=replace)
    thread.start()
    try:
        seen: set[bytes | None] = set()
        end = time.monotonic() + 30
        while len(seen - {None}) < len(contents) and time.monotonic() < end:
            seen |= {read(files, "file") for _ in range(100)}
            time.sleep(0.001)  # reading lets nobody else run
    finally:
        stop.set()
        thread.join()
    assert seen - {None} == set(contents)


def test_where_the_kernel_lacks_the_call_nothing_is_warm(root: Path, files: WarmFiles) -> None:
    (root / "file").write_bytes(b"content")
    files._openat2.value = 100_000
    assert read(files, "file") is None


def at_once(store: FilesystemStore, key: str) -> bytes | None:
    view = store.at_once(key, limit=LIMIT)
    return None if view is None else bytes(view)


async def test_the_file_store_never_waits_for_the_disk(tmp_path: Path) -> None:
    store = FilesystemStore(tmp_path / "objects")
    content = os.urandom(200_000)
    await store.put("main/nar/a", content)
    assert at_once(store, "main/nar/a") == content
    assert store.at_once("main/nar/a", limit=len(content) - 1) is None
    await asyncio.to_thread(chill, tmp_path / "objects" / "main" / "nar" / "a")
    assert store.at_once("main/nar/a", limit=LIMIT) is None
    assert await store.get("main/nar/a", limit=LIMIT) == content
    assert at_once(store, "main/nar/a") == content
    with pytest.raises(BadInput):
        store.at_once("main/../a", limit=LIMIT)
    await store.close()


async def test_a_closed_file_store_reads_nothing(tmp_path: Path) -> None:
    store = FilesystemStore(tmp_path / "objects")
    await store.put("main/a", b"content")
    await store.close()
    # The number of its descriptor may be given to another folder.
    (tmp_path / "other" / "main").mkdir(parents=True)
    (tmp_path / "other" / "main" / "a").write_bytes(b"of another store")
    others = [os.open(tmp_path / "other", os.O_RDONLY | os.O_DIRECTORY) for _ in range(20)]
    try:
        assert store.at_once("main/a", limit=LIMIT) is None
    finally:
        for descriptor in others:
            os.close(descriptor)
