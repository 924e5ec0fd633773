"""`cachesrv gc`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cachesrv.cli import offline
from cachesrv.cli.removal_output import Json, Lines

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.config import Config
    from cachesrv.services.removal_report import Report
    from cachesrv.web.site import Services

_NICE = 10


@click.command(
    epilog="""\b
Examples:
  cachesrv gc --dry-run
  cachesrv gc --config /etc/cachesrv.toml main
  cachesrv gc --now --wait 600

What goes is said by retention_age and retention_size of each [[cache]] in the configuration: paths that are neither
pinned nor needed by others (`cachesrv why` says of one path what keeps it). They are out of sight at once; their NARs
stay for [collect] nar_grace, for clients that have seen them before, and those that a push may rely on for [collect]
lease, even with --now.

Run it where the server runs, as its user. The server goes on meanwhile, and does this by itself from time to time. It
can be interrupted at any point.
"""
)
@click.argument("caches", metavar="[CACHE]...", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Say what would go, why, and how much space comes back.")
@click.option("--now", is_flag=True, help="NARs that no path needs go at once, not after [collect] nar_grace.")
@click.option("--verbose", "-v", is_flag=True, help="Name each path and each NAR that goes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, the last with the sums.")
@click.option("--wait", default=0.0, metavar="SECONDS", help="How long to wait for another one that is at it.")
@click.option("--scheduled", is_flag=True, hidden=True, help="By the server: when it is due, out of the way of others.")
@offline.server_options
def command(
    caches: tuple[str, ...],
    *,
    dry_run: bool,
    now: bool,
    verbose: bool,
    as_json: bool,
    wait: float,
    scheduled: bool,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Remove what the caches keep no longer; of all of them, or of those that are named."""
    config = offline.load(config_file, data_dir)
    if scheduled:
        offline.with_services(config, lambda services: _run_scheduled(config, services), makes_room=True)
        return
    grace = 0 if now else config.collect.nar_grace
    output = Json() if as_json else Lines(silent=not (dry_run or verbose))

    async def run(services: Services) -> Report:
        from cachesrv import wiring
        from cachesrv.services.maintenance import maintenance

        collect = wiring.build_collect(config, services, caches, nar_grace=grace)
        if dry_run:
            return await collect.rehearse(output)
        async with maintenance(services.catalog, patience=wait) as holder:
            return await collect.run(holder, output, by="cachesrv gc", pace=offline.HASTY)

    output.sum_up(offline.with_services(config, run, makes_room=not dry_run), grace=grace, dry_run=dry_run)
    if not as_json:
        _hint(config, caches)


async def _run_scheduled(config: Config, services: Services) -> None:
    """For a program that reads the sums; nothing is printed when there was nothing to do."""
    import os

    from cachesrv import wiring
    from cachesrv.services.collect import COLLECTED
    from cachesrv.services.maintenance import Busy, maintenance
    from cachesrv.services.removal_report import Silent
    from cachesrv.services.schedule import is_due

    os.nice(_NICE)
    try:
        async with maintenance(services.catalog) as holder:
            last = int(await services.catalog.noted(COLLECTED) or 0)
            if not is_due(last, config.collect.interval):
                return
            report = await wiring.build_collect(config, services).run(holder, Silent(), by="the schedule")
    except Busy:
        return
    Json().sum_up(report, grace=config.collect.nar_grace, dry_run=False)


def _hint(config: Config, caches: tuple[str, ...]) -> None:
    """That nothing goes may be because nobody said what may."""
    from cachesrv import wiring

    chosen = {cache.name for cache in config.cache if not caches or cache.name in caches}
    if keeping := sorted(chosen - wiring.policies(config).keys()):
        click.echo(f"all paths stay where there is no retention_age and no retention_size: in {', '.join(keeping)}")
