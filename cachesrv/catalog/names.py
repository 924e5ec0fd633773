"""Base names of store paths as rows: all that a cache publishes or refers to, each once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import bindparam, delete, exists, insert, select

from cachesrv.catalog.batches import batches
from cachesrv.catalog.schema import names, paths, refs
from cachesrv.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection


_KNOWN = select(names.c.hash_part, names.c.name, names.c.id).where(
    names.c.cache == bindparam("cache"), names.c.hash_part.in_(bindparam("hash_parts", expanding=True))
)
_INSERT = insert(names).returning(names.c.hash_part, names.c.name, names.c.id)
_PRUNE = delete(names).where(
    names.c.id.in_(bindparam("candidates", expanding=True)),
    ~exists().where(paths.c.id == names.c.id),
    ~exists().where(refs.c.name_id == names.c.id),
)


def name_ids(connection: Connection, cache: str, base_names: Collection[str]) -> dict[str, int]:
    """The id of each; those that have none get one. Raises BadInput."""
    split = {base_name: split_name(base_name) for base_name in base_names}
    known: dict[str, int] = {}
    for hash_parts in batches(hash_part for hash_part, _ in split.values()):
        rows = connection.execute(_KNOWN, {"cache": cache, "hash_parts": hash_parts})
        known.update((f"{hash_part}-{name}", name_id) for hash_part, name, name_id in rows)
    missing = [split[base_name] for base_name in sorted(split.keys() - known.keys())]
    if missing:
        rows = connection.execute(
            _INSERT, [{"cache": cache, "hash_part": hash_part, "name": name} for hash_part, name in missing]
        )
        known.update((f"{hash_part}-{name}", name_id) for hash_part, name, name_id in rows)
    return known


def prune_names(connection: Connection, candidates: Collection[int]) -> None:
    """Forget those that are neither published nor referred to any more."""
    for some in batches(candidates):
        connection.execute(_PRUNE, {"candidates": some})


def split_name(base_name: str) -> tuple[str, str]:
    """Hash part and name. Raises BadInput."""
    hash_part, dash, name = base_name.partition("-")
    if not (hash_part and dash and name):
        raise BadInput(f"not the base name of a store path: {base_name!r}")
    return hash_part, name
