"""No link below the root of the object store leads out of it, and nothing but a file is an object."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import NotFound, StoreError
from cachesrv.storage.filesystem import FilesystemStore
from tests.waiting import PLENTY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Call = Callable[[FilesystemStore, str], Awaitable[object]]

LIMIT = 2**20


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text("secret")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
async def store(root: Path) -> AsyncIterator[FilesystemStore]:
    store = FilesystemStore(root)
    await store.put("main/nar/real", b"real")
    yield store
    await store.close()


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


async def read(store: FilesystemStore, key: str) -> object:
    return [chunk async for chunk in store.read(key)]


async def write(store: FilesystemStore, key: str) -> object:
    async with store.writer(key, size=4) as writer:
        await writer.write(b"evil")
        return await writer.commit()


READS: dict[str, Call] = {
    "get": lambda store, key: store.get(key, limit=LIMIT),
    "read": read,
    "head": lambda store, key: store.head(key),
    "delivery": lambda store, key: store.delivery(key),
}
WRITES: dict[str, Call] = {
    "put": lambda store, key: store.put(key, b"evil"),
    "put_many": lambda store, key: store.put_many({key: b"evil"}),
    "write": write,
}
REPLACES: dict[str, Call] = {
    "put": lambda store, key: store.put(key, b"evil", replace=True),
    "put_many": lambda store, key: store.put_many({key: b"evil"}, replace=True),
}
DELETES: dict[str, Call] = {"delete": lambda store, key: store.delete([key])}


def parametrized(*tables: dict[str, Call]) -> pytest.MarkDecorator:
    calls = [(name, call) for table in tables for name, call in table.items()]
    return pytest.mark.parametrize("call", [call for _, call in calls], ids=[name for name, _ in calls])


@parametrized(READS, WRITES, REPLACES, DELETES)
async def test_a_folder_that_is_a_link_is_refused(
    store: FilesystemStore, root: Path, outside: Path, call: Call
) -> None:
    (root / "main" / "out").symlink_to(outside)
    with pytest.raises(StoreError, match="out is a symbolic link"):
        await call(store, "main/out/secret")
    assert contents(outside) == {"secret": "secret"}


@parametrized(READS, WRITES)
@pytest.mark.parametrize("target", ["secret", "nothing"])
async def test_an_object_that_is_a_link_is_refused(
    store: FilesystemStore, root: Path, outside: Path, call: Call, target: str
) -> None:
    (root / "main" / "a").symlink_to(outside / target)
    with pytest.raises(StoreError, match="main/a is a symbolic link"):
        await call(store, "main/a")
    assert contents(outside) == {"secret": "secret"}


async def test_replacing_and_deleting_takes_the_link_and_not_what_it_leads_to(
    store: FilesystemStore, root: Path, outside: Path
) -> None:
    for name in ("a", "b"):
        (root / "main" / name).symlink_to(outside / "secret")
    await store.put("main/a", b"new", replace=True)
    await store.delete(["main/b"])
    assert await store.get("main/a", limit=LIMIT) == b"new"
    assert await store.head("main/b") is None
    assert (outside / "secret").read_text() == "secret"


async def test_list_leaves_out_links_and_names_that_are_no_keys(
    store: FilesystemStore, root: Path, outside: Path
) -> None:
    (root / "main" / "out").symlink_to(outside)
    (root / "main" / "a").symlink_to(outside / "secret")
    (root / "main" / "nar" / "with space").write_text("")
    (root / "main" / ".hidden").mkdir()
    (root / "main" / ".hidden" / "b").write_text("")
    os.mkfifo(root / "main" / "pipe")
    (root / "main" / os.fsdecode(b"\xff")).mkdir()
    assert [info.key async for info in store.list("")] == ["main/nar/real"]
    with pytest.raises(StoreError, match="symbolic link"):
        _ = [info async for info in store.list("main/out/")]


@parametrized(READS)
async def test_what_is_no_file_is_no_object(store: FilesystemStore, root: Path, call: Call) -> None:
    os.mkfifo(root / "main" / "pipe")
    for key in ("main/pipe", "main/nar"):
        try:
            found = await asyncio.wait_for(call(store, key), PLENTY)
        except NotFound:
            found = None
        assert found is None


@parametrized(WRITES, REPLACES)
async def test_what_is_in_the_way_is_told(store: FilesystemStore, root: Path, call: Call) -> None:
    with pytest.raises(StoreError):
        await call(store, "main/nar")
    with pytest.raises(StoreError, match="main/nar/real is in the way"):
        await call(store, "main/nar/real/below")
    assert await store.get("main/nar/real", limit=LIMIT) == b"real"
    assert [info.key async for info in store.list("")] == ["main/nar/real"]
    assert set(contents(root / "main" / "nar")) == {"real"}


async def test_the_root_itself_may_be_reached_over_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    store = FilesystemStore(tmp_path / "link" / "objects")
    await store.put("main/a", b"a")
    await store.close()
    assert (tmp_path / "disk" / "objects" / "main" / "a").read_bytes() == b"a"
