"""`cachesrv use`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from cachesrv.cli.options import token_of_private

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cachesrv.api import CacheAnswer
    from cachesrv.push.nix_conf import CacheSettings
    from cachesrv.push.nix_conf_files import ConfFiles
    from cachesrv.push.nix_setup import Login
    from cachesrv.push.settings import Settings


@click.command(
    epilog="""\b
Examples:
  cachesrv use https://cache.example.org/main
  cachesrv use https://cache.example.org/main --write
  sudo cachesrv use https://cache.example.org/main --write --system
  cachesrv use https://cache.example.org/private --token-file token --write

Prints the lines for nix.conf, and for a private cache those for netrc; --write puts them there: into the files of the
user (~/.config/nix), or with --system into those of the machine (/etc/nix). To run it again brings a key that changed,
and changes nothing otherwise. All other lines stay as they are.

The cache is that of URL, $CACHESRV_URL or ~/.config/cachesrv/client.toml; the token of a private one comes from where
`cachesrv push` has it, and only has to permit pull.

Nix's daemon takes these settings of a user only from trusted-users; for all others they have to be --system.
"""
)
@click.argument("url", required=False)
@click.option("--write", is_flag=True, help="Put the lines where they belong.")
@click.option("--system", is_flag=True, help="For all users of this machine; as root.")
@token_of_private
@click.option("--data-dir", metavar="DIR", help="Of a server on this machine, for its push-token.")
def command(url: str | None, token_file: Path | None, data_dir: str | None, *, write: bool, system: bool) -> None:
    """Let Nix on this machine use a cache."""
    import asyncio

    from cachesrv.push import nix_conf_files
    from cachesrv.push.nix_setup import Login, settings_for
    from cachesrv.push.settings import Given, find_settings

    settings = find_settings(Given(url, token_file, data_dir), os.environ)
    cache = asyncio.run(_describe(settings))
    machine = nix_conf_files.system_files(os.environ)
    files = machine if system else nix_conf_files.user_files(os.environ)
    wanted = settings_for(settings.address.url, cache, files.netrc)
    token = None if cache.public else settings.token.read()
    login = Login(settings.address.host, token) if token else None
    if write:
        _write(files, machine, wanted, login, system=system)
    else:
        _print(files, wanted, login)
    for note in _notes(settings, cache, files, wanted):
        click.echo(f"note: {note}", err=True)


async def _describe(settings: Settings) -> CacheAnswer:
    from cachesrv.push.server import connect

    async with connect(settings.address, settings.token) as server:
        return await server.describe()


def _print(files: ConfFiles, wanted: CacheSettings, login: Login | None) -> None:
    from cachesrv.push import netrc_entry

    click.echo(f"# {files.conf}")
    for line in wanted.lines():
        click.echo(line)
    if login is not None:
        click.echo(f"\n# {files.netrc}")
        click.echo(netrc_entry.line(login.host, login.password))


def _write(files: ConfFiles, machine: ConfFiles, wanted: CacheSettings, login: Login | None, *, system: bool) -> None:
    from cachesrv.errors import StoreError
    from cachesrv.push import nix_setup
    from cachesrv.push.store_location import locate

    store_dir = locate(None, os.environ).real_store_dir
    new_texts = nix_setup.plan(files, machine, wanted, login)
    for new in new_texts:
        if not new.changed:
            click.echo(f"{new.path}: all is there already")
            continue
        try:
            nix_setup.write(new, store_dir)
        except StoreError as error:
            raise StoreError(f"{error}{' (--system is for root)' if system and os.geteuid() else ''}") from None
        what = "the token" if new.secret else f"{wanted.url} {' '.join(key.render() for key in wanted.keys)}".rstrip()
        click.echo(f"{new.path}: wrote {what}")
    if system and new_texts[-1].changed:
        click.echo("note: Nix's daemon reads it when it starts: systemctl restart nix-daemon", err=True)


def _notes(settings: Settings, cache: CacheAnswer, files: ConfFiles, wanted: CacheSettings) -> Iterator[str]:
    """What the lines alone do not make work."""
    from cachesrv.push import nix_conf, nix_conf_files
    from cachesrv.push.one_line import one_line
    from cachesrv.push.store_location import locate
    from cachesrv.push.token import TokenFile

    store_dir = locate(None, os.environ).store_dir
    if cache.store_dir != store_dir:
        theirs = one_line(cache.store_dir)
        yield f"the paths of this cache are for {theirs}, the store here is {store_dir}: Nix refuses them"
    if not wanted.keys:
        yield "the cache does not sign; clients have to trust the keys of those who push to it"
    machine = nix_conf_files.system_files(os.environ)
    user = nix_conf_files.distrusts(os.environ, machine)
    for_all = nix_conf.in_force(list(nix_conf_files.lines(machine.conf)), replace(wanted, netrc_file=None))
    if files != machine and user and not for_all:
        yield (
            f"Nix's daemon takes these settings only from trusted users, and {user} is none. Either root runs"
            f" `cachesrv use {wanted.url} --write --system`, or adds {user} to trusted-users in {machine.conf}"
        )
    if cache.public:
        return
    if files != machine and os.path.lexists(machine.netrc):
        yield f"with netrc-file set, Nix reads {machine.netrc} no longer: what is needed of it has to be copied"
    if isinstance(settings.token, TokenFile) and settings.token.path.name == "push-token":
        yield (
            "this is the push token of the server, with which anybody can push; for clients, make one that only reads:"
            f" cachesrv token create clients --cache {settings.address.cache}"
        )
