"""What pushes leave on a disk, and what is given up when it is full."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import StoreFull
from cachesrv.services import disk_room
from cachesrv.services.disk_room import DiskRoom, Place

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 2**20
SIZE = 4 * MIB


class Disk:
    """As full as it is said to be; what its reserve takes counts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reserve = folder / "reserve"
        self.left = 100 * MIB

    @property
    def reserved(self) -> int:
        return self.reserve.stat().st_blocks * 512 if self.reserve.exists() else 0

    def free(self, _folder: Path) -> int:
        return self.left - self.reserved


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(tmp_path)
    monkeypatch.setattr(disk_room, "_free", disk.free)
    return disk


@pytest.fixture
def make_room(disk: Disk) -> Callable[..., DiskRoom]:
    def make(size: int = SIZE, *, has_objects: bool = True) -> DiskRoom:
        objects = Place(disk.folder / "objects", disk.folder / "other", has_objects=has_objects)
        return DiskRoom([Place(disk.folder, disk.reserve), objects], size=size)

    return make


async def test_a_nar_leaves_what_the_reserve_takes_and_as_much_again(
    disk: Disk, make_room: Callable[..., DiskRoom]
) -> None:
    room = make_room()
    for _ in range(2):  # whether the reserve is there makes no difference
        await room.for_nar(92 * MIB)
        with pytest.raises(StoreFull, match="1 more bytes are needed") as caught:
            await room.for_nar(92 * MIB + 1)
        assert caught.value.missing == 1
        room.keep()
        assert disk.reserved == SIZE


async def test_what_was_taken_in_can_be_published(disk: Disk, make_room: Callable[..., DiskRoom]) -> None:
    room = make_room()
    disk.left = 8 * MIB - 1
    with pytest.raises(StoreFull):
        await room.for_nar()
    await room.for_records()
    disk.left = 6 * MIB - 1
    with pytest.raises(StoreFull):
        await room.for_records()


async def test_nars_elsewhere_take_no_room_here(make_room: Callable[..., DiskRoom]) -> None:
    await make_room(has_objects=False).for_nar(10**15)


async def test_without_a_reserve_what_does_not_fit_is_refused_too(
    disk: Disk, make_room: Callable[..., DiskRoom]
) -> None:
    room = make_room(0)
    room.keep()
    assert not disk.reserve.exists()
    await room.for_nar(100 * MIB)
    with pytest.raises(StoreFull):
        await room.for_nar(100 * MIB + 1)


async def test_nothing_is_looked_at_where_nothing_is_known() -> None:
    room = DiskRoom.unlimited()
    room.keep()
    await room.for_nar(10**18)


def test_one_disk_has_one_reserve_for_its_owner_alone(disk: Disk, make_room: Callable[..., DiskRoom]) -> None:
    make_room().keep()
    assert [file.name for file in disk.folder.iterdir()] == ["reserve"]
    assert disk.reserve.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("left", "there"), [(5 * MIB, SIZE), (5 * MIB - 1, 0), (0, 0)])
def test_it_is_made_where_there_is_room(disk: Disk, make_room: Callable[..., DiskRoom], left: int, there: int) -> None:
    disk.left = left
    make_room().keep()
    assert disk.reserved == there


def test_it_takes_another_size(disk: Disk, make_room: Callable[..., DiskRoom]) -> None:
    for size in (2 * SIZE, SIZE, 3 * SIZE, 0):
        make_room(size).keep()
        assert disk.reserved == size
    assert not disk.reserve.exists()


def test_it_is_given_up_when_the_disk_is_full_and_comes_back(disk: Disk, make_room: Callable[..., DiskRoom]) -> None:
    room = make_room()
    room.keep()
    with room.given_up_if_full():
        assert disk.reserved == SIZE
    disk.left = 2 * SIZE - 1
    with room.given_up_if_full():
        assert disk.reserved == 0
        room.keep()
        make_room().keep()  # that of a server beside it
        assert disk.reserved == 0
        disk.left = 50 * MIB
    assert disk.reserved == SIZE


def test_it_comes_back_whatever_happens(disk: Disk, make_room: Callable[..., DiskRoom]) -> None:
    room = make_room()
    room.keep()
    disk.left = 2 * SIZE - 1
    with pytest.raises(KeyError), room.given_up_if_full():
        raise KeyError
    assert disk.reserved == SIZE


def test_two_that_make_room_at_once(disk: Disk, make_room: Callable[..., DiskRoom]) -> None:
    room = make_room()
    room.keep()
    disk.left = SIZE
    with room.given_up_if_full():
        with make_room().given_up_if_full():
            assert disk.reserved == 0
        assert disk.reserved == 0


async def test_it_comes_back_when_room_comes_later(
    disk: Disk, make_room: Callable[..., DiskRoom], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.left = 0
    room, kept = make_room(), asyncio.Event()
    keep, loop = room.keep, asyncio.get_running_loop()

    def keep_and_tell() -> None:
        keep()
        loop.call_soon_threadsafe(kept.set)

    monkeypatch.setattr(room, "keep", keep_and_tell)
    async with room.kept(every=0.001), asyncio.timeout(60):
        await kept.wait()
        assert disk.reserved == 0
        disk.left = 50 * MIB
        while not disk.reserved:
            kept.clear()
            await kept.wait()
    assert disk.reserved == SIZE


def test_where_it_cannot_be_made_work_goes_on(
    disk: Disk, make_room: Callable[..., DiskRoom], capsys: pytest.CaptureFixture[str]
) -> None:
    disk.reserve.mkdir()
    make_room().keep()
    assert "there can be no reserve" in "".join(capsys.readouterr())
