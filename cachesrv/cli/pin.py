"""`cachesrv pin`."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cachesrv.cli import offline, path_name

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.catalog.base import Catalog
    from cachesrv.catalog.retention import PinRecord
    from cachesrv.nix.store_path import StorePath

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+@/:-]{0,199}\Z")


@click.group(
    epilog="""\b
Examples:
  cachesrv pin add release-24.11 ./result --keep 5
  cachesrv pin list
  cachesrv pin remove release-24.11

A pin keeps a path with all that it refers to, whatever the cache keeps otherwise. Run it where the server runs.
"""
)
def command() -> None:
    """Keep paths by name, whatever else is collected."""


@command.command(
    epilog="""\b
Examples:
  cachesrv pin add release-24.11 ./result --keep 5
  cachesrv pin add preview-1234 /nix/store/…-site --expires 14d

PATH has to be in the cache. A pin that is there already points to it from now on; the earlier paths, its
generations, stay kept as far as --keep says. PATH is a store path, a link to one, a name inside one, or a hash part.
"""
)
@click.argument("name")
@click.argument("path")
@click.option("--keep", type=click.IntRange(1, 1000), help="Latest paths to keep.  [default: as before, or 1]")
@click.option(
    "--expires", metavar="TIME", help='When it ends, "30d" from now, or "never".  [default: as before, or never]'
)
@offline.cache_option
@offline.server_options
def add(
    name: str,
    path: str,
    *,
    keep: int | None,
    expires: str | None,
    cache: str | None,
    config_file: Path | None,
    data_dir: str | None,
) -> None:
    """Let the pin NAME point to PATH."""
    if not _NAME.match(name):
        raise click.BadParameter(
            "a name begins with a letter or digit and has up to 200 of 0-9A-Za-z._+@/:-",
            click.get_current_context(),
            param_hint="NAME",
        )
    lifetime = None if expires in (None, "never") else offline.seconds(expires, "--expires")
    config = offline.load(config_file, data_dir)
    chosen = offline.chosen_cache(config, cache)

    async def pin(catalog: Catalog) -> StorePath:
        target = await path_name.published(catalog, chosen, path)
        before = next((pin for pin in await catalog.pins(chosen.name) if pin.name == name), None)
        now = int(time.time())
        ends = (now + lifetime if lifetime else None) if expires else _end_as_before(before, now)
        latest = keep or (before.keep if before else 1)
        by = offline.user()
        await catalog.pin(chosen.name, name, target.base_name, keep=latest, expires_at=ends, at=now, by=by)
        return target

    click.echo(f"{name} points to {offline.with_catalog(config, pin).full(chosen.store_dir)}")


def _end_as_before(before: PinRecord | None, now: int) -> int | None:
    from cachesrv.services import amounts

    if before is None or before.expires_at is None:
        return None
    if before.expires_at <= now:
        raise click.UsageError(
            f"{before.name} expired {amounts.date(before.expires_at)}: say --expires", click.get_current_context()
        )
    return before.expires_at


@command.command(
    "list",
    epilog="""\b
Examples:
  cachesrv pin list
  cachesrv pin list --json | jq -r .name

With --json one object a line; times are seconds since the epoch.
""",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@offline.cache_option
@offline.server_options
def list_(*, as_json: bool, cache: str | None, config_file: Path | None, data_dir: str | None) -> None:
    """List all pins, and what they keep, the latest first."""
    config = offline.load(config_file, data_dir)
    chosen = offline.chosen_cache(config, cache)
    for pin in offline.with_catalog(config, lambda catalog: catalog.pins(chosen.name)):
        if as_json:
            click.echo(json.dumps(asdict(pin)))
        else:
            _tell(pin)


def _tell(pin: PinRecord) -> None:
    from cachesrv.services import amounts

    ends = ""
    if pin.expires_at is not None:
        ends = f", {'expired' if pin.expires_at <= time.time() else 'expires'} {amounts.date(pin.expires_at)}"
    click.echo(f"{pin.name}: keeps {pin.keep}{ends}")
    for generation in pin.generations:
        click.echo(f"  {generation.base_name}  since {amounts.date(generation.at)}, by {generation.by}")


@command.command(
    epilog="""\b
Example:
  cachesrv pin remove release-24.11

Nothing goes at once: the next collection judges what it kept like any other path.
"""
)
@click.argument("name")
@offline.cache_option
@offline.server_options
def remove(name: str, *, cache: str | None, config_file: Path | None, data_dir: str | None) -> None:
    """Keep no longer what the pin NAME keeps."""
    from cachesrv.errors import NotFound

    config = offline.load(config_file, data_dir)
    chosen = offline.chosen_cache(config, cache)
    if not offline.with_catalog(config, lambda catalog: catalog.unpin(chosen.name, name)):
        raise NotFound(f"{chosen.name} has no pin {name}; `cachesrv pin list` shows those that it has")
