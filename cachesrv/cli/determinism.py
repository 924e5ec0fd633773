"""`cachesrv verify --determinism`: paths of the Nix store of this machine beside those of a cache."""

from __future__ import annotations

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import click
import msgspec

from cachesrv.catalog.base import ConflictRecord  # noqa: TC001  msgspec reads what stands in annotations
from cachesrv.cli import SOME_FAILED
from cachesrv.cli.store_copies import LocalStoreCopies
from cachesrv.errors import CachesrvError, NotFound
from cachesrv.services import amounts
from cachesrv.services.copies import OwnCache, Wanted
from cachesrv.services.determinism import Contents, Difference, contents, differences
from cachesrv.services.in_thread import consumed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from concurrent.futures import Executor

    from cachesrv.nix.store_path import StorePath
    from cachesrv.push.local_store import LocalStore
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.copies import Copies, Copy
    from cachesrv.web.site import Services

_SHOWN = 50
"""Differences of one path that people are shown."""


class Comparison(msgspec.Struct):
    """A path with its NAR hashes, `here` and `there`; where they differ, what differs in it; who pushed it with another
    one, as far as the cache remembers. Where it cannot be compared, `error` says why.
    """

    path: str
    same: bool = False
    here: str = ""
    there: str = ""
    differences: list[Difference] = []
    pushed_otherwise: list[ConflictRecord] = []
    error: str = ""


async def run(
    services: Services, cache: ServedCache, paths: Iterable[str], *, origin: str | None, as_json: bool
) -> int:
    """Compare paths with those of this cache, or of the one at `origin`; the exit status."""
    compared = failed = different = 0
    async for comparison in _comparisons(services, cache, paths, origin):
        compared += 1
        failed += bool(comparison.error)
        different += not (comparison.same or comparison.error)
        if as_json:
            click.echo(json.dumps({"event": "path", **msgspec.to_builtins(comparison)}))
        else:
            _tell(comparison)
    same = compared - different - failed
    if as_json:
        sums = {"paths": compared, "same": same, "different": different, "failed": failed}
        click.echo(json.dumps({"event": "summary", **sums}))
    else:
        click.echo(
            f"paths compared: {compared}; the same: {same}, different: {different}, not to be compared: {failed}"
        )
    return SOME_FAILED if different or failed else 0


async def _comparisons(
    services: Services, cache: ServedCache, paths: Iterable[str], origin: str | None
) -> AsyncIterator[Comparison]:
    from cachesrv import wiring
    from cachesrv.push.local_store import open_store

    async with AsyncExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(2, "compare"))
        store = await open_store(None, os.environ)
        stack.push_async_callback(store.close)
        there: Copies = OwnCache(services.storage, services.catalog)
        if origin:
            there = await wiring.open_copies(origin, stack)
        for path in paths:
            try:
                store_path = await store.resolve(path)
                comparison = await _compared(store, there, cache, store_path, threads)
                if not origin:
                    comparison.pushed_otherwise = await services.catalog.conflicts(cache.name, store_path.hash_part)
                yield comparison
            except CachesrvError as error:
                yield Comparison(path, error=str(error))


async def _compared(
    store: LocalStore, there: Copies, cache: ServedCache, path: StorePath, threads: Executor
) -> Comparison:
    wanted = Wanted(cache, path.hash_part, path.name)
    ours = await LocalStoreCopies(store).find(wanted)
    if ours is None:
        raise NotFound(f"{path} is not valid in the local Nix store {store.store_dir}")
    theirs = await there.find(wanted)
    if theirs is None:
        raise NotFound(f"{path} is not in the cache")
    comparison = Comparison(path.full(cache.store_dir), here=ours.nar_hash, there=theirs.nar_hash)
    comparison.same = ours.nar_hash == theirs.nar_hash
    if not comparison.same:
        here, far = await asyncio.gather(_read(ours, threads), _read(theirs, threads))
        comparison.differences = differences(here.entries, far.entries)
    return comparison


async def _read(copy: Copy, threads: Executor) -> Contents:
    found = await consumed(threads, lambda chunks: contents(copy.compression, chunks), copy.read())
    if found.nar_hash.nix32 != copy.nar_hash:
        raise NotFound(f"{copy.where} says {copy.nar_hash} and has {found.nar_hash.nix32}: its files were changed")
    return found


def _tell(comparison: Comparison) -> None:
    if comparison.error:
        click.echo(f"{comparison.path}: {comparison.error}")
    elif comparison.same:
        click.echo(f"{comparison.path}: the same, {comparison.here}")
    else:
        click.echo(f"{comparison.path}: here {comparison.here}, there {comparison.there}")
    for difference in comparison.differences[:_SHOWN]:
        click.echo(f"  {difference}")
    if len(comparison.differences) > _SHOWN:
        click.echo(f"  and {len(comparison.differences) - _SHOWN} more")
    for conflict in comparison.pushed_otherwise:
        first = f", published by {conflict.publisher}" if conflict.publisher else ""
        what = f"{conflict.pusher} pushed it with {conflict.refused_nar_hash}{first}"
        click.echo(f"  {amounts.date(conflict.at)}: {what}")
