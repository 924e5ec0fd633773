"""`cachesrv reindex`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from cachesrv.config import Config
    from cachesrv.services.reindex import Report

_SHOWN = 20


@click.command(
    epilog="""\b
Examples:
  cachesrv reindex
  cachesrv reindex --config /etc/cachesrv.toml --cache main

Reads the narinfos that lie in storage into catalog and index: after these were lost, or after a folder that
`nix copy --to file://…` wrote was put below objects/. The server may go on meanwhile. What cannot be served is named.
"""
)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML; see config.example.toml.")
@click.option("--data-dir", help="Where everything is kept.  [default: ~/.local/state/cachesrv]")
@click.option("--cache", "caches", multiple=True, help="Only this cache; may be repeated.")
def command(config_file: Path | None, data_dir: str | None, caches: tuple[str, ...]) -> int:
    """Rebuild catalog and index from storage."""
    import asyncio

    from cachesrv import config, telemetry, wiring

    telemetry.configure_logging()
    wiring.private_umask()
    loaded = config.load(config_file, config.data_dir(data_dir, os.environ), os.environ)
    return asyncio.run(_reindex(loaded, caches))


async def _reindex(config: Config, names: tuple[str, ...]) -> int:
    from cachesrv import wiring
    from cachesrv.errors import ConfigError
    from cachesrv.services.data_directory import DataDirectory
    from cachesrv.services.reindex import Reindex
    from cachesrv.telemetry import Metrics

    DataDirectory(config.data_dir).make()
    caches = wiring.served_caches(config)
    if unknown := set(names) - caches.keys():
        raise ConfigError(f"no cache is called {', '.join(sorted(unknown))}; there are {', '.join(caches)}")
    broken = False
    async with wiring.open_services(config, Metrics()) as services:
        reindex = Reindex(services.storage, services.catalog, services.index)
        for cache in caches.values():
            if not names or cache.name in names:
                report = await reindex.run(cache, _progress)
                _tell(cache.name, report)
                broken = broken or bool(report.broken)
    return 3 if broken else 0


def _progress(report: Report) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{report.taken} paths", err=True, nl=False)


def _tell(cache: str, report: Report) -> None:
    if sys.stderr.isatty():
        click.echo("\r", err=True, nl=False)
    click.echo(f"{cache}: {report.taken} paths are served, {len(report.broken)} narinfos cannot be")
    for key, why in sorted(report.broken.items())[:_SHOWN]:
        click.echo(f"  {key}: {why}")
    if len(report.broken) > _SHOWN:
        click.echo(f"  and {len(report.broken) - _SHOWN} more")
