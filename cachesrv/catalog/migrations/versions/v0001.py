"""Paths with their names and references, NARs, refused pushes, tokens."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    _paths()
    _nars()
    _conflicts()
    _tokens()


def _paths() -> None:
    op.create_table(
        "names",
        sa.Column("id", _ID, nullable=False),
        sa.Column("cache", _TEXT, nullable=False),
        sa.Column("hash_part", _TEXT, nullable=False),
        sa.Column("name", _TEXT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="names_pkey"),
        sa.UniqueConstraint("cache", "hash_part", "name", name="names_cache_hash_part_name_key"),
    )
    op.create_table(
        "paths",
        sa.Column("id", _ID, autoincrement=False, nullable=False),
        sa.Column("cache", _TEXT, nullable=False),
        sa.Column("hash_part", _TEXT, nullable=False),
        sa.Column("nar_key", _TEXT, nullable=False),
        sa.Column("nar_hash", _TEXT, nullable=False),
        sa.Column("nar_size", sa.BigInteger(), nullable=False),
        sa.Column("file_size", sa.BigInteger(), nullable=False),
        sa.Column("deriver", _TEXT),
        sa.Column("ca", _TEXT),
        sa.Column("registered_at", sa.BigInteger(), nullable=False),
        sa.Column("last_used_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="paths_pkey"),
        sa.ForeignKeyConstraint(["id"], ["names.id"], name="paths_id_fkey"),
        sa.UniqueConstraint("cache", "hash_part", name="paths_cache_hash_part_key"),
    )
    op.create_index("paths_cache_nar_size_idx", "paths", ["cache", "nar_size"])
    op.create_table(
        "narinfos",
        sa.Column("path_id", _ID, autoincrement=False, nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("path_id", name="narinfos_pkey"),
        sa.ForeignKeyConstraint(["path_id"], ["paths.id"], name="narinfos_path_id_fkey", ondelete="CASCADE"),
    )
    op.create_table(
        "refs",
        sa.Column("path_id", _ID, nullable=False),
        sa.Column("name_id", _ID, nullable=False),
        sa.PrimaryKeyConstraint("path_id", "name_id", name="refs_pkey"),
        sa.ForeignKeyConstraint(["path_id"], ["paths.id"], name="refs_path_id_fkey", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["name_id"], ["names.id"], name="refs_name_id_fkey"),
        sqlite_with_rowid=False,
    )
    op.create_index("refs_name_id_path_id_idx", "refs", ["name_id", "path_id"])


def _nars() -> None:
    op.create_table(
        "nars",
        sa.Column("key", _TEXT, nullable=False),
        sa.Column("scope", _TEXT, nullable=False),
        sa.Column("compression", _TEXT, nullable=False),
        sa.Column("file_hash", _TEXT, nullable=False),
        sa.Column("file_size", sa.BigInteger(), nullable=False),
        sa.Column("nar_hash", _TEXT, nullable=False),
        sa.Column("nar_size", sa.BigInteger(), nullable=False),
        sa.Column("verified_at", sa.BigInteger(), nullable=False),
        sa.Column("listing", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("key", name="nars_pkey"),
    )
    op.create_index("nars_scope_nar_hash_idx", "nars", ["scope", "nar_hash"])


def _conflicts() -> None:
    op.create_table(
        "conflicts",
        sa.Column("id", _ID, nullable=False),
        sa.Column("cache", _TEXT, nullable=False),
        sa.Column("hash_part", _TEXT, nullable=False),
        sa.Column("name", _TEXT, nullable=False),
        sa.Column("published_nar_hash", _TEXT, nullable=False),
        sa.Column("refused_nar_hash", _TEXT, nullable=False),
        sa.Column("pusher", _TEXT, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="conflicts_pkey"),
        sa.UniqueConstraint(
            "cache", "hash_part", "published_nar_hash", "refused_nar_hash", "pusher", name="conflicts_key"
        ),
    )


def _tokens() -> None:
    op.create_table(
        "tokens",
        sa.Column("sha256", _TEXT, nullable=False),
        sa.Column("name", _TEXT, nullable=False),
        sa.Column("caches", sa.JSON(), nullable=False),
        sa.Column("permissions", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger()),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("sha256", name="tokens_pkey"),
    )
    good = sa.text("revoked_at IS NULL")
    op.create_index("tokens_good_name_key", "tokens", ["name"], unique=True, sqlite_where=good, postgresql_where=good)
