"""The catalog's SQLite file: who may read it, and what is said when it cannot be used."""

# ruff: noqa: ASYNC240  (nobody else waits for the event loop of a test)

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cachesrv.catalog import sqlite
from cachesrv.catalog.sql import SqlCatalog
from cachesrv.errors import ConfigError, StoreError, StoreFull, StoreUnavailable
from tests.contracts.catalog_contract import hash_part, path, scanned, token

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy import Connection

NOBODY = 65534


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


@pytest.fixture
async def catalog(file: Path) -> AsyncIterator[SqlCatalog]:
    catalog = await SqlCatalog.open(f"sqlite:///{file}")
    yield catalog
    await catalog.close()


@pytest.fixture
def folder_of_nobody() -> Iterator[Path]:
    """A folder of the user that the test runs as, who is not root: root may write everywhere."""
    folder = Path(tempfile.mkdtemp(prefix="cachesrv-catalog-"))
    user = os.geteuid()
    if user == 0:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)
    shutil.rmtree(folder)


async def fill(file: Path, paths: int = 200) -> None:
    catalog = await SqlCatalog.open(f"sqlite:///{file}")
    await catalog.publish([path(number, number + 1) for number in range(paths)])
    await catalog.close()


def pragma(connection: Connection, name: str) -> object:
    return connection.exec_driver_sql(f"PRAGMA {name}").scalar()


async def test_all_its_files_are_private(file: Path) -> None:
    before = os.umask(0)
    try:
        catalog = await SqlCatalog.open(f"sqlite:///{file}")
        await catalog.publish([path(1)])
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in file.parent.iterdir()}
        await catalog.close()
    finally:
        os.umask(before)
    assert modes == dict.fromkeys((file.name, f"{file.name}-wal", f"{file.name}-shm"), 0o600)


async def test_commits_are_synced_and_readers_run_beside_the_writer(catalog: SqlCatalog) -> None:
    for run in (catalog._database.read, catalog._database.write):
        assert await run(pragma, "journal_mode") == "wal"
        assert await run(pragma, "synchronous") == 2
        assert await run(pragma, "foreign_keys") == 1


async def test_an_empty_file_becomes_a_catalog(file: Path) -> None:
    file.touch()
    await fill(file, 1)
    assert file.stat().st_size > 0


@pytest.mark.parametrize(
    "url",
    ["", "catalog.sqlite", "sqlite://", "sqlite:///", "sqlite:///:memory:", "mysql:///x", "postgresql://u:pw@h/d"],
)
async def test_other_urls_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="sqlite:///") as refused:
        await SqlCatalog.open(url)
    assert "pw" not in str(refused.value)


@pytest.mark.parametrize("name", ["a?b=c#d", "50%", "with space", "ünï"])
async def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    await fill(tmp_path / name, 1)
    assert [each.name for each in tmp_path.iterdir()] == [name]


async def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"/none/catalog.sqlite cannot be used: No such file or directory"):
        await fill(tmp_path / "none" / "catalog.sqlite")


async def test_a_file_that_is_no_database_says_what_to_do(file: Path) -> None:
    content = b"not a database " * 1000
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"is damaged .* move .*/catalog.sqlite-wal .* `cachesrv reindex`"):
        await fill(file)
    assert file.read_bytes() == content


async def test_damage_found_later_says_what_to_do(file: Path) -> None:
    await fill(file)
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(4096)
        opened.write(b"\xa5" * (size - 4096))
    with pytest.raises(StoreError, match=r"is damaged .* `cachesrv reindex`"):
        await fill(file)


async def test_a_folder_that_cannot_be_written_is_a_store_error(folder_of_nobody: Path) -> None:
    folder_of_nobody.chmod(0o555)
    with pytest.raises(StoreError, match="cannot be used: Permission denied"):
        await fill(folder_of_nobody / "catalog.sqlite")


@pytest.mark.parametrize(("file_mode", "folder_mode"), [(0o444, 0o755), (0o444, 0o555), (0o644, 0o555), (0o000, 0o755)])
async def test_a_file_that_cannot_be_written_is_found_when_it_is_opened(
    folder_of_nobody: Path, file_mode: int, folder_mode: int
) -> None:
    file = folder_of_nobody / "catalog.sqlite"
    await fill(file)
    file.chmod(file_mode)
    folder_of_nobody.chmod(folder_mode)
    with pytest.raises(StoreError, match=r"cannot be (written|used)"):
        await SqlCatalog.open(f"sqlite:///{file}")


async def test_a_full_disk_is_said_and_nothing_is_written(catalog: SqlCatalog) -> None:
    await catalog.publish([path(1)])
    await catalog._database.write(pragma, "max_page_count = 30")
    with pytest.raises(StoreFull, match=r"no room for the catalog .*/catalog.sqlite"):
        await catalog.publish([path(number) for number in range(1000)])
    assert await scanned(catalog) == [path(1)]
    await catalog._database.write(pragma, "max_page_count = 1000000")
    await catalog.publish([path(number) for number in range(1000)])
    assert len(await scanned(catalog)) == 1000


async def test_a_lock_that_is_kept_too_long_is_said_and_reads_go_on(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(file, 2)
    monkeypatch.setattr(sqlite, "LOCK_TIMEOUT", 0.05)
    catalog = await SqlCatalog.open(f"sqlite:///{file}")
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked by another process"):
        await catalog.publish([path(3)])
    with pytest.raises(StoreUnavailable, match="locked by another process"):
        await SqlCatalog.open(f"sqlite:///{file}")
    assert await catalog.present("main", [hash_part(1), hash_part(3)]) == {hash_part(1)}
    other.execute("ROLLBACK")
    other.close()
    await catalog.publish([path(3)])
    await catalog.close()


async def test_a_file_that_another_process_begins_to_write_is_waited_for(file: Path) -> None:
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    opening = asyncio.create_task(SqlCatalog.open(f"sqlite:///{file}"))
    await asyncio.sleep(0.1)
    other.execute("ROLLBACK")
    other.close()
    await (await opening).close()


async def test_other_failures_are_store_errors_without_values(catalog: SqlCatalog, file: Path) -> None:
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("DROP TABLE tokens")
    other.close()
    secret = token("ci", 0xC0FFEE)
    with pytest.raises(StoreError, match="no such table: tokens") as failed:
        await catalog.put_token(secret)
    assert secret.sha256 not in str(failed.value)
    assert secret.sha256 not in str(failed.value.__cause__)
