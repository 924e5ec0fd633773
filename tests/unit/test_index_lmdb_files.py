"""What is special to the index in LMDB: its files, its limits, other processes."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import lmdb
import pytest

from cachesrv.errors import StoreError, StoreFull
from cachesrv.index.base import Absent, IndexEntry, Present
from cachesrv.index.lmdb import LmdbIndex

if TYPE_CHECKING:
    from collections.abc import Callable

LATER = int(time.time()) + 3600
ANSWER = Present(b"Content-Length: 9\r\n\r\n", b"StorePath")
ROOT = Path(__file__).parents[2]

WRITER = """
import sys, time
from cachesrv.index.base import IndexEntry, Present
from cachesrv.index.lmdb import LmdbIndex
index = LmdbIndex(sys.argv[1], negative_limit=100)
"""


def program(text: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER + text, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def run(text: str, path: Path) -> str:
    with program(text, path) as other:
        output, _ = other.communicate(timeout=30)
    assert other.returncode == 0
    return output


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "index"


def filled(path: Path) -> None:
    index = LmdbIndex(str(path))
    for batch in range(10):
        index.put(IndexEntry("main", f"{batch}-{n}", ANSWER) for n in range(100))
    index.close()


def begun_anew(path: Path) -> bool:
    with contextlib.closing(LmdbIndex(str(path))) as index:
        if not index.fresh:
            return False
        assert index.count() == (0, 0)
        index.put([IndexEntry("main", "new", ANSWER)])
    with contextlib.closing(LmdbIndex(str(path))) as index:
        assert not index.fresh
        assert index.get("main", "new") == ANSWER
    return True


def test_it_is_kept_from_one_opening_to_the_next(path: Path) -> None:
    with contextlib.closing(LmdbIndex(str(path))) as index:
        assert index.fresh
        index.put([IndexEntry("main", "a", ANSWER)])
        index.put_absent([("main", "b")], LATER)
    with contextlib.closing(LmdbIndex(str(path))) as index:
        assert not index.fresh
        assert index.get("main", "a") == ANSWER
        assert index.get("main", "b") == Absent(LATER)


def test_its_files_are_for_their_owner_only(path: Path) -> None:
    filled(path)
    assert path.stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"this is no database" * 1000,
        lambda data: bytes(len(data)),
        lambda data: data[:100],
        lambda data: data[:4096],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-4096],
        # The version of LMDB's own format, in both meta pages.
        lambda data: data[:20] + b"\x63" + data[21 : 4096 + 20] + b"\x63" + data[4096 + 21 :],
        lambda data: data[:8192] + bytes(len(data) - 8192),
    ],
    ids=["foreign", "zeros", "stub", "one page", "half", "last page", "version of LMDB", "emptied pages"],
)
def test_a_damaged_file_is_begun_anew(path: Path, damage: Callable[[bytes], bytes]) -> None:
    filled(path)
    assert not begun_anew(path)
    file = path / "data.mdb"
    file.write_bytes(damage(file.read_bytes()))
    assert begun_anew(path)


@pytest.mark.parametrize("stored", [b"1", b"3", None])
def test_another_format_is_begun_anew(path: Path, stored: bytes | None) -> None:
    filled(path)
    env = lmdb.open(str(path), max_dbs=3)
    about = env.open_db(b"about")
    with env.begin(about, write=True) as txn:
        assert txn.pop(b"format") == b"2"
        if stored is not None:
            txn.put(b"format", stored)
    env.close()
    assert begun_anew(path)


def test_a_database_of_somebody_else_is_begun_anew(path: Path) -> None:
    path.mkdir(parents=True)
    env = lmdb.open(str(path), max_dbs=3)
    with env.begin(write=True) as txn:
        txn.put(b"key", b"value")
    env.close()
    assert begun_anew(path)


def test_damage_that_is_met_later_leads_to_a_new_beginning(path: Path) -> None:
    filled(path)
    index = LmdbIndex(str(path))
    with (path / "data.mdb").open("r+b") as file:
        file.seek(8192)
        file.write(bytes((path / "data.mdb").stat().st_size - 8192))
    with pytest.raises(StoreError, match="MDB_"):
        index.get("main", "0-1")
    index.close()
    assert (path / "damaged").exists()
    assert begun_anew(path)
    assert not (path / "damaged").exists()


def test_files_in_use_by_others_are_never_thrown_away(path: Path) -> None:
    filled(path)
    with program("print('open', flush=True); sys.stdin.read()", path) as other:
        assert other.stdout
        assert other.stdout.readline() == "open\n"
        (path / "damaged").touch()
        with pytest.raises(StoreError, match="in use"):
            LmdbIndex(str(path))
        assert (path / "damaged").exists()
        other.communicate("")
    assert begun_anew(path)


@pytest.mark.parametrize("seed", [3, 6, 7, 19, 23])  # without care, the file is a page too short after these
def test_no_write_leaves_a_file_that_looks_cut_off(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with contextlib.closing(LmdbIndex(str(path))) as index:
        keys = [("main", f"{chance.getrandbits(128):032x}") for _ in range(100)]
        for _ in range(60):
            some = chance.sample(keys, chance.choice((1, 5, 20, 60)))
            match chance.choice("pphda"):
                case "p":
                    answer = Present(b"A: b\r\n\r\n", b"x" * chance.choice((300, 1000)))
                    index.put([IndexEntry(*key, answer) for key in some])
                case "h":
                    index.hold(some, 1)
                case "d":
                    index.delete(some)
                case _:
                    index.put_absent(some, 99_999_999_999)
            assert index._shared._missing() <= 0
        there = index.count()
    with contextlib.closing(LmdbIndex(str(path))) as index:
        assert not index.fresh
        assert index.count() == there


def test_a_file_that_is_short_is_made_whole_beside_others(path: Path) -> None:
    filled(path)
    with program("print('open', flush=True); sys.stdin.read()", path) as other:
        assert other.stdout
        assert other.stdout.readline() == "open\n"
        size = (path / "data.mdb").stat().st_size
        os.truncate(path / "data.mdb", size - 4096)
        LmdbIndex(str(path)).close()
        assert (path / "data.mdb").stat().st_size == size
        other.communicate("")


def test_a_second_opening_in_one_process_is_refused(path: Path) -> None:
    with contextlib.closing(LmdbIndex(str(path))) as index:
        with pytest.raises(StoreError):
            LmdbIndex(str(path))
        index.put([IndexEntry("main", "a", ANSWER)])
        assert index.get("main", "a") == ANSWER


@pytest.mark.parametrize("obstacle", ["file", "folder"])
def test_what_the_operating_system_refuses_is_told_in_words(path: Path, obstacle: str) -> None:
    if obstacle == "file":
        path.parent.mkdir()
        path.touch()
    else:
        (path / "data.mdb").mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot open the index"):
        LmdbIndex(str(path))


def test_other_processes_see_a_write_at_once(path: Path) -> None:
    with contextlib.closing(LmdbIndex(str(path))) as index:
        index.put_absent([("main", "a")], LATER)
        with program(
            "print(index.get('main', 'a'), flush=True)\nfor line in sys.stdin:\n"
            "    index.put([IndexEntry('main', line.strip(), Present(b'H: i\\r\\n\\r\\n', b'b'))])\n"
            "    print('put', flush=True)",
            path,
        ) as other:
            assert other.stdin
            assert other.stdout
            assert other.stdout.readline() == f"Absent(until={LATER})\n"
            for name in ("a", "b", "c"):
                other.stdin.write(f"{name}\n")
                other.stdin.flush()
                assert other.stdout.readline() == "put\n"
                assert index.get("main", name) == Present(b"H: i\r\n\r\n", b"b")
            other.communicate("")
        assert index.count() == (3, 0)


def test_processes_keep_the_limit_of_absences_together(path: Path) -> None:
    work = f"""
