"""How the schema came to be: an Alembic environment, applied when the catalog is opened.

To change the schema: change `cachesrv/catalog/schema.py`, add the next file to `versions/` (what stands there already
has been applied somewhere and stays as it is), and set `HEAD` to its revision. A test shows what a migration still
lacks to give the tables of the schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import inspect, text

from cachesrv.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy import Connection

HEAD = "0004"


def migrate(connection: Connection) -> None:
    """Bring the database to the newest schema, inside the caller's transaction, which has to be the only one that
    writes. Raises ConfigError when the database is not ours, or that of a newer cachesrv.
    """
    revision = _revision(connection)
    if revision != HEAD:
        _upgrade(connection, revision)


def _revision(connection: Connection) -> str | None:
    tables = inspect(connection).get_table_names()
    if not tables:
        return None
    if "alembic_version" not in tables:
        raise ConfigError("the database of the catalog belongs to another program: it has tables that are not ours")
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def _upgrade(connection: Connection, revision: str | None) -> None:
    # Alembic takes longer to import than all else that opens the catalog, and there is rarely something to migrate.
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
