"""How what hooks wrote comes into the queue."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import StoreError
from cachesrv.push.queue import intake, status
from cachesrv.push.queue.entries import OUTPUTS, PATH, Entries, Entry
from cachesrv.push.queue.intake import Incoming, number_written, sweep, written
from cachesrv.push.queue.spool import put
from cachesrv.push.queue.status import read_status

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def queue(tmp_path: Path) -> str:
    return str(tmp_path)


@pytest.fixture
def entries(queue: str) -> Iterator[Entries]:
    with closing(Entries.open(queue)) as opened:
        yield opened


def files(queue: str) -> list[str]:
    return sorted(os.listdir(f"{queue}/incoming"))  # noqa: PTH208  names


async def test_it_is_moved_in_order_of_age(queue: str, entries: Entries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "BATCH", 3)
    before = time.time()
    for number in range(10):
        put(queue, [b"/%d" % number], b"/x.drv")
    await Incoming(queue).take_in(entries)

    found = entries.due(PATH, 100, again=False, now=0)
    assert [entry.path for entry in found] == [f"/{number}" for number in range(10)]
    assert {entry.deriver for entry in found} == {"/x.drv"}
    assert all(before <= entry.queued <= time.time() for entry in found)
    assert files(queue) == []


async def test_without_outputs_it_is_about_the_derivation(queue: str, entries: Entries) -> None:
    put(queue, [], b"/x.drv")
    put(queue, [])
    await Incoming(queue).take_in(entries)

    assert [entry.path for entry in entries.due(OUTPUTS, 100, again=False, now=0)] == ["/x.drv"]
    assert entries.due(PATH, 100, again=False, now=0) == []
    assert files(queue) == []


async def test_what_was_taken_in_and_not_removed_is_taken_in_again(
    queue: str, entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the process is killed between the two."""
    put(queue, [b"/a"])
    with monkeypatch.context() as patch:
        patch.setattr(intake, "remove", lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            await Incoming(queue).take_in(entries)
    assert len(entries.due(PATH, 100, again=False, now=0)) == 1
    await Incoming(queue).take_in(entries)

    assert len(entries.due(PATH, 100, again=False, now=0)) == 1
    assert files(queue) == []


async def test_it_counts_once_wherever_it_is(queue: str, entries: Entries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "remove", lambda _: None)
    monkeypatch.setattr(status, "BATCH", 3)
    put(queue, [b"/a", b"/b"])
    entries.add([Entry("/a", queued=1), Entry("/b", kind=OUTPUTS, queued=2)])
    assert read_status(queue).waiting == 3
    assert read_status(queue).oldest == 1

    for _ in range(3):
        put(queue, [b"/a"])
    assert read_status(queue).waiting == 4


async def test_a_queue_that_no_hook_has_written_to_is_empty(queue: str, entries: Entries) -> None:
    await Incoming(queue).take_in(entries)

    assert number_written(queue) == 0


async def test_a_directory_that_cannot_be_read_is_told(queue: str, entries: Entries) -> None:
    with Path(queue).joinpath("incoming").open("x"):
        pass

    with pytest.raises(StoreError, match=r"what hooks wrote to .* cannot be taken in: Not a directory"):
        await Incoming(queue).take_in(entries)


def test_what_cannot_be_read_holds_up_nothing_else(queue: str) -> None:
    put(queue, [b"/a"])
    Path(queue, "incoming", "0-directory").mkdir()

    assert [one.entries()[0].path for one in written(queue)] == ["/a"]


def test_unfinished_files_are_not_read_and_in_the_end_removed(queue: str) -> None:
    put(queue, [b"/a"])
    fresh, old = (Path(queue, "incoming", name) for name in (".fresh", ".old"))
    fresh.write_text("out /fresh\n")
    old.write_text("out /old\n")
    os.utime(old, (1, 1))
    sweep(queue)

    assert number_written(queue) == 1
    assert [one.outputs for one in written(queue)] == [("/a",)]
    assert files(queue)[0] == ".fresh"
    assert len(files(queue)) == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\xff\x00out /a\n", []),
        (b"out /a\nnonsense\n\nout /b", ["/a", "/b"]),
        (b"out /a\n" + b"x" * (2 << 20) + b"\nout /b\n", ["/a"]),
    ],
)
def test_garbage_is_not_believed(queue: str, content: bytes, expected: list[str]) -> None:
    put(queue, [])
    [name] = files(queue)
    Path(queue, "incoming", name).write_bytes(content)

    [one] = written(queue)
    assert [entry.path for entry in one.entries()] == expected


@pytest.mark.parametrize("name", ["nonsense", "9" * 400, "-"])
def test_a_name_that_tells_no_time_means_now(queue: str, name: str) -> None:
    put(queue, [])
    [made] = files(queue)
    before = time.time()
    Path(queue, "incoming", made).rename(Path(queue, "incoming", name[:200]))

    [one] = written(queue)
    assert before <= one.at <= time.time()
    assert one.entries() == []


def test_entries_know_when_they_were_written(queue: str) -> None:
    put(queue, [b"/a"])
    [one] = written(queue)

    assert one.entries() == [Entry("/a", PATH, None, one.at)]
