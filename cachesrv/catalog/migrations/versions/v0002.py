"""What keeps paths (pins, leases), what has gone and why, what is going; who published a path."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    # Not in a batch, which would write the tables anew: to add a column costs nothing.
    op.add_column("paths", sa.Column("leased_until", sa.BigInteger()))
    op.add_column("paths", sa.Column("pusher", _TEXT))
    op.add_column("nars", sa.Column("leased_until", sa.BigInteger()))
    op.add_column("conflicts", sa.Column("publisher", _TEXT))
    op.create_index("paths_nar_key_cache_idx", "paths", ["nar_key", "cache"])
    _pins()
    _gone()
    _going()


def _pins() -> None:
    op.create_table(
        "pins",
        sa.Column("id", _ID, nullable=False),
        sa.Column("cache", _TEXT, nullable=False),
        sa.Column("name", _TEXT, nullable=False),
        sa.Column("keep", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger()),
        sa.PrimaryKeyConstraint("id", name="pins_pkey"),
        sa.UniqueConstraint("cache", "name", name="pins_cache_name_key"),
    )
    op.create_table(
        "generations",
        sa.Column("id", _ID, nullable=False),
        sa.Column("pin_id", _ID, nullable=False),
        sa.Column("hash_part", _TEXT, nullable=False),
        sa.Column("name", _TEXT, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("by", _TEXT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="generations_pkey"),
        sa.ForeignKeyConstraint(["pin_id"], ["pins.id"], name="generations_pin_id_fkey", ondelete="CASCADE"),
    )
    op.create_index("generations_pin_id_idx", "generations", ["pin_id"])


def _gone() -> None:
    op.create_table(
        "removals",
        sa.Column("id", _ID, nullable=False),
        sa.Column("cache", _TEXT, nullable=False),
        sa.Column("hash_part", _TEXT, nullable=False),
        sa.Column("name", _TEXT, nullable=False),
        sa.Column("nar_hash", _TEXT, nullable=False),
        sa.Column("reason", _TEXT, nullable=False),
        sa.Column("by", _TEXT, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="removals_pkey"),
        sa.UniqueConstraint("cache", "hash_part", name="removals_cache_hash_part_key"),
    )
    op.create_index("removals_at_idx", "removals", ["at"])
    op.create_table(
        "released",
        sa.Column("key", _TEXT, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="released_pkey"),
    )


def _going() -> None:
    op.create_table(
        "doomed", sa.Column("key", _TEXT, nullable=False), sa.PrimaryKeyConstraint("key", name="doomed_pkey")
    )
    op.create_table(
        "locks",
        sa.Column("name", _TEXT, nullable=False),
        sa.Column("holder", _TEXT, nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="locks_pkey"),
    )
    op.create_table(
        "notes",
        sa.Column("name", _TEXT, nullable=False),
        sa.Column("value", _TEXT, nullable=False),
        sa.PrimaryKeyConstraint("name", name="notes_pkey"),
    )
