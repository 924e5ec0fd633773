"""The Nix store of this machine as a place that may have copies; see `cachesrv.services.copies.Copies`."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from cachesrv.errors import NotFound
from cachesrv.nix.content_address import ContentAddress
from cachesrv.nix.nar_writer import dump
from cachesrv.nix.narinfo import NarInfo
from cachesrv.nix.signing import readable_signatures
from cachesrv.nix.store_path import StorePath
from cachesrv.services.copies import Copy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.local_store import LocalStore
    from cachesrv.services.copies import Wanted


class LocalStoreCopies:
    """What it says of its paths is believed: it is the store of whoever runs this."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    async def find(self, wanted: Wanted) -> Copy | None:
        """See Copies."""
        if wanted.name is None or wanted.cache.store_dir != self._store.store_dir:
            return None
        try:
            info = await self._store.path_info(StorePath(wanted.hash_part, wanted.name))
        except NotFound:
            return None
        if not info.nar_size:
            return None
        return Copy(
            where="the local Nix store",
            nar_hash=info.nar_hash.nix32,
            compression="none",
            read=partial(self._nar, info),
            info=_narinfo(info, self._store.store_dir),
            believed=True,
            pack=True,
        )

    async def _nar(self, info: PathInfo) -> AsyncIterator[bytes]:
        real = self._store.real_path(info.store_path)
        if real is None:
            async for chunk in self._store.nar(info):
                yield chunk
            return
        chunks = dump(real)
        try:
            while chunk := await asyncio.to_thread(next, chunks, b""):
                yield chunk
        finally:
            chunks.close()


def _narinfo(info: PathInfo, store_dir: str) -> NarInfo:
    return NarInfo(
        store_path=info.store_path,
        store_dir=store_dir,
        url=f"nar/{info.nar_hash.bare_nix32}.nar",
        compression="none",
        file_hash=None,
        file_size=None,
        nar_hash=info.nar_hash,
        nar_size=info.nar_size,
        references=info.references,
        deriver=info.deriver,
        signatures=readable_signatures(info.signatures),
        ca=ContentAddress.parse(info.ca) if info.ca else None,
    )
