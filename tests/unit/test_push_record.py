"""The record of what was pushed: private, bounded, shared by processes, and never worth a failure."""

from __future__ import annotations

import multiprocessing
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import StoreError
from cachesrv.nix.hashes import Hash
from cachesrv.nix.listing import Directory, Regular
from cachesrv.push import record as record_module
from cachesrv.push.inspection import Seen, SeenFile
from cachesrv.push.pushed import open_pushed
from cachesrv.push.record import Limits, PushedPath, Reads, Record, SeenNar, record_file

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHE = "https://cache.example.org/main"
LISTING = Directory({"bin": Directory({"x": Regular(3, executable=True, nar_offset=100)})})
FILES = (
    SeenFile("nix-support/folder", "directory"),
    SeenFile("nix-support/hydra-build-products", "regular", 4, False, sha256(b"file").hexdigest(), b"file"),
    SeenFile("nix-support/large", "regular", 1 << 40, True, "1" * 64),
    SeenFile("nix-support/link", "symlink", target="../bin/x"),
)


def nar(name: str, size: int = 10) -> SeenNar:
    content = SeenFile("nix-support/content", "regular", size, False, "2" * 64, bytes(size))
    return SeenNar.of(Hash.of("sha256", name.encode()), Seen(LISTING, (content,)))


def pushed(name: str, cache: str = CACHE, at: int | None = None) -> PushedPath:
    when = int(time.time()) if at is None else at
    return PushedPath(f"/nix/store/{name}", cache, Hash.of("sha256", name.encode()).nix32, 100, when)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "pushed.sqlite"


@pytest.fixture
def record(file: Path) -> Iterator[Record]:
    opened = Record.open(file)
    yield opened
    opened.close()


def test_what_was_written_is_found(record: Record) -> None:
    seen = SeenNar.of(Hash.of("sha256", b"a"), Seen(LISTING, FILES))
    record.write([seen], [pushed("a", at=1), pushed("a", "https://other.example.org/main", at=2)])

    assert [push.cache for push in record.find("/nix/store/a")] == ["https://other.example.org/main", CACHE]
    assert record.find("/nix/store/b") == []
    assert record.files(seen.nar_hash) == list(FILES)
    assert record.listing(seen.nar_hash) == LISTING
    assert record.listing("sha256:none") is None
    assert len(record.paths()) == 2


def test_a_nar_without_a_listing(record: Record) -> None:
    seen = SeenNar.of(Hash.of("sha256", b"a"), Seen(None, FILES))
    record.write([seen], [pushed("a")])

    assert record.listing(seen.nar_hash) is None
    assert len(record.files(seen.nar_hash)) == len(FILES)


@pytest.mark.parametrize("altered", ["x'66696c65ff'", "'file'", "NULL"])
def test_contents_that_were_altered_are_not_given_away(record: Record, file: Path, altered: str) -> None:
    seen = SeenNar.of(Hash.of("sha256", b"a"), Seen(LISTING, FILES))
    record.write([seen], [pushed("a")])
    with closing(sqlite3.connect(file)) as db, db:
        db.execute(f"UPDATE files SET content = {altered} WHERE content IS NOT NULL")

    assert record.files(seen.nar_hash) == [replace(one, content=None) for one in FILES]


def test_it_is_for_its_owner_alone(record: Record, file: Path) -> None:
    record.write([nar("a")], [pushed("a")])

    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in file.parent.iterdir()} == {0}


def test_a_repeated_push_is_one_that_is_newer(record: Record) -> None:
    record.write([nar("a")], [pushed("a", at=1)])
    record.write([nar("a")], [pushed("a", at=5)])

    assert [push.at for push in record.find("/nix/store/a")] == [5]


def test_what_is_too_old_goes(file: Path) -> None:
    with closing(Record.open(file, Limits(age=3600))) as record:
        record.write([nar("old"), nar("new")], [pushed("old", at=1), pushed("new")])
        age(file, "old", 3601)
        record.prune()

        assert [push.path for push in record.paths()] == ["/nix/store/new"]
        assert record.files(nar("old").nar_hash) == []
        assert record.files(nar("new").nar_hash)


def test_what_was_seen_and_not_published_goes_with_what_is_too_much(file: Path) -> None:
    with closing(Record.open(file, Limits(paths=1))) as record:
        record.write([nar("a"), nar("b"), nar("c")], [pushed("c")])
        age(file, "a", record_module.UNUSED_SECONDS + 1)
        record.prune()
        assert record.files(nar("a").nar_hash)

        record.write([], [pushed("d", at=int(time.time()) + 1)])
        record.prune()
        assert [push.path[-1] for push in record.paths()] == ["d"]
        assert record.files(nar("a").nar_hash) == []
        assert record.files(nar("b").nar_hash)


