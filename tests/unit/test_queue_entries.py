"""What a queue remembers."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import StoreError, StoreFull
from cachesrv.push.queue.entries import LONGEST_DELAY, OUTPUTS, PATH, TROUBLE, Counts, Entries, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def entries(tmp_path: Path) -> Iterator[Entries]:
    with closing(Entries.open(str(tmp_path))) as opened:
        yield opened


def those_due(entries: Entries, *, again: bool = False, now: float = 0, most: int = 100) -> list[str]:
    return [entry.path for entry in entries.due(PATH, most, again=again, now=now)]


def test_the_oldest_comes_first(entries: Entries) -> None:
    entries.add([Entry("/c", queued=3), Entry("/a", queued=1), Entry("/b", queued=2)])

    assert those_due(entries) == ["/a", "/b", "/c"]
    assert those_due(entries, most=2) == ["/a", "/b"]


def test_what_is_queued_twice_keeps_its_age(entries: Entries) -> None:
    entries.add([Entry("/a", queued=1), Entry("/b", queued=2)])
    entries.add([Entry("/a", queued=3), Entry("/c", queued=3)])

    assert those_due(entries) == ["/a", "/b", "/c"]


def test_a_derivation_and_its_outputs_are_two_things(entries: Entries) -> None:
    entries.add([Entry("/x.drv", PATH, queued=1), Entry("/x.drv", OUTPUTS, queued=1)])
    [derivation] = entries.due(OUTPUTS, 10, again=False, now=0)
    entries.replace({derivation: [Entry("/x", PATH, "/x.drv", 1), Entry("/x-dev", PATH, "/x.drv", 1)]})

    assert entries.due(OUTPUTS, 10, again=False, now=0) == []
    assert those_due(entries) == ["/x", "/x-dev", "/x.drv"]
    assert entries.due(PATH, 1, again=False, now=0)[0].deriver == "/x.drv"


def test_failed_ones_come_back_when_it_is_time(entries: Entries) -> None:
    entries.add([Entry("/a", queued=1), Entry("/b", queued=2)])
    entries.failed({Entry("/a"): ("why", 100.0)})

    assert those_due(entries) == ["/b"]
    assert those_due(entries, again=True, now=99) == []
    assert those_due(entries, again=True, now=100) == ["/a"]
    assert entries.those_failed() == [Entry("/a", queued=1, attempts=1, next_try=100, reason="why")]
    assert entries.counts() == Counts(waiting=1, failed=1, oldest=1, next_try=100)


def test_a_clock_that_was_wrong_keeps_nothing_from_being_tried_again(entries: Entries) -> None:
    entries.add([Entry("/a", queued=1), Entry("/b", queued=2)])
    now = time.time()
    entries.failed({Entry("/a"): ("why", now + 1e9), Entry("/b"): ("why", now + LONGEST_DELAY)})

    assert those_due(entries, again=True, now=now - LONGEST_DELAY) == ["/a"]


def test_a_reason_has_an_end(entries: Entries) -> None:
    entries.add([Entry("/a", queued=1)])
    entries.failed({Entry("/a"): ("why " * 10000, 100.0)})

    [entry] = entries.those_failed()
    assert len(entry.reason or "") == 1000


def test_failed_ones_can_be_had_back_before(entries: Entries) -> None:
    entries.add([Entry(path, queued=1) for path in ("/a", "/b", "/c")])
    entries.failed({Entry(path): ("why", 100.0) for path in ("/a", "/b")})
    entries.note(TROUBLE, "{}")

    assert entries.retry(["/a", "/c", "/nowhere"]) == 1
    assert those_due(entries, again=True) == ["/a"]
    assert entries.fact(TROUBLE) is None
    assert entries.retry() == 2
    assert those_due(entries, again=True) == ["/a", "/b"]


def test_what_is_claimed_is_in_flight_until_the_next_claim(entries: Entries) -> None:
    entries.add([Entry("/a", queued=1), Entry("/b", queued=2)])
    entries.claim([Entry("/a")])
    assert entries.counts() == Counts(waiting=1, pushing=1, oldest=1)
    assert [entry.path for entry in entries.those_claimed()] == ["/a"]

    entries.claim([Entry("/b")])
    assert [entry.path for entry in entries.those_claimed()] == ["/b"]
    entries.claim(())
    assert entries.counts() == Counts(waiting=2, oldest=1)


def test_what_is_gone_is_forgotten_unless_it_was_queued_again(entries: Entries) -> None:
    gone, back = Entry("/a", queued=1), Entry("/b", queued=2)
    entries.add([gone, back])
    entries.claim([gone, back])
    entries.add([replace(back, queued=3)])

    assert entries.gone([gone, back]) == [gone]
    assert entries.those_claimed() == []
    assert entries.due(PATH, 10, again=False, now=0) == [back]


def test_what_is_done_is_forgotten(entries: Entries) -> None:
    entries.add([Entry("/a", queued=1)])
    entries.done([Entry("/a")])

    assert entries.counts() == Counts()


def test_facts_and_entries_are_noted_in_one_moment(entries: Entries) -> None:
    entries.note("place", "1", [Entry("/a", queued=1)])
    with pytest.raises(StoreError, match="cannot be used"):
        entries.note("place", "2", [Entry("/b", queued=2), Entry([])])  # type: ignore[arg-type] # it breaks off

    assert entries.fact("place") == "1"
    assert those_due(entries) == ["/a"]
    entries.note("place", None)
    assert entries.fact("place") is None


def test_it_survives_a_process_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from cachesrv.push.queue.entries import *\n"
        "entries = Entries.open(sys.argv[1])\n"
        "entries.add([Entry('/a', queued=1), Entry('/b', queued=2)]); entries.claim([Entry('/a')])\n"
        "entries._file._db.execute('BEGIN IMMEDIATE'); entries._file._db.execute('DELETE FROM entries')\n"
        "os.kill(os.getpid(), 9)"
    )
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env={"PYTHONPATH": root})

    with closing(Entries.open(str(tmp_path))) as entries:
        assert entries.counts() == Counts(waiting=1, pushing=1, oldest=1)


def test_those_who_make_it_at_the_same_time_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody is about to set the mode of the file, which SQLite waits for nobody to do."""
    with closing(sqlite3.connect(tmp_path / "queue.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        waited: list[float] = []

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            other.execute("COMMIT")

        monkeypatch.setattr(time, "sleep", sleep)
        with closing(Entries.open(str(tmp_path))) as entries:
            entries.add([Entry("/a", queued=1)])
    assert len(waited) == 1


def test_only_its_owner_can_read_it(tmp_path: Path, entries: Entries) -> None:
    entries.add([Entry("/a", queued=1)])

    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("queue.sqlite", "queue.sqlite-wal", "queue.sqlite-shm"), 0o600)


def test_a_queue_of_another_version_is_left_alone(tmp_path: Path) -> None:
    Entries.open(str(tmp_path)).close()
    with closing(sqlite3.connect(tmp_path / "queue.sqlite")) as db:
        db.execute("PRAGMA user_version = 2")

    with pytest.raises(StoreError, match="is of another version of cachesrv: update it"):
        Entries.open(str(tmp_path))


def test_what_is_no_queue_is_told(tmp_path: Path) -> None:
    (tmp_path / "queue.sqlite").write_text("what is this? " * 1000)

    with pytest.raises(StoreError, match=r"the queue .*/queue.sqlite cannot be used: file is not a database: move it"):
        Entries.open(str(tmp_path))
    with pytest.raises(StoreError, match="cannot be made: No such file or directory"):
        Entries.open(str(tmp_path / "nowhere"))


def test_a_damaged_queue_is_done_without_once_it_is_moved_away(tmp_path: Path, entries: Entries) -> None:
    entries.add([Entry("/a", queued=1)])
    for suffix in ("", "-wal", "-shm"):
        (tmp_path / f"queue.sqlite{suffix}").write_text("what is this? " * 10_000)
    with pytest.raises(StoreError, match=r"cannot be used: .*: move it away"):
        entries.add([Entry("/b", queued=2)])

    (tmp_path / "queue.sqlite").rename(tmp_path / "away")
    entries.add([Entry("/c", queued=3)])
    assert those_due(entries) == ["/c"]
    with closing(Entries.open(str(tmp_path))) as again:
        assert those_due(again) == ["/c"]


def test_no_room_is_told_and_changes_nothing(entries: Entries) -> None:
    entries.add([Entry("/a", queued=1)])
    [pages] = entries._file._db.execute("PRAGMA page_count").fetchone()
    entries._file._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreFull, match="there is no room for the queue"):
        entries.add(Entry(f"/{number}" * 100, queued=1) for number in range(1000))

    entries._file._db.execute("PRAGMA max_page_count = 1000000")
    assert those_due(entries) == ["/a"]
    entries.add([Entry("/b", queued=2)])
    assert those_due(entries) == ["/a", "/b"]
