"""The store's database, made here as Nix makes it; what the real one looks like is shown in the system tests."""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cachesrv.errors import BadInput, NotFound, StoreError, StoreUnavailable
from cachesrv.nix.hashes import Hash
from cachesrv.nix.path_info import PathInfo, in_reference_order
from cachesrv.nix.realisation import OutputId, Realisation, TracedOutput
from cachesrv.nix.signing import Signature
from cachesrv.nix.store_path import StorePath
from cachesrv.push import store_db
from cachesrv.push.store_db import StoreDatabase
from cachesrv.push.store_location import locate

SCHEMA = """
CREATE TABLE ValidPaths (
    id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, path TEXT UNIQUE NOT NULL, hash TEXT NOT NULL,
    registrationTime INTEGER NOT NULL, deriver TEXT, narSize INTEGER, ultimate INTEGER, sigs TEXT, ca TEXT
);
CREATE TABLE Refs (referrer INTEGER NOT NULL, reference INTEGER NOT NULL, PRIMARY KEY (referrer, reference));
CREATE INDEX IndexReference ON Refs(reference);
"""
HASH_REALISATIONS = """
CREATE TABLE Realisations (
    id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, drvPath TEXT NOT NULL, outputName TEXT NOT NULL,
    outputPath INTEGER NOT NULL, signatures TEXT
);
CREATE TABLE RealisationsRefs (referrer INTEGER NOT NULL, realisationReference INTEGER);
"""
BUILD_TRACE = """
CREATE TABLE BuildTraceV3 (
    id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, drvPath TEXT NOT NULL, outputName TEXT NOT NULL,
    outputPath TEXT NOT NULL, signatures TEXT
);
"""
NAR_HASH = Hash.of("sha256", b"")
SIGNATURE = Signature("key-1", bytes(64))


