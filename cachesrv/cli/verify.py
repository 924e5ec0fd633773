"""`cachesrv verify`."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from cachesrv.cli import SOME_FAILED, offline

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from cachesrv.cli.verify_output import Output
    from cachesrv.config import Config
    from cachesrv.services.copies import Copies
    from cachesrv.services.nar_check import NarCheck
    from cachesrv.services.verify_journal import Journal
    from cachesrv.web.site import Services


_LOCK = "verification"
"""Who verifies on a schedule holds it."""
_NICE = 10


def _rate(context: click.Context, _parameter: click.Parameter, text: str | None) -> int:
    from cachesrv.config import with_unit

    if text is None:
        return 0
    try:
        return with_unit(text.removesuffix("/s"), "size")
    except ValueError:
        raise click.BadParameter('expected bytes a second such as "50 MiB"', context) from None


@dataclass(frozen=True, slots=True)
class _Wish:
    """What is to be done. Without `jobs`, NARs are not read; `origin` is a cache that may have other copies."""

    chosen: tuple[str, ...]
    jobs: int
    rate: int
    restart: bool = False
    repair: bool = False
    origin: str | None = None
    wait: float = 0.0
    forced: bool = False


@click.command(
    epilog="""\b
Examples:
  cachesrv verify
  cachesrv verify --contents --rate "50 MiB" main
  cachesrv verify --json --config /etc/cachesrv.toml > report
  cachesrv verify --repair --from https://cache.example.org
  cachesrv verify --determinism ./result

Each narinfo in storage is read and its signatures are checked; its NAR has to be there with the right size, and what it
refers to as well; catalog, index and storage have to agree. With --contents each NAR is unpacked and hashed. The server
goes on meanwhile. What was interrupted goes on where it was when it is started again.

Without --repair nothing is changed. With it, what is wrong is mended from another copy: of the other caches here, of
--from, of the local Nix store, of an upstream. A copy is verified before it replaces anything. Where there is none, the
path is taken out of sight with all that need it; `cachesrv why` remembers that.

With --determinism, PATHs (store paths, or links to them) are compared with what the cache has of them, or the one that
--from names: whether both builds came to the same, and if not, which files differ.

