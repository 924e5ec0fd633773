"""The tables of the catalog: one schema for SQLite and PostgreSQL. Migrations make it, a test keeps the two equal.

Made for millions of paths and ten times as many references:

- **Names are rows, references are pairs of integers.** Every base name that a cache publishes or refers to stands once
  in `names`; a published path has the id of its name. A reference may point to what is not published, costs a dozen
  bytes in each direction instead of a base name in both, and a closure is a walk over integers. Names that nothing
  needs any more go with the paths that used them.
- **`paths` is narrow.** The text of the narinfo, the bulk of a path, lies in `narinfos`: collecting and noting last
  use pass over it. Counting and summing up a cache reads one index only.
- `cache` and `hash_part` stand in `paths` again, so that the database itself keeps a hash part from being published
  twice and answers what is present from one index.

Sizes are in bytes, times in whole seconds since the epoch. Text is compared by its bytes everywhere.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    }
)

# SQLite's own row number is an INTEGER PRIMARY KEY and nothing else; PostgreSQL needs more than 32 bits.
_Id = BigInteger().with_variant(Integer(), "sqlite")
# Other collations would order hash parts by the language of the server.
_Text = Text().with_variant(Text(collation="C"), "postgresql")

names = Table(
    "names",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("cache", _Text, nullable=False),
    Column("hash_part", _Text, nullable=False),
    Column("name", _Text, nullable=False),
    UniqueConstraint("cache", "hash_part", "name"),
)

paths = Table(
    "paths",
    metadata,
    Column("id", _Id, ForeignKey("names.id"), primary_key=True, autoincrement=False),
    Column("cache", _Text, nullable=False),
    Column("hash_part", _Text, nullable=False),
    Column("nar_key", _Text, nullable=False),
    Column("nar_hash", _Text, nullable=False),
    Column("nar_size", BigInteger, nullable=False),
    Column("file_size", BigInteger, nullable=False),
    Column("deriver", _Text),
    Column("ca", _Text),
    Column("registered_at", BigInteger, nullable=False),
    Column("last_used_at", BigInteger),
    Column("leased_until", BigInteger),
    Column("pusher", _Text),
    UniqueConstraint("cache", "hash_part"),
    Index(None, "cache", "nar_size"),
    Index(None, "nar_key", "cache"),
)

narinfos = Table(
    "narinfos",
    metadata,
    Column("path_id", _Id, ForeignKey("paths.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("content", LargeBinary, nullable=False),
)

refs = Table(
    "refs",
    metadata,
    Column("path_id", _Id, ForeignKey("paths.id", ondelete="CASCADE"), nullable=False),
    Column("name_id", _Id, ForeignKey("names.id"), nullable=False),
    PrimaryKeyConstraint("path_id", "name_id"),
    Index(None, "name_id", "path_id"),
    sqlite_with_rowid=False,
)

nars = Table(
    "nars",
    metadata,
    Column("key", _Text, primary_key=True),
    Column("scope", _Text, nullable=False),
    Column("compression", _Text, nullable=False),
    Column("file_hash", _Text, nullable=False),
    Column("file_size", BigInteger, nullable=False),
    Column("nar_hash", _Text, nullable=False),
    Column("nar_size", BigInteger, nullable=False),
    Column("verified_at", BigInteger, nullable=False),
    Column("listing", LargeBinary),
    Column("leased_until", BigInteger),
    Index(None, "scope", "nar_hash"),
)

conflicts = Table(
    "conflicts",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("cache", _Text, nullable=False),
    Column("hash_part", _Text, nullable=False),
    Column("name", _Text, nullable=False),
    Column("published_nar_hash", _Text, nullable=False),
    Column("refused_nar_hash", _Text, nullable=False),
    Column("pusher", _Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("publisher", _Text),
    UniqueConstraint("cache", "hash_part", "published_nar_hash", "refused_nar_hash", "pusher", name="conflicts_key"),
)

# The greater the id, the later it was.
refusals = Table(
    "refusals",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("cache", _Text, nullable=False),
    Column("hash_part", _Text, nullable=False),
    Column("name", _Text, nullable=False),
    Column("reason", _Text, nullable=False),
    Column("pusher", _Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    UniqueConstraint("cache", "hash_part"),
)

tokens = Table(
    "tokens",
    metadata,
    Column("sha256", _Text, primary_key=True),
    Column("name", _Text, nullable=False),
    Column("caches", JSON, nullable=False),
    Column("permissions", JSON, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
)

# One name may have belonged to several tokens, but only to one that is still good.
Index(
    "tokens_good_name_key",
    tokens.c.name,
    unique=True,
    sqlite_where=text("revoked_at IS NULL"),
    postgresql_where=text("revoked_at IS NULL"),
)

pins = Table(
    "pins",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("cache", _Text, nullable=False),
    Column("name", _Text, nullable=False),
    Column("keep", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    UniqueConstraint("cache", "name"),
)

generations = Table(
    "generations",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("pin_id", _Id, ForeignKey("pins.id", ondelete="CASCADE"), nullable=False),
    Column("hash_part", _Text, nullable=False),
    Column("name", _Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("by", _Text, nullable=False),
    Index(None, "pin_id"),
)

removals = Table(
    "removals",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("cache", _Text, nullable=False),
    Column("hash_part", _Text, nullable=False),
    Column("name", _Text, nullable=False),
    Column("nar_hash", _Text, nullable=False),
    Column("reason", _Text, nullable=False),
    Column("by", _Text, nullable=False),
    Column("at", BigInteger, nullable=False),
    UniqueConstraint("cache", "hash_part"),
    Index(None, "at"),
)

# NARs that a path needed which has gone; others may still need them.
released = Table(
    "released",
    metadata,
    Column("key", _Text, primary_key=True),
    Column("at", BigInteger, nullable=False),
)

# Objects that are being deleted from storage, in the order of their ids.
doomed = Table(
    "doomed",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("key", _Text, nullable=False),
    UniqueConstraint("key"),
)

locks = Table(
    "locks",
    metadata,
    Column("name", _Text, primary_key=True),
    Column("holder", _Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
)

notes = Table("notes", metadata, Column("name", _Text, primary_key=True), Column("value", _Text, nullable=False))