import os
for n in range(30):
    index.put_absent([("main", f"{{os.getpid()}}-{{n}}-{{m}}") for m in range(10)], {LATER})
"""
    with contextlib.closing(LmdbIndex(str(path), negative_limit=100)) as index:
        others = [program(work, path) for _ in range(2)]
        for n in range(20):
            index.put_absent([("main", f"own-{n}")], LATER + 5)
        for other in others:
            other.communicate(timeout=30)
            assert other.returncode == 0
        assert index.count() == (0, 100)
        assert len(list(index.scan("main"))) == 100
        assert all(index.get("main", f"own-{n}") for n in range(20))


ENDLESS = """
n = 0
while True:
    index.put_absent([("main", f"{n}-{m}") for m in range(5)], 2**33)
    index.put(IndexEntry("main", f"{n}-{m}", Present(b"Head: yes\\r\\n\\r\\n", b"%d" % n * 500)) for m in range(5))
    print(n, flush=True)
    n += 1
"""


@pytest.mark.parametrize("delay", [0.05, 0.11, 0.23])
def test_what_was_put_survives_kill_9(path: Path, delay: float) -> None:
    with program(ENDLESS, path) as other:
        assert other.stdout
        other.stdout.readline()
        time.sleep(delay)
        other.send_signal(signal.SIGKILL)
        done = int(other.stdout.read().split()[-1])
    with contextlib.closing(LmdbIndex(str(path))) as index:
        assert not index.fresh
        for n in range(done + 1):
            for m in range(5):
                assert index.get("main", f"{n}-{m}") == Present(b"Head: yes\r\n\r\n", b"%d" % n * 500)
        present, absent = index.count()
        kinds = [type(answer) for _, answer in index.scan("main")]
        assert (kinds.count(Present), kinds.count(Absent)) == (present, absent)
        index.put([IndexEntry("main", "after", ANSWER)])


def test_writers_do_not_wait_for_one_that_was_killed(path: Path) -> None:
    with contextlib.closing(LmdbIndex(str(path))) as index:
        with program("t = index._env.begin(write=True); print('holds', flush=True); time.sleep(60)", path) as other:
            assert other.stdout
            other.stdout.readline()
            other.kill()
        index.put([IndexEntry("main", "a", ANSWER)])
        assert index.get("main", "a") == ANSWER


def put_until_full(index: LmdbIndex, answer: Present) -> int:
    for n in range(5000):
        try:
            index.put([IndexEntry("main", f"{n}", answer)])
        except StoreFull:
            return n
    pytest.fail("it never was full")


def test_a_full_index_gives_up_absences_first_and_can_be_emptied(path: Path) -> None:
    body = Present(b"Head: yes\r\n\r\n", b"x" * 1000)
    with contextlib.closing(LmdbIndex(str(path), size_limit=2**20)) as index:
        index.put_absent([("main", f"absent-{n}") for n in range(2000)], LATER)
        full_at = put_until_full(index, body)
        assert full_at > 500
        present, absent = index.count()
        assert present == full_at
        assert absent < 64
        assert index.get("main", "0") == body
        assert index.get("main", f"{full_at}") is None
        index.put_absent([("main", "b")], LATER)
        assert index.count()[0] == full_at
        index.delete([("main", f"{n}") for n in range(100)])
        index.put([IndexEntry("main", "again", body)])
        index.clear("main")
        assert index.count() == (0, 0)


def test_one_batch_beyond_all_limits_changes_nothing(path: Path) -> None:
    with contextlib.closing(LmdbIndex(str(path), size_limit=2**20)) as index:
        index.put([IndexEntry("main", "a", ANSWER)])
        with pytest.raises(StoreFull, match="size_limit"):
            index.put(IndexEntry("main", f"{n}", Present(b"Head: yes\r\n\r\n", bytes(2**20))) for n in range(20))
        assert index.count() == (1, 0)
        assert index.get("main", "a") == ANSWER


GROW = """
for n in range(25):
    index.put([IndexEntry("main", f"{n}", Present(b"Head: yes\\r\\n\\r\\n", bytes(2**20)))])