class Store:
    """A chroot store of which there is only the database."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "nix/var/nix/db"
        self.file = self.folder / "db.sqlite"
        self.folder.mkdir(parents=True)
        (self.folder / "schema").write_text("10")
        self.execute(SCHEMA)
        self.database = StoreDatabase(locate(str(root), {}))

    def execute(self, script: str) -> None:
        with closing(sqlite3.connect(self.file)) as db:
            db.executescript(script)

    def add(self, infos: Iterable[PathInfo]) -> None:
        infos = list(infos)
        ids = {info.store_path: number for number, info in enumerate(infos, 1)}
        with closing(sqlite3.connect(self.file)) as db, db:
            for info in infos:
                row = (
                    ids[info.store_path],
                    info.store_path.full("/nix/store"),
                    info.nar_hash.base16,
                    info.registration_time,
                    info.deriver and info.deriver.full("/nix/store"),
                    info.nar_size,
                    int(info.ultimate) or None,
                    " ".join(info.signatures) or None,
                    info.ca,
                )
                db.execute("INSERT INTO ValidPaths VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                references = [(ids[info.store_path], ids[path]) for path in info.references]
                db.executemany("INSERT INTO Refs VALUES (?, ?)", references)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "root")


def path(number: int) -> StorePath:
    return StorePath(f"{number:032d}", "x")


def info(number: int, *references: int) -> PathInfo:
    return PathInfo(path(number), NAR_HASH, 120, tuple(path(other) for other in sorted(references)))


FULL = PathInfo(
    store_path=path(2),
    nar_hash=Hash.of("sha256", b"full"),
    nar_size=2**40,
    references=(path(1), path(2)),
    deriver=StorePath("d" * 32, "x.drv"),
    signatures=("a:1", "b:2"),
    ca="text:sha256:0000000000000000000000000000000000000000000000000000",
    registration_time=1_700_000_000,
    ultimate=True,
)


def test_all_that_the_database_knows_of_a_path(store: Store) -> None:
    store.add([info(1), FULL])
    store.database.check()
    assert store.database.path_info(path(2)) == FULL
    assert store.database.path_info(path(1)) == info(1)


def test_what_old_stores_never_noted(store: Store) -> None:
    store.execute(
        "INSERT INTO ValidPaths (path, hash, registrationTime, sigs, ca)"
        f" VALUES ('/nix/store/{path(1)}', '{NAR_HASH.base16}', 0, '', '')"
    )
    assert store.database.path_info(path(1)) == PathInfo(path(1), NAR_HASH, 0)


def test_a_closure_is_complete_in_reference_order_and_nothing_more(store: Store) -> None:
    infos = [info(9), *(info(number, *range(max(0, number - 3), number + number % 2)) for number in range(9))]
    infos.sort(key=lambda entry: entry.store_path)
    store.add(infos)
    assert store.database.closure([path(8), path(2)]) == in_reference_order(infos[:9])
    assert store.database.closure([path(0)]) == [infos[0]]
    assert store.database.closure([]) == []


def test_thousands_of_paths_may_be_asked_for(store: Store) -> None:
    infos = [info(number) for number in range(3000)]
    store.add(infos)
    assert store.database.closure(entry.store_path for entry in infos) == infos


def test_a_path_that_is_not_valid_is_named(store: Store) -> None:
    store.add([info(1)])
    for ask in (lambda: store.database.path_info(path(7)), lambda: store.database.closure([path(1), path(7)])):
        with pytest.raises(NotFound, match=rf"^/nix/store/{path(7)} is not valid: {store.file} does not know it$"):
            ask()


def test_what_came_out_of_derivations(store: Store) -> None:
    infos = [replace(info(number), deriver=StorePath("d" * 32, f"{number % 2}.drv")) for number in range(4)]
    store.add([*infos, info(9)])
    zero, one, none = (StorePath("d" * 32, f"{name}.drv") for name in ("0", "1", "none"))

    assert store.database.outputs([zero, one, none]) == {zero: [path(0), path(2)], one: [path(1), path(3)], none: []}
    assert store.database.outputs([]) == {}


def test_paths_in_the_order_in_which_they_became_valid(store: Store) -> None:
    assert store.database.newest() == 0
    store.add(info(number) for number in (3, 1, 2))
    assert store.database.newest() == 3
    assert store.database.registered_after(1, 10) == [(2, f"/nix/store/{path(1)}"), (3, f"/nix/store/{path(2)}")]
    assert store.database.registered_after(0, 1) == [(1, f"/nix/store/{path(3)}")]

    store.execute("DELETE FROM ValidPaths")
    assert store.database.newest() == 3


def test_what_a_running_nix_has_just_committed_is_seen(store: Store) -> None:
    """The newest rows are in the write-ahead log alone while a process has the database open."""
    store.add([info(1)])
    with closing(sqlite3.connect(store.file)) as nix:
        nix.execute("PRAGMA journal_mode = wal")
        nix.execute("PRAGMA wal_autocheckpoint = 0")
        nix.execute("UPDATE ValidPaths SET narSize = 999")
        nix.commit()
        assert store.file.with_name("db.sqlite-wal").stat().st_size
        assert store.database.path_info(path(1)).nar_size == 999
        nix.execute("UPDATE ValidPaths SET narSize = 1000")  # not committed
        assert store.database.path_info(path(1)).nar_size == 999
        nix.rollback()


def test_a_writer_without_write_ahead_log_is_waited_for(store: Store) -> None:
    store.add([info(1)])
    with closing(sqlite3.connect(store.file, isolation_level=None, check_same_thread=False)) as nix:
        nix.execute("BEGIN EXCLUSIVE")
        nix.execute("UPDATE ValidPaths SET narSize = 999")
        done = threading.Timer(0.2, lambda: nix.execute("COMMIT"))
        done.start()
        assert store.database.path_info(path(1)).nar_size == 999
        done.join()


def test_but_not_forever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_db, "LOCK_PATIENCE", 0.1)
    with closing(sqlite3.connect(store.file, isolation_level=None)) as nix:
        nix.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreUnavailable, match=f"{store.file} cannot be read: database is locked"):
            store.database.path_info(path(1))


def test_no_store_at_all(tmp_path: Path) -> None:
    database = StoreDatabase(locate(f"{tmp_path}/none", {}))
    assert not database.readable
    with pytest.raises(StoreUnavailable, match=f"there is no Nix store with a database at {tmp_path}/none/nix/var/nix"):
        database.check()


def test_a_store_without_the_database_itself(store: Store) -> None:
    store.file.unlink()
    with pytest.raises(StoreUnavailable, match=f"{store.file} cannot be read: unable to open"):
        store.database.check()
    assert not store.file.exists()


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ("11", "has schema 11, newer than the 10 that we read: update cachesrv"),
        ("9\n", "has schema 9, older than the 10 that we read: run nix-store --verify once"),
        ("", "stands beside a file schema that is no number"),
        ("ten", "stands beside a file schema that is no number"),
    ],
)
def test_another_schema_is_refused(store: Store, schema: str, expected: str) -> None:
    (store.folder / "schema").write_text(schema)
    with pytest.raises(StoreError, match=f"{store.file} {expected}"):
        store.database.check()


def test_a_file_that_is_no_database(store: Store) -> None:
    store.file.write_bytes(b"something else " * 1000)
    with pytest.raises(StoreError, match=f"{store.file} cannot be read: file is not a database") as caught:
        store.database.check()
    assert not isinstance(caught.value, StoreUnavailable)


def test_a_database_of_something_else(store: Store) -> None:
    store.execute("DROP TABLE Refs")
    with pytest.raises(StoreError, match="no such table: Refs"):
        store.database.check()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE ValidPaths SET hash = 'sha256:00'",
        "UPDATE ValidPaths SET hash = x'0041'",
        "UPDATE ValidPaths SET hash = 7",
        "UPDATE ValidPaths SET deriver = '/elsewhere/x.drv'",
        "UPDATE ValidPaths SET path = '/nix/store/short' WHERE id = 1",
        "UPDATE ValidPaths SET path = x'00' WHERE id = 1",
    ],
)
def test_rows_that_make_no_sense_are_bad_input(store: Store, change: str) -> None:
    store.add([info(1), info(2, 1)])
    store.execute(change)
    with pytest.raises(BadInput, match=f"{store.file} holds what no Nix writes: "):
        store.database.closure([path(2)])


def test_text_that_cannot_be_decoded_is_an_error_of_the_store(store: Store) -> None:
    store.add([info(1)])
    store.execute("UPDATE ValidPaths SET deriver = CAST(x'ff' AS TEXT)")
    with pytest.raises(StoreError, match=f"{store.file} cannot be read: Could not decode to UTF-8"):
        store.database.closure([path(1)])


def test_a_cycle_is_bad_input(store: Store) -> None:
    store.add([info(1), info(2, 1)])
    store.execute("INSERT INTO Refs VALUES (1, 2)")
    with pytest.raises(BadInput, match="cycle of references"):
        store.database.closure([path(2)])


def test_nothing_is_written(store: Store) -> None:
    store.add([info(1)])
    before = {file.name: file.read_bytes() for file in store.folder.iterdir()}
    store.database.check()
    store.database.closure([path(1)])
    assert {file.name: file.read_bytes() for file in store.folder.iterdir()} == before


# Realisations


def test_stores_without_content_addressed_derivations_have_no_realisations(store: Store) -> None:
    store.add([info(1)])
    assert store.database.realisations([path(1)]) == {}


def test_realisations_by_hash_of_the_derivation(store: Store) -> None:
    store.add([info(1), info(2), info(3)])
    drv = Hash.of("sha256", b"drv").base16
    store.execute(HASH_REALISATIONS)
    store.execute(
        f"""
        INSERT INTO Realisations VALUES (7, '{drv}', 'out', 1, NULL), (8, '{drv}', 'dev', 2, '{SIGNATURE}');
        INSERT INTO Realisations VALUES (9, '{drv}', 'doc', 3, '');
        INSERT INTO RealisationsRefs VALUES (8, 7), (8, 9);
        """
    )
    out = Realisation(path(1), ())
    dependencies = ((OutputId(drv, "doc"), path(3)), (OutputId(drv, "out"), path(1)))
    dev = Realisation(path(2), (SIGNATURE,), dependencies)
    assert store.database.realisations([path(1)]) == {OutputId(drv, "out"): out}
    assert store.database.realisations([path(2), path(1)]) == {OutputId(drv, "out"): out, OutputId(drv, "dev"): dev}


def test_realisations_by_path_of_the_derivation(store: Store) -> None:
    drv = StorePath("d" * 32, "x.drv")
    store.add([info(1), info(2)])
    store.execute(BUILD_TRACE)
    store.execute(
        f"""
        INSERT INTO BuildTraceV3 VALUES (1, '{drv}', 'out', '/nix/store/{path(1)}', '{SIGNATURE} {SIGNATURE}');
        INSERT INTO BuildTraceV3 VALUES (2, '{drv}', 'dev', '/nix/store/{path(2)}', '');
        """
    )
    out = Realisation(path(1), (SIGNATURE, SIGNATURE))
    assert store.database.realisations([path(1)]) == {TracedOutput(drv, "out"): out}


def test_both_kinds_of_realisations_may_stand_side_by_side(store: Store) -> None:
    store.add([info(1)])
    drv = Hash.of("sha256", b"drv").base16
    store.execute(HASH_REALISATIONS + BUILD_TRACE)
    store.execute(f"INSERT INTO Realisations VALUES (1, '{drv}', 'out', 1, NULL)")
    store.execute(f"INSERT INTO BuildTraceV3 VALUES (1, '{'d' * 32}-x.drv', 'out', '/nix/store/{path(1)}', NULL)")
    assert len(store.database.realisations([path(1)])) == 2


# Users who may only read


@pytest.fixture
def shared() -> Iterator[Store]:
    """A store in a folder that everybody may enter."""
    root = Path(tempfile.mkdtemp(prefix="store-"))
    root.chmod(0o755)
    store = Store(root)
    yield store
    store.folder.chmod(0o700)
    shutil.rmtree(root)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, if we have them."""
    root = os.getuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


