"""`cachesrv delete`."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import click

from cachesrv.cli import SOME_FAILED, offline, path_name
from cachesrv.cli.removal_output import Json, Lines

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.services.deleting import Chosen, Wish
    from cachesrv.services.removal_report import Report
    from cachesrv.web.site import Services

_MANY = 100
"""Paths that are deleted without a question, at most."""
_GLOB = re.compile(r"[*?[]")


@click.command(
    epilog="""\b
Examples:
  cachesrv delete ./result --dry-run
  cachesrv delete 'openssl-3.0.1*' --with-referrers --reason CVE-2022-3602
  cachesrv delete /nix/store/…-secrets --now
  cachesrv delete --all --cache preview --yes

PATH is a store path, a link to one, a name inside one, a base name, a hash part; or a pattern with *, ? and [] for
names, with or without the hash before them. Paths that others need are deleted only with these, pinned ones not at
all. Those that refer to others go first; all are out of sight at once. Their NARs stay for [collect] nar_grace, for
clients that have seen them before, unless --now is given. `cachesrv why` remembers who deleted a path, and the reason.

\b
Exit status: 0 done, 1 nothing was deleted, 2 wrong usage or configuration, 3 some paths are needed again and stay.
"""
)
@click.argument("paths", metavar="PATH...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All paths of the cache.")
@click.option("--with-referrers", is_flag=True, help="Delete what needs them as well.")
@click.option("--now", is_flag=True, help="Delete their NARs at once, as far as no other path has them.")
@click.option("--reason", default="", metavar="TEXT", help="To be remembered.")
@click.option("--dry-run", is_flag=True, help="Say what would go.")
@click.option("--yes", "-y", is_flag=True, help=f"Do not ask before more than {_MANY} paths are deleted.")
@click.option("--verbose", "-v", is_flag=True, help="Name each path and each NAR that goes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, the last with the sums.")
@click.option("--wait", default=0.0, metavar="SECONDS", help="How long to wait for another one that deletes.")
@offline.cache_option
@offline.server_options
def command(
    paths: tuple[str, ...],
    *,
    everything: bool,
    with_referrers: bool,
    now: bool,
    reason: str,
    dry_run: bool,
    yes: bool,
    verbose: bool,
    as_json: bool,
    wait: float,
    cache: str | None,
    config_file: Path | None,
    data_dir: str | None,
) -> int:
    """Delete paths from a cache."""
    from cachesrv import wiring

    if bool(paths) == everything:
        raise click.UsageError("name paths, or say --all", click.get_current_context())
    config = offline.load(config_file, data_dir)
    chosen_cache = offline.chosen_cache(config, cache)
    wish = _wish(paths, chosen_cache.store_dir, everything=everything, with_referrers=with_referrers)
    output = Json() if as_json else Lines(silent=not (dry_run or verbose))
    why = " ".join(reason.split())

    async def delete(services: Services) -> Report:
        from cachesrv.services.maintenance import maintenance

        deletion = wiring.build_delete(config, services, chosen_cache.name)
        chosen = await deletion.choose(wish)
        if dry_run:
            return await deletion.rehearse(chosen, output, why)
        if not yes:
            _ask(chosen, chosen_cache.name)
        by = f"{offline.user()}, with cachesrv delete"
        async with maintenance(services.catalog, patience=wait) as holder:
            return await deletion.run(chosen, holder, output, by=by, why=why, now=now, pace=offline.HASTY)

    report = offline.with_services(config, delete, makes_room=not dry_run)
    output.sum_up(report, grace=0 if now else config.collect.nar_grace, dry_run=dry_run)
    return SOME_FAILED if report.kept else 0


def _wish(paths: tuple[str, ...], store_dir: str, *, everything: bool, with_referrers: bool) -> Wish:
    from cachesrv.services.deleting import Wish

    patterns = [path for path in paths if _GLOB.search(path) and "/" not in path]
    hash_parts = [path_name.hash_part_of(path, store_dir) for path in paths if path not in patterns]
    return Wish(hash_parts, patterns, everything=everything, with_referrers=with_referrers)


def _ask(chosen: Chosen, cache: str) -> None:
    """Before many paths are deleted. Raises click.Abort, click.UsageError."""
    if chosen.count <= _MANY:
        return
    question = f"Delete {chosen.count} paths from {cache}?"
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody can be asked here: say --yes", click.get_current_context())
    click.confirm(question, abort=True, err=True)