\b
Exit status: 0 all is well or was mended, 1 it could not be told, 2 wrong usage or configuration, 3 flaws were found and
named, or paths were taken away.
"""
)
@click.argument("names", nargs=-1, metavar="[CACHE | PATH]...")
@click.option("--contents", is_flag=True, help="Unpack and hash every NAR.")
@click.option("--repair", is_flag=True, help="Mend what is wrong, or take it out of sight.")
@click.option("--from", "origin", metavar="URL", help="A cache that may have other copies; also a folder.")
@click.option("--force", "forced", is_flag=True, help="Take away more than a tenth of a cache, if it has to be.")
@click.option("--wait", default=0.0, metavar="SECONDS", help="How long --repair waits while others delete.")
@click.option("--determinism", is_flag=True, help="Compare PATHs of the local Nix store with those of the cache.")
@offline.cache_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, the last with the sums.")
@click.option("--jobs", type=click.IntRange(1, 256), metavar="N", help="NARs at the same time.  [default: one a core]")
@click.option("--rate", callback=_rate, metavar="BYTES/s", help='Read no faster, as "50 MiB".  [default: no limit]')
@click.option("--restart", is_flag=True, help="Begin anew, wherever an earlier run was interrupted.")
@click.option("--scheduled", is_flag=True, hidden=True, help="By the server: when it is due, out of the way of others.")
@offline.server_options
def command(
    *,
    names: tuple[str, ...],
    contents: bool,
    determinism: bool,
    cache: str | None,
    repair: bool,
    origin: str | None,
    forced: bool,
    wait: float,
    as_json: bool,
    jobs: int | None,
    rate: int,
    restart: bool,
    scheduled: bool,
    config_file: Path | None,
    data_dir: str | None,
) -> int:
    """Look whether everything is there, whole and signed."""
    from cachesrv.cli.verify_output import JsonLines, Lines

    context = click.get_current_context()
    if origin and not (repair or determinism):
        raise click.UsageError("--from is for --repair and --determinism", context)
    if forced and not repair:
        raise click.UsageError("--force is for --repair", context)
    if determinism and not names:
        raise click.UsageError("--determinism: which paths?", context)
    config = offline.load(config_file, data_dir)
    if scheduled:
        offline.with_services(config, lambda services: _run_scheduled(config, services))
        return 0
    if determinism:
        from cachesrv.cli import determinism as comparing

        of = offline.chosen_cache(config, cache)
        return offline.with_services(
            config, lambda services: comparing.run(services, of, names, origin=origin, as_json=as_json)
        )
    wish = _Wish(
        chosen=_chosen(config, names),
        jobs=(jobs or len(os.sched_getaffinity(0))) if contents else 0,
        rate=rate,
        restart=restart,
        repair=repair,
        origin=origin,
        wait=wait,
        forced=forced,
    )
    output: Output = JsonLines() if as_json else Lines()
    return offline.with_services(config, lambda services: _run(config, services, wish, output), makes_room=repair)


def _chosen(config: Config, names: Collection[str]) -> tuple[str, ...]:
    """These caches, or all of them. Raises ConfigError."""
    from cachesrv.errors import ConfigError

    there = [cache.name for cache in config.cache]
    if unknown := set(names) - set(there):
        raise ConfigError(f"no cache is called {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    return tuple(name for name in there if not names or name in names)


async def _run_scheduled(config: Config, services: Services) -> None:
    """For a program that reads the sums; nothing is printed when there was nothing to do."""
    import time

    from cachesrv.cli.verify_output import Logged
    from cachesrv.services.data_directory import DataDirectory
    from cachesrv.services.maintenance import Busy, maintenance
    from cachesrv.services.schedule import is_due
    from cachesrv.services.verify import FLAWS_FOUND, VERIFIED

    os.nice(_NICE)
    wish = _Wish(_chosen(config, ()), jobs=int(config.verify.contents), rate=config.verify.rate)
    output = Logged()
    try:
        async with maintenance(services.catalog, lock=_LOCK):
            last = int(await services.catalog.noted(VERIFIED) or 0)
            if not is_due(last, config.verify.interval):
                return
            journal = DataDirectory(config.data_dir).scheduled_verification
            await _run(config, services, wish, output, journal=journal)
            await services.catalog.note(FLAWS_FOUND, str(output.flaws))
            await services.catalog.note(VERIFIED, str(int(time.time())))
    except Busy:
        return


async def _run(config: Config, services: Services, wish: _Wish, output: Output, *, journal: Path | None = None) -> int:
    """Returns the exit status."""
    from contextlib import AsyncExitStack

    from cachesrv import wiring
    from cachesrv.services.data_directory import DataDirectory
    from cachesrv.services.nar_check import NarCheck
    from cachesrv.services.pace import Pace
    from cachesrv.services.verify_journal import Journal

    terms = {"caches": " ".join(sorted(wish.chosen)), "contents": str(bool(wish.jobs))}
    notes = Journal(journal or DataDirectory(config.data_dir).verification, terms, fresh=wish.restart)
    contents = NarCheck(services.storage, Pace(wish.rate), jobs=wish.jobs) if wish.jobs else None
    repaired = None
    stack = AsyncExitStack()
    try:
        copies = [await wiring.open_copies(wish.origin, stack)] if wish.origin and wish.repair else []
        output.begin(notes)
        counts = await wiring.build_verify(config, services, contents).run(wish.chosen, notes, output)
        if wish.repair and counts.flaws:
            repaired = await _repair(config, services, wish, notes, output=output, contents=contents, copies=copies)
        elif wish.repair:
            await _finish(config, services)
        notes.finish()
    finally:
        await stack.aclose()
        if contents:
            contents.close()
        notes.close()
    output.sum_up(counts, repaired)
    wrong = repaired["removed"] + repaired["left"] if repaired else len(counts.flaws)
    return SOME_FAILED if wrong else 0


async def _finish(config: Config, services: Services) -> None:
    """Delete what a repair that was interrupted had still to delete; whoever deletes at present does that as well."""
    from cachesrv import wiring
    from cachesrv.services.maintenance import Busy, maintenance
    from cachesrv.services.removing import Removing

    if await services.catalog.doomed():
        with suppress(Busy):
            async with maintenance(services.catalog):
                caches = wiring.served_caches(config)
                await Removing(services.storage, services.catalog, services.index).finish(caches)


async def _repair(
    config: Config,
    services: Services,
    wish: _Wish,
    journal: Journal,
    *,
    output: Output,
    contents: NarCheck | None,
    copies: list[Copies],
) -> dict[str, int]:
    """How often each result came about."""
    from contextlib import AsyncExitStack

    from cachesrv import wiring
    from cachesrv.cli.store_copies import LocalStoreCopies
    from cachesrv.errors import CachesrvError
    from cachesrv.push.local_store import open_store
    from cachesrv.services.maintenance import maintenance

    async with AsyncExitStack() as stack:
        with suppress(CachesrvError):  # there may be no Nix here
            store = await open_store(None, os.environ)
            stack.push_async_callback(store.close)
            copies = [*copies, LocalStoreCopies(store)]
        holder = await stack.enter_async_context(maintenance(services.catalog, patience=wish.wait))
        journal.repairing()
        repair = await stack.enter_async_context(
            wiring.open_repair(config, services, holder, copies=copies, contents=contents, forced=wish.forced)
        )
        return await repair.run(journal.flaws, output)
