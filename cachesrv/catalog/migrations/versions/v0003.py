"""Pushes that were refused."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "refusals",
        sa.Column("id", _ID, nullable=False),
        sa.Column("cache", _TEXT, nullable=False),
        sa.Column("hash_part", _TEXT, nullable=False),
        sa.Column("name", _TEXT, nullable=False),
        sa.Column("reason", _TEXT, nullable=False),
        sa.Column("pusher", _TEXT, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="refusals_pkey"),
        sa.UniqueConstraint("cache", "hash_part", name="refusals_cache_hash_part_key"),
    )
