"""What a quick look into the catalog tells, and when it tells nothing."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from cachesrv.catalog.glance import Glance

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE paths (cache, hash_part, PRIMARY KEY (cache, hash_part))")
        yield connection


@pytest.fixture
def looking(database: sqlite3.Connection, tmp_path: Path) -> Iterator[Glance]:
    with closing(Glance(str(tmp_path / "catalog.sqlite"))) as looking:
        yield looking


def test_it_sees_what_is_committed(database: sqlite3.Connection, looking: Glance) -> None:
    assert looking.lacks("main", "one")
    database.execute("BEGIN IMMEDIATE")
    database.execute("INSERT INTO paths VALUES ('main', 'one')")
    assert looking.lacks("main", "one")
    database.execute("COMMIT")
    assert not looking.lacks("main", "one")
    assert looking.lacks("main", "two")
    assert looking.lacks("other", "one")
    database.execute("DELETE FROM paths")
    assert looking.lacks("main", "one")


def test_it_waits_for_nobody(database: sqlite3.Connection, tmp_path: Path) -> None:
    database.execute("PRAGMA journal_mode = DELETE")
    with closing(Glance(str(tmp_path / "catalog.sqlite"))) as looking:
        assert looking.lacks("main", "one")
        database.execute("BEGIN EXCLUSIVE")
        assert not looking.lacks("main", "one")
        database.execute("COMMIT")
        assert looking.lacks("main", "one")


def test_what_cannot_be_read_tells_nothing(database: sqlite3.Connection, looking: Glance) -> None:
    database.execute("DROP TABLE paths")
    assert not looking.lacks("main", "one")


def test_a_slow_disk_is_let_alone_for_a_while(database: sqlite3.Connection, tmp_path: Path) -> None:
    times = iter([1000.0, 1000.001, 1000.002, 1000.1, 1000.2, 1000.4, 1000.401])
    with closing(Glance(str(tmp_path / "catalog.sqlite"), clock=lambda: next(times))) as looking:
        assert looking.lacks("main", "one")
        assert looking.lacks("main", "one")  # takes a tenth of a second
        assert not looking.lacks("main", "one")
        assert looking.lacks("main", "one")
