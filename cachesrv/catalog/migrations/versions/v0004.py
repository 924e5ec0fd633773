"""In which order objects are deleted."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    # There are some only if a collection was interrupted, and then a few hundred.
    keys = list(op.get_bind().scalars(sa.text("SELECT key FROM doomed")))
    op.drop_table("doomed")
    table = op.create_table(
        "doomed",
        sa.Column("id", _ID, nullable=False),
        sa.Column("key", _TEXT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="doomed_pkey"),
        sa.UniqueConstraint("key", name="doomed_key_key"),
    )
    op.bulk_insert(table, [{"key": key} for key in keys])
