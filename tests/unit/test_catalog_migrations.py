"""Migrations give the schema, run once, and refuse databases that are not theirs."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from cachesrv.catalog import migrations
from cachesrv.catalog.base import PathRecord
from cachesrv.catalog.retention import PathUse
from cachesrv.catalog.schema import metadata
from cachesrv.catalog.sql import SqlCatalog
from cachesrv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from alembic.config import Config

    Migrate = Callable[..., Awaitable[None]]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.sqlite"


async def make(path: Path) -> None:
    await (await SqlCatalog.open(f"sqlite:///{path}")).close()


@pytest.fixture
def migrate(monkeypatch: pytest.MonkeyPatch) -> Migrate:
    """A catalog that has gone through all migrations, up to this one."""

    async def migrate(path: Path, head: str = migrations.HEAD) -> None:
        with sqlite3.connect(path) as connection:
            connection.execute(migrations._ALEMBIC_VERSION)
        connection.close()
        with monkeypatch.context() as patched:
            patched.setattr(migrations, "HEAD", head)
            await make(path)

    return migrate


def definitions(path: Path) -> dict[str, set[str]]:
    """The parts of each statement that made a table or an index: columns and constraints may come in another order."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    connection.close()
    return {name: parts(re.sub(r"\s+", " ", sql)) for name, sql in rows}


def parts(statement: str) -> set[str]:
    """What stands before the outer parentheses, after them, and between the commas in them."""
    before, _, rest = statement.partition("(")
    inside, _, after = rest.rpartition(")")
    commas = [at for at, c in enumerate(inside) if c == "," and inside.count("(", 0, at) == inside.count(")", 0, at)]
    bounds = [-1, *commas, len(inside)]
    return {before, after, *(inside[start + 1 : end].strip() for start, end in pairwise(bounds))}


async def test_migrations_make_exactly_the_schema(path: Path, tmp_path: Path, migrate: Migrate) -> None:
    await migrate(path)
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()

    await make(tmp_path / "new.sqlite")
    assert definitions(path) == definitions(tmp_path / "new.sqlite")


async def test_what_an_older_version_wrote_is_kept(path: Path, migrate: Migrate) -> None:
    await migrate(path, "0001")
    with sqlite3.connect(path) as connection:
        connection.executescript(
            """
            INSERT INTO names VALUES (7, 'main', 'aaaa', 'old');
            INSERT INTO paths VALUES (7, 'main', 'aaaa', 'main/nar/x', 'sha256:x', 10, 5, NULL, NULL, 1000, 2000);
            INSERT INTO narinfos VALUES (7, x'0a');
            INSERT INTO nars VALUES ('main/nar/x', 'main', 'zstd', 'sha256:y', 5, 'sha256:x', 10, 1000, NULL);
            """
        )
    connection.close()
    catalog = await SqlCatalog.open(f"sqlite:///{path}")
    assert await catalog.path("main", "aaaa") == PathRecord(
        "main", "aaaa", "old", b"\n", "main/nar/x", "sha256:x", 10, 5, (), None, None, 1000
    )
    assert await catalog.uses("main", 0) == [PathUse(7, 2000, leased=False, file_size=5)]
    assert (await catalog.nars_by_hash("main", ["sha256:x"])).keys() == {"sha256:x"}
    await catalog.close()


async def test_what_was_being_deleted_is_deleted_in_the_end(path: Path, migrate: Migrate) -> None:
    await migrate(path, "0003")
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO doomed VALUES ('main/b'), ('main/a')")
    connection.close()
    catalog = await SqlCatalog.open(f"sqlite:///{path}")
    assert set(await catalog.doomed()) == {"main/a", "main/b"}
    await catalog.close()


def test_the_head_is_the_last_of_the_packaged_migrations() -> None:
    packaged = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert packaged.get_heads() == [migrations.HEAD]


def test_the_schema_can_be_written_for_postgresql() -> None:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy has no types there
    statements = [str(CreateTable(table).compile(dialect=dialect)) for table in metadata.sorted_tables]
    indexes = [CreateIndex(index) for table in metadata.sorted_tables for index in table.indexes]
    statements += [str(index.compile(dialect=dialect)) for index in indexes]
    text = "\n".join(statements)
    assert "id BIGSERIAL" in text
    assert 'TEXT COLLATE "C"' in text
    assert "WHERE revoked_at IS NULL" in text


def imports_alembic(path: Path) -> bool:
    """Whether a process does that opens this catalog."""
    program = (
        "import asyncio, sys; from cachesrv.catalog.sql import SqlCatalog\n"
        "async def main(): await (await SqlCatalog.open(sys.argv[1])).close()\n"
        "asyncio.run(main()); print('alembic' in sys.modules)"
    )
    command_line = [sys.executable, "-c", program, f"sqlite:///{path}"]
    done = subprocess.run(command_line, capture_output=True, text=True, cwd=ROOT, check=True)
    return {"True": True, "False": False}[done.stdout.strip()]


async def test_alembic_is_imported_only_where_there_is_something_to_migrate(
    path: Path, tmp_path: Path, migrate: Migrate
) -> None:
    await migrate(tmp_path / "old.sqlite", "0003")
    assert [imports_alembic(each) for each in (path, path, tmp_path / "old.sqlite")] == [False, False, True]


async def test_a_database_of_a_newer_version_is_left_alone(path: Path) -> None:
    await make(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(ConfigError, match=r"newer cachesrv .*9999.*run that version"):
        await make(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]
    connection.close()


async def test_the_database_of_another_program_is_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE ValidPaths (id INTEGER PRIMARY KEY)")
    connection.close()
    with pytest.raises(ConfigError, match="another program"):
        await make(path)
    assert definitions(path).keys() == {"ValidPaths"}


async def test_a_migration_that_fails_leaves_nothing_behind(
    path: Path, migrate: Migrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate(path, "0001")
    before = definitions(path)
    upgrade = command.upgrade

    def fail_at_the_end(config: Config, revision: str) -> None:
        upgrade(config, revision)
        raise ConfigError("not today")

    with monkeypatch.context() as patched:
        patched.setattr(command, "upgrade", fail_at_the_end)
        with pytest.raises(ConfigError, match="not today"):
            await make(path)
    assert definitions(path) == before
    await make(path)
    assert definitions(path) != before
