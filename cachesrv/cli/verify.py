"""`cachesrv verify`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from cachesrv.cli import SOME_FAILED, offline

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from cachesrv.cli.verify_output import Output
    from cachesrv.config import Config
    from cachesrv.web.site import Services


def _rate(context: click.Context, _parameter: click.Parameter, text: str | None) -> int:
    from cachesrv.config import with_unit

    if text is None:
        return 0
    try:
        return with_unit(text.removesuffix("/s"), "size")
    except ValueError:
        raise click.BadParameter('expected bytes a second such as "50 MiB"', context) from None


@click.command(
    epilog="""\b
Examples:
  cachesrv verify
  cachesrv verify --contents --rate "50 MiB" main
  cachesrv verify --json --config /etc/cachesrv.toml > report

Each narinfo in storage is read and its signatures are checked; its NAR has to be there with the right size, and what it
refers to as well; catalog, index and storage have to agree. With --contents each NAR is unpacked and hashed. Nothing is
changed. The server goes on meanwhile. What was interrupted goes on where it was when it is started again.

\b
Exit status: 0 all is well, 1 it could not be told, 2 wrong usage or configuration, 3 flaws were found and named.
"""
)
@click.argument("caches", nargs=-1, metavar="[CACHE]...")
@click.option("--contents", is_flag=True, help="Unpack and hash every NAR.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, the last with the sums.")
@click.option("--jobs", type=click.IntRange(1, 256), metavar="N", help="NARs at the same time.  [default: one a core]")
@click.option("--rate", callback=_rate, metavar="BYTES/s", help='Read no faster, as "50 MiB".  [default: no limit]')
@click.option("--restart", is_flag=True, help="Begin anew, wherever an earlier run was interrupted.")
@offline.server_options
def command(
    *,
    caches: tuple[str, ...],
    contents: bool,
    as_json: bool,
    jobs: int | None,
    rate: int,
    restart: bool,
    config_file: Path | None,
    data_dir: str | None,
) -> int:
    """Look whether everything is there, whole and signed."""
    from cachesrv.cli.verify_output import JsonLines, Lines

    config = offline.load(config_file, data_dir)
    chosen = _chosen(config, caches)
    output: Output = JsonLines() if as_json else Lines()
    jobs = (jobs or len(os.sched_getaffinity(0))) if contents else 0
    return offline.with_services(
        config, lambda services: _run(config, services, chosen, output, jobs=jobs, rate=rate, restart=restart)
    )


def _chosen(config: Config, names: Collection[str]) -> tuple[str, ...]:
    """These caches, or all of them. Raises ConfigError."""
    from cachesrv.errors import ConfigError

    there = [cache.name for cache in config.cache]
    if unknown := set(names) - set(there):
        raise ConfigError(f"no cache is called {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    return tuple(name for name in there if not names or name in names)


async def _run(
    config: Config,
    services: Services,
    chosen: Collection[str],
    output: Output,
    *,
    jobs: int,
    rate: int,
    restart: bool,
) -> int:
    """Without `jobs`, NARs are not read. Returns the exit status."""
    from cachesrv import wiring
    from cachesrv.services.data_directory import DataDirectory
    from cachesrv.services.nar_check import NarCheck
    from cachesrv.services.pace import Pace
    from cachesrv.services.verify_journal import Journal

    terms = {"caches": " ".join(sorted(chosen)), "contents": str(bool(jobs))}
    journal = Journal(DataDirectory(config.data_dir).verification, terms, fresh=restart)
    contents = NarCheck(services.storage, Pace(rate), jobs=jobs) if jobs else None
    try:
        output.begin(journal)
        counts = await wiring.build_verify(config, services, contents).run(chosen, journal, output)
        journal.finish()
    finally:
        if contents:
            contents.close()
        journal.close()
    output.sum_up(counts)
    return SOME_FAILED if counts.flaws else 0
