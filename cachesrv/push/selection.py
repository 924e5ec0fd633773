"""From the names that people give to the path infos that are to be pushed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, NotFound
from cachesrv.nix.nar_writer import nar_size
from cachesrv.nix.path_info import in_reference_order
from cachesrv.push.events import Failed
from cachesrv.push.failure import Failure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cachesrv.nix.path_info import PathInfo
    from cachesrv.nix.store_path import StorePath
    from cachesrv.push.events import Emit
    from cachesrv.push.local_store import LocalStore


async def select(store: LocalStore, names: Iterable[str], *, closure: bool, emit: Emit) -> list[PathInfo]:
    """The paths that the names stand for, with all they need if `closure`; each after all it refers to.

    Names that stand for no valid path are told of as Failed and left out. Raises what the store raises of itself.
    """
    paths: dict[StorePath, str] = {}
    for name in names:
        try:
            paths.setdefault(await store.resolve(name), name)
        except (BadInput, NotFound) as error:
            emit(Failed(name, *Failure.of(error)))
    if closure:
        try:
            infos = await store.closure(paths)
        except NotFound:
            valid = await _path_infos(store, paths, emit)
            infos = await store.closure(info.store_path for info in valid)
    else:
        infos = in_reference_order(await _path_infos(store, paths, emit))
    return [info if info.nar_size else await _measured(store, info) for info in infos]


async def _path_infos(store: LocalStore, paths: dict[StorePath, str], emit: Emit) -> list[PathInfo]:
    infos = []
    for path, name in paths.items():
        try:
            infos.append(await store.path_info(path))
        except NotFound as error:
            emit(Failed(name, *Failure.of(error)))
    return infos


async def _measured(store: LocalStore, info: PathInfo) -> PathInfo:
    """With the size that an old store never noted, where it can be found."""
    file = store.real_path(info.store_path)
    return info if file is None else replace(info, nar_size=await asyncio.to_thread(nar_size, file))