def test_what_is_hardly_too_much_stays(file: Path) -> None:
    with closing(Record.open(file, Limits(paths=40))) as record:
        names = [f"p{number:02}" for number in range(43)]
        record.write([], [pushed(name, at=int(time.time()) + n) for n, name in enumerate(names[:42])])
        record.prune()
        assert len(record.paths()) == 42

        record.write([], [pushed(names[42], at=int(time.time()) + 42)])
        record.prune()
        assert {push.path for push in record.paths()} == {f"/nix/store/{name}" for name in names[3:]}


def test_what_is_too_much_goes_the_oldest_first(file: Path) -> None:
    with closing(Record.open(file, Limits(size=25_000))) as record:
        for number, name in enumerate("abcd"):
            record.write([nar(name, 10_000)], [pushed(name)])
            age(file, name, 100 - number)
        record.prune()

        assert [bool(record.files(nar(name).nar_hash)) for name in "abcd"] == [False, False, True, True]
        record.prune()
        assert record.files(nar("c").nar_hash)


def test_too_many_paths(file: Path) -> None:
    with closing(Record.open(file, Limits(paths=2))) as record:
        record.write(
            [nar(name) for name in "abc"], [pushed(name, at=int(time.time()) + n) for n, name in enumerate("abc")]
        )
        record.prune()

        assert [push.path[-1] for push in record.paths()] == ["c", "b"]


def age(file: Path, name: str, seconds: int) -> None:
    """Let a NAR have been seen so much earlier."""
    with closing(sqlite3.connect(file)) as db:
        db.execute("UPDATE nars SET at = at - ? WHERE nar_hash = ?", (seconds, Hash.of("sha256", name.encode()).nix32))
        db.commit()


def test_reads_are_counted(record: Record) -> None:
    record.count_read("store", 10)
    record.count_read("store", 5)
    record.count_read("record", 1)

    assert record.reads() == {"store": Reads(2, 15), "record": Reads(1, 1)}


@pytest.mark.parametrize("damage", ["no database", "torn pages"])
def test_a_broken_file_is_set_aside(file: Path, damage: str) -> None:
    with closing(Record.open(file)) as record:
        record.write([nar(str(number), 10_000) for number in range(50)], [pushed(str(number)) for number in range(50)])
    data = file.read_bytes()
    broken = b"nonsense" * 1000 if damage == "no database" else data[:4096] + b"\xff" * (len(data) - 4096)
    file.write_bytes(broken)

    with closing(Record.open(file)) as record:
        assert record.paths() == []
        record.write([nar("a")], [pushed("a")])
        assert record.find("/nix/store/a")

    assert Path(f"{file}.broken").read_bytes() == broken


def test_a_file_that_turns_out_broken_when_it_is_written_is_set_aside(record: Record, file: Path) -> None:
    record.write([nar(str(number), 10_000) for number in range(50)], [pushed("a")])
    with closing(sqlite3.connect(file)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.seek(4096)
        handle.write(b"\xff" * (size - 4096))

    record.close()
    again = Record.open(file)
    again.write([nar("b")], [pushed("b")])

    assert [push.path for push in again.paths()] == ["/nix/store/b"]
    assert Path(f"{file}.broken").exists()
    again.close()


def test_where_none_can_be_the_error_names_it(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"a file")

    with pytest.raises(StoreError, match=f"{tmp_path}/state/pushed.sqlite"):
        Record.open(tmp_path / "state" / "pushed.sqlite")


def test_none_is_made_to_look_into(file: Path) -> None:
    assert Record.existing(file) is None
    assert not file.parent.exists()


def test_many_processes_write_at_once(file: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    writers = [context.Process(target=write_some, args=(file, name, start)) for name in "abcd"]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(60)

    assert [writer.exitcode for writer in writers] == [0] * 4
    with closing(Record.open(file)) as record:
        assert len(record.paths()) == 4 * 20


def write_some(file: Path, name: str, start: multiprocessing.synchronize.Event) -> None:
    """In another process."""
    start.wait(60)
    for number in range(20):
        with closing(Record.open(file)) as record:
            record.write([nar(f"{name}{number}")], [pushed(f"{name}{number}")])
            record.prune()


@pytest.mark.parametrize(
    ("environ", "file"),
    [
        ({}, "/home/me/.local/state/cachesrv/pushed-1.sqlite"),
        ({"XDG_STATE_HOME": "/state"}, "/state/cachesrv/pushed-1.sqlite"),
        ({"XDG_STATE_HOME": "relative"}, "/home/me/.local/state/cachesrv/pushed-1.sqlite"),
        ({"CACHESRV_PUSHED": "/else/where"}, "/else/where"),
    ],
)
def test_where_it_is(environ: dict[str, str], file: str) -> None:
    assert record_file({"HOME": "/home/me", **environ}) == Path(file)


def test_users_without_a_home_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(path: Path) -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "expanduser", nowhere)
    assert record_file({}) is None
    with open_pushed({}) as pushed:
        assert pushed.paths() == []