"""


def test_one_that_another_limit_has_made_larger_is_told(path: Path) -> None:
    with contextlib.closing(LmdbIndex(str(path), size_limit=2**20)) as index:
        index.put([IndexEntry("main", "a", ANSWER)])
        run(GROW, path)
        with pytest.raises(StoreError, match="restart the one with the old size_limit"):
            index.get("main", "a")
    assert not (path / "damaged").exists()
    with contextlib.closing(LmdbIndex(str(path), size_limit=2**20)) as index:
        assert index.get("main", "a") == ANSWER


def test_a_killed_reader_does_not_fill_the_index(path: Path) -> None:
    body = Present(b"Head: yes\r\n\r\n", b"x" * 1000)
    with contextlib.closing(LmdbIndex(str(path), size_limit=2**20)) as index:
        index.put(IndexEntry("main", f"{n}", body) for n in range(500))
        with program("t = index._env.begin(); t.get(b'x'); print('reads', flush=True); time.sleep(60)", path) as other:
            assert other.stdout
            other.stdout.readline()
            other.kill()
        for _ in range(40):
            index.put(IndexEntry("main", f"{n}", body) for n in range(500))
        assert (path / "data.mdb").stat().st_size < 19 * 2**20


def test_a_killed_reader_is_forgotten_at_the_next_opening(path: Path) -> None:
    with (
        program("print('open', flush=True); sys.stdin.read()", path) as holder,
        program("t = index._env.begin(); t.get(b'x'); print('reads', flush=True); time.sleep(60)", path) as reader,
    ):
        for other in (holder, reader):
            assert other.stdout
            other.stdout.readline()
        reader.kill()
        reader.wait()
        with contextlib.closing(LmdbIndex(str(path))) as index:
            assert str(reader.pid) not in index._env.readers()
        holder.communicate("")


def test_lookups_and_scans_hold_no_pages(path: Path) -> None:
    body = Present(b"Head: yes\r\n\r\n", b"x" * 1000)
    with contextlib.closing(LmdbIndex(str(path), size_limit=2**22)) as index:
        index.put(IndexEntry("main", f"{n:04}", body) for n in range(1000))
        scan = index.scan("main")
        next(scan)
        index.get("main", "0001")
        before = (path / "data.mdb").stat().st_size
        for _ in range(10):
            index.put(IndexEntry("main", f"{n:04}", body) for n in range(1000))
        assert (path / "data.mdb").stat().st_size < before * 4
        assert sum(1 for _ in scan) == 999


@pytest.mark.parametrize(
    ("error", "free", "told"),
    [
        (errno.ENOSPC, 2**30, StoreFull),
        (errno.EDQUOT, 2**30, StoreFull),
        (errno.EIO, 0, StoreFull),
        (errno.EIO, 2**30, StoreError),
    ],
)
def test_a_full_disk_is_told_from_a_broken_one(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: int, free: int, told: type[StoreError]
) -> None:
    failure = lmdb.DiskError("mdb_txn_commit")
    failure.code = error  # type: ignore[misc]  # LMDB sets it where the system call failed

    def fail(*arguments: object, **keywords: object) -> object:
        raise failure

    monkeypatch.setattr("cachesrv.index.environment.shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with contextlib.closing(LmdbIndex(str(path))) as index:
        monkeypatch.setattr(index, "_commit", fail)
        with pytest.raises(StoreError) as caught:
            index.put([IndexEntry("main", "a", ANSWER)])
    assert caught.type is told


def test_opening_makes_its_folders_and_leaves_no_descriptor_behind(path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    filled(path)
    path.joinpath("data.mdb").write_bytes(b"x" * 9000)
    filled(path)
    assert len(list(descriptors.iterdir())) == before


def test_a_write_under_way_is_finished_before_it_is_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thread whose caller was cancelled; LMDB would have it wait for ever, and the process at its end for it."""
    index = LmdbIndex(str(path))
    writes, goes_on = threading.Event(), threading.Event()

    def complete() -> None:
        writes.set()
        goes_on.wait()

    monkeypatch.setattr(index._shared, "complete", complete)
    write = threading.Thread(target=index.put, args=([IndexEntry("main", "a" * 32, ANSWER)],), daemon=True)
    close = threading.Thread(target=index.close, daemon=True)
    write.start()
    writes.wait()
    close.start()
    close.join(0.1)
    assert close.is_alive()
    goes_on.set()
    for thread in (write, close):
        thread.join()
    with pytest.raises(StoreError):
        index.put([IndexEntry("main", "b" * 32, ANSWER)])


def test_the_whole_file_is_read_ahead_when_there_is_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    with contextlib.closing(LmdbIndex(str(path))) as index:
        index.put(IndexEntry("main", f"{n}", Present(b"Head: yes\r\n\r\n", bytes(2**20))) for n in range(20))
        size = (path / "data.mdb").stat().st_size
        assert size > 2**24
        assert sum(index.warm()) == size
        monkeypatch.setattr("cachesrv.index.environment._available_memory", lambda: 2 * size - 2)
        assert sum(index.warm()) == 0