@contextmanager
def another_process(store: Store, statement: str) -> Iterator[None]:
    """Like a running Nix that has done this and keeps the database open; locks and logs differ between processes."""
    program = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("PRAGMA journal_mode = wal")
db.execute(sys.argv[2])
db.commit()
print(flush=True)
sys.stdin.read()
db.close()
"""
    command = [sys.executable, "-c", program, str(store.file), statement]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"\n"
        yield
        process.stdin.close()


def test_a_database_at_rest_in_a_read_only_folder(shared: Store) -> None:
    shared.execute("PRAGMA journal_mode = wal")
    shared.add([info(1)])
    shared.folder.chmod(0o555)
    with as_nobody():
        with pytest.raises(sqlite3.OperationalError), closing(sqlite3.connect(shared.file)) as plain:
            plain.execute("SELECT 1 FROM ValidPaths")
        shared.database.check()
        assert shared.database.path_info(path(1)) == info(1)


def test_a_database_in_use_in_a_read_only_folder(shared: Store) -> None:
    shared.add([info(1)])
    with another_process(shared, "UPDATE ValidPaths SET narSize = 999"):
        shared.folder.chmod(0o555)
        with as_nobody():
            assert shared.database.path_info(path(1)).nar_size == 999
        shared.file.with_name("db.sqlite-shm").chmod(0o600)
        with as_nobody(), pytest.raises(StoreUnavailable, match="cannot be read"):
            shared.database.path_info(path(1))  # the file alone would tell the old size


def test_a_database_that_this_user_may_not_read(shared: Store) -> None:
    shared.file.chmod(0)
    with as_nobody():
        assert not shared.database.readable
        with pytest.raises(StoreUnavailable, match=f"{shared.file} cannot be read: unable to open"):
            shared.database.path_info(path(1))
    shared.folder.chmod(0)
    with as_nobody():
        with pytest.raises(StoreUnavailable, match=f"{shared.file} cannot be read: Permission denied"):
            shared.database.check()
        with pytest.raises(StoreUnavailable, match=f"{shared.file} cannot be read: unable to open"):
            shared.database.outputs([path(1)])
