"""`cachesrv gc`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cachesrv.cli import offline

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.catalog.retention import PathSummary, UnusedNar
    from cachesrv.config import Config
    from cachesrv.services.collect import Report
    from cachesrv.web.site import Services

_HASTY = 0.2
"""Rest after each step, in parts of the time that the step took, when somebody waits for it."""
_NICE = 10


@click.command(
    epilog="""\b
Examples:
  cachesrv gc --dry-run
  cachesrv gc --config /etc/cachesrv.toml main
  cachesrv gc --now --wait 600

What goes is said by retention_age and retention_size of each [[cache]] in the configuration: paths that are neither
pinned nor needed by others (`cachesrv why` says of one path what keeps it). They are out of sight at once; their NARs
stay for [collect] nar_grace, for clients that have seen them before.

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
    output = _Json() if as_json else _Lines(silent=not (dry_run or verbose))

    async def run(services: Services) -> Report:
        from cachesrv import wiring
        from cachesrv.services.maintenance import maintenance

        collect = wiring.build_collect(config, services, caches, nar_grace=grace)
        if dry_run:
            return await collect.rehearse(output)
        async with maintenance(services.catalog, patience=wait) as holder:
            return await collect.run(holder, output, by="cachesrv gc", pace=_HASTY)

    output.sum_up(offline.with_services(config, run, makes_room=not dry_run), grace=grace, dry_run=dry_run)
    if not as_json:
        _hint(config, caches)


async def _run_scheduled(config: Config, services: Services) -> None:
    """For a program that reads the sums; nothing is printed when there was nothing to do."""
    import os
    import time

    from cachesrv import wiring
    from cachesrv.services.collect import COLLECTED, Silent
    from cachesrv.services.maintenance import Busy, maintenance

    os.nice(_NICE)
    try:
        async with maintenance(services.catalog) as holder:
            last = int(await services.catalog.noted(COLLECTED) or 0)
            if last + config.collect.interval > time.time():
                return
            report = await wiring.build_collect(config, services).run(holder, Silent(), by="the schedule")
    except Busy:
        return
    _Json().sum_up(report, grace=config.collect.nar_grace, dry_run=False)


class _Lines:
    """For people."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent

    def path(self, cache: str, path: PathSummary, reason: str) -> None:
        """See Listener."""
        from cachesrv.services import amounts

        if not self._silent:
            click.echo(f"{cache}: {path.base_name}, {amounts.size(path.file_size)}: {reason}")

    def nar(self, nar: UnusedNar) -> None:
        """See Listener."""
        from cachesrv.services import amounts

        if not self._silent:
            since = amounts.date(nar.unused_since)
            click.echo(f"{nar.key}, {amounts.size(nar.file_size)}: needed by no path since {since}")

    def sum_up(self, report: Report, *, grace: int, dry_run: bool) -> None:
        """The last lines."""
        from cachesrv.services import amounts

        go, are = ("would go", "would be deleted") if dry_run else ("have gone", "have been deleted")
        size = amounts.size(report.path_bytes)
        stay = f"stay for {amounts.time(grace)}" if grace else "go at once" if dry_run else "have gone at once"
        click.echo(f"paths: {report.paths} {go}; their NARs, {size}, {stay}")
        click.echo(f"NARs: {report.nars} {are}, which gives {amounts.size(report.nar_bytes)} back")
        if report.kept:
            click.echo(f"{report.kept} paths stay that were needed again meanwhile")


class _Json:
    """For programs."""

    def path(self, cache: str, path: PathSummary, reason: str) -> None:
        """See Listener."""
        summary = {"path": path.base_name, "size": path.file_size, "used_at": path.used_at}
        _echo({"event": "path", "cache": cache, **summary, "reason": reason})

    def nar(self, nar: UnusedNar) -> None:
        """See Listener."""
        _echo({"event": "nar", "key": nar.key, "size": nar.file_size, "unused_since": nar.unused_since})

    def sum_up(self, report: Report, *, grace: int, dry_run: bool) -> None:
        """The last line."""
        _echo({"event": "summary", "dry_run": dry_run, "nar_grace": grace, **asdict(report)})


def _echo(event: dict[str, object]) -> None:
    click.echo(json.dumps(event))


def _hint(config: Config, caches: tuple[str, ...]) -> None:
    """That nothing goes may be because nobody said what may."""
    from cachesrv import wiring

    chosen = {cache.name for cache in config.cache if not caches or cache.name in caches}
    if keeping := sorted(chosen - wiring.policies(config).keys()):
        click.echo(f"all paths stay where there is no retention_age and no retention_size: in {', '.join(keeping)}")
