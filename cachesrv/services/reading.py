"""Small objects read from storage, many at a time, whatever is the matter with some of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from cachesrv.errors import CachesrvError, StoreInaccessible
from cachesrv.services.several import several

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from cachesrv.storage.base import ObjectStore

_ASKED_TOGETHER = 32


async def read_all(storage: ObjectStore, keys: Collection[str], *, limit: int) -> dict[str, bytes | CachesrvError]:
    """By key, those that are there; for one that cannot be read or exceeds `limit` bytes, why. Raises
    StoreInaccessible.
    """
    texts: Mapping[str, bytes] = {}
    try:
        texts = await storage.get_many(keys, limit=limit)
    except StoreInaccessible:
        raise
    except CachesrvError:
        texts = {}  # one of them is to blame; each is asked for by itself
    missing = [key for key in keys if key not in texts]
    singly = await several(partial(_read, storage, limit), missing, at_a_time=_ASKED_TOGETHER)
    return {**texts, **{key: text for key, text in zip(missing, singly, strict=True) if text is not None}}


async def _read(storage: ObjectStore, limit: int, key: str) -> bytes | CachesrvError | None:
    try:
        return await storage.get(key, limit=limit)
    except StoreInaccessible:
        raise
    except CachesrvError as error:
        return error
