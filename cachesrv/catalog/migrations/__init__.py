"""How the schema came to be: an Alembic environment, applied when the catalog is opened.

To change the schema: change `cachesrv/catalog/schema.py`, add the next file to `versions/` (what stands there already
has been applied somewhere and stays as it is), and set `HEAD` to its revision. A new catalog is made from the schema
itself: a test shows what a migration still lacks to give the same tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import inspect, text

from cachesrv.catalog.schema import metadata
from cachesrv.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy import Connection

HEAD = "0004"
_ALEMBIC_VERSION = """
CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL,
    CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
)
"""
"""As Alembic makes it."""


def migrate(connection: Connection) -> None:
    """Bring the database to the newest schema, inside the caller's transaction, which has to be the only one that
    writes. Raises ConfigError when the database is not ours, or that of a newer cachesrv.
    """
    tables = inspect(connection).get_table_names()
    if not tables:
        _create(connection)
        return
    if "alembic_version" not in tables:
        raise ConfigError("the database of the catalog belongs to another program: it has tables that are not ours")
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    if revision != HEAD:
        _upgrade(connection, revision)


def _create(connection: Connection) -> None:
    """What all migrations together make, without Alembic: a first start would wait longer for its import than for all
    else.
    """
    metadata.create_all(connection, checkfirst=False)
    connection.execute(text(_ALEMBIC_VERSION))
    connection.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": HEAD})


def _upgrade(connection: Connection, revision: str | None) -> None:
    # There is rarely something to migrate.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    ours = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if revision is not None and revision not in ours:
        raise ConfigError(
            f"the catalog was written by a newer cachesrv (its schema is {revision}, this one knows {HEAD}):"
            " run that version, or a later one"
        )
    command.upgrade(config, HEAD)
