"""The journal of what is on its way: private, bounded, shared by processes; what was altered in it is passed over."""

from __future__ import annotations

import multiprocessing
import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cachesrv.push.arrived import Arrived, ArrivedPart, FrameAt, Transfer
from cachesrv.push.journal import Journal, Limits, journal_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CACHE = "https://cache.example.org/main"
ONE = Transfer(CACHE, f"sha256:{'1' * 52}", "a" * 40, 3)
OTHER = replace(ONE, upload="b" * 40, level=9)


def part(number: int, frames: tuple[int, ...] = (7, 8)) -> ArrivedPart:
    return ArrivedPart(number, 10, bytes([number]) * 32, f"tag-{number}", 2 * number, 10 * number, frames)


def listed(parts: list[ArrivedPart]) -> list[ArrivedPart]:
    return [replace(one, frames=tuple(one.frames)) for one in parts]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "transfers-1.sqlite"


@pytest.fixture
def journal(file: Path) -> Iterator[Journal]:
    opened = Journal.open(file)
    yield opened
    opened.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [1_000_000.0]
    monkeypatch.setattr("cachesrv.push.journal.time.time", lambda: now[0])
    return now


def test_what_was_added_is_found(journal: Journal, clock: list[float]) -> None:
    for number in (2, 1):
        journal.add(ONE, part(number))
    clock[0] += 1
    journal.add(OTHER, part(3, ()))
    journal.add(replace(ONE, cache="https://elsewhere.example.org/main"), part(9))

    assert journal.transfers(CACHE, ONE.nar_hash) == [OTHER, ONE]
    assert listed(journal.parts(ONE)) == [part(1), part(2)]
    assert listed(journal.parts(OTHER)) == [part(3, ())]
    assert journal.transfers(CACHE, "sha256:another") == []


def test_what_is_begun_has_no_parts_yet(journal: Journal) -> None:
    journal.begin(ONE)
    assert journal.transfers(CACHE, ONE.nar_hash) == [ONE]
    assert journal.parts(ONE) == []
    journal.add(ONE, part(1))
    journal.begin(ONE)
    assert listed(journal.parts(ONE)) == [part(1)]


def test_what_is_over_is_forgotten(journal: Journal) -> None:
    journal.add(ONE, part(1))
    journal.add(OTHER, part(1))
    journal.forget([ONE])

    assert journal.transfers(CACHE, ONE.nar_hash) == [OTHER]
    assert journal.parts(ONE) == []


def test_it_is_for_its_owner_alone(journal: Journal, file: Path) -> None:
    journal.add(ONE, part(1))
    assert {name.stat().st_mode & 0o777 for name in file.parent.iterdir()} == {0o600}
    assert file.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "change",
    [
        "size = 11",
        "digest = zeroblob(32)",
        "tag = 'another'",
        "first = 0",
        "start = start - 1",
        "frames = zeroblob(16)",
        "frames = zeroblob(15)",
        "frames = 'text'",
        "sum = zeroblob(32)",
        "upload = 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb'",
    ],
)
def test_a_row_that_was_altered_is_passed_over(journal: Journal, file: Path, change: str) -> None:
    journal.add(ONE, part(1))
    journal.add(ONE, part(2))
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute(f"UPDATE parts SET {change} WHERE number = 1")

    assert listed(journal.parts(ONE)) == [part(2)]
    assert journal.parts(OTHER) == []


def test_another_level_than_the_one_that_was_noted_counts_for_nothing(journal: Journal, file: Path) -> None:
    journal.add(ONE, part(1))
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("UPDATE transfers SET level = 4")
    (transfer,) = journal.transfers(CACHE, ONE.nar_hash)
    assert journal.parts(transfer) == []


def test_what_is_too_old_goes(journal: Journal, clock: list[float]) -> None:
    journal.add(ONE, part(1))
    clock[0] += Limits().age
    journal.add(OTHER, part(1))
    journal.prune()
    assert len(journal.transfers(CACHE, ONE.nar_hash)) == 2
    clock[0] += 1
    journal.prune()
    assert journal.transfers(CACHE, ONE.nar_hash) == [OTHER]
    assert journal.parts(ONE) == []


@pytest.mark.parametrize("limits", [Limits(transfers=2), Limits(size=2 * (2 * 200 + 2 * 16))])
def test_what_is_too_much_goes_the_oldest_first(file: Path, clock: list[float], limits: Limits) -> None:
    with closing(Journal.open(file, limits)) as journal:
        made = [replace(ONE, upload=name * 40) for name in "abc"]
        for transfer in made:
            clock[0] += 1
            journal.add(transfer, part(1))
            journal.add(transfer, part(2))
        journal.prune()
        assert journal.transfers(CACHE, ONE.nar_hash) == made[:0:-1]
        assert [len(journal.parts(transfer)) for transfer in made] == [0, 2, 2]


def test_a_broken_file_is_set_aside(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"no database" * 1000)
    with closing(Journal.open(file)) as journal:
        journal.add(ONE, part(1))
        assert listed(journal.parts(ONE)) == [part(1)]
    assert file.with_name(file.name + ".broken").exists()


def test_many_processes_write_at_once(file: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(file, start)) for start in (0, 100, 200)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    with closing(Journal.open(file)) as journal:
        assert [one.number for one in journal.parts(ONE)] == [*range(50), *range(100, 150), *range(200, 250)]


def _write(file: Path, start: int) -> None:
    with closing(Journal.open(file)) as journal:
        for number in range(start, start + 50):
            journal.add(ONE, replace(part(1), number=number))


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert journal_file({"HOME": str(tmp_path)}) == tmp_path / ".local/state/cachesrv/transfers-1.sqlite"
    assert journal_file({"CACHESRV_PUSHED": "/a/b/c"}) == tmp_path.joinpath("/a/b/transfers-1.sqlite")


def test_a_frame_has_arrived_when_all_parts_have_in_which_it_lies() -> None:
    """By trial with frames of any sizes: each byte of those, and no frame is left out of which each byte is there."""
    chance = random.Random(1)
    for _ in range(100):
        size = chance.randint(1, 20)
        frames = [chance.randint(1, 30) for _ in range(chance.randint(1, 20))]
        starts = [sum(frames[:index]) for index in range(len(frames) + 1)]
        end = starts[-1] + chance.randint(1, 15)
        numbers = [number for number in range(1, -(-end // size) + 1) if chance.random() < 0.7]
        there = [_part_of(number, size, end, starts, frames) for number in numbers]
        arrived = Arrived.of(there, size)

        expected = {
            index: FrameAt(starts[index], frame)
            for index, frame in enumerate(frames)
            if all(at // size + 1 in numbers for at in range(starts[index], starts[index] + frame))
        }
        assert arrived.frames == expected
        assert arrived.parts == set(numbers)


def _part_of(number: int, size: int, end: int, starts: list[int], frames: list[int]) -> ArrivedPart:
    first, last = (number - 1) * size, min(number * size, end)
    inside = [index for index in range(len(frames)) if first <= starts[index] < last]
    return ArrivedPart(
        number,
        last - first,
        b"",
        "",
        inside[0] if inside else len(frames),
        starts[inside[0]] if inside else 0,
        [frames[index] for index in inside],
    )
