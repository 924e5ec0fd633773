"""`cachesrv check-config`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cachesrv.cli.options import config_file, data_dir_of_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cachesrv.config import Config


@click.command(
    epilog="""\b
Examples:
  cachesrv check-config --config /etc/cachesrv.toml
  sudo -u cachesrv cachesrv check-config --config /etc/cachesrv.toml --probe

Prints the configuration as it takes effect, with all defaults and with what variables (CACHESRV_…) say. All mistakes
are told at once, each with the key, its value and what was expected.

--probe makes what the first start would make (but no keys), and leaves nothing in what is published. It can run beside
a server; run it as the user of the server, for the files are that user's.

\b
Exit status: 0 right, 2 wrong.
"""
)
@config_file
@data_dir_of_server
@click.option("--probe", is_flag=True, help="Also open storage, catalog, index and key files.")
def command(config_file: Path | None, data_dir: str | None, *, probe: bool) -> None:
    """Say what is wrong with a configuration, or what it comes to."""
    import asyncio

    from cachesrv import config
    from cachesrv.errors import ConfigError
    from cachesrv.services.effective import render

    loaded = config.load(config_file, config.data_dir(data_dir, os.environ), os.environ)
    mistakes = list(_unusable(loaded))
    if probe and not mistakes:
        mistakes = asyncio.run(_probed(loaded))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    click.echo(render(loaded), nl=False)


def _unusable(config: Config) -> Iterator[str]:
    """What has the right form and still means nothing."""
    from cachesrv.errors import CachesrvError
    from cachesrv.nix.signing import PublicKey
    from cachesrv.web.listen import parse_address

    for address in config.server.listen:
        try:
            parse_address(address)
        except CachesrvError as error:
            yield f"server.{error}"
    for cache in config.cache:
        for key in cache.trusted_keys:
            try:
                PublicKey.parse(key)
            except CachesrvError as error:
                yield f"cache {cache.name}: trusted_keys: {key!r}: {error}"


async def _probed(config: Config) -> list[str]:
    """What the server would stumble over."""
    from cachesrv import telemetry, wiring
    from cachesrv.errors import CachesrvError
    from cachesrv.services.data_directory import DataDirectory

    telemetry.configure_logging("error")
    wiring.private_umask()
    try:
        _check_owner(config.data_dir)
        DataDirectory(config.data_dir).make()
    except CachesrvError as error:
        return [str(error)]
    mistakes = [*_wrong_sockets(config), *_wrong_keys(config)]
    probes = {"server": _probe_tls, "storage": _probe_storage, "catalog": _probe_catalog, "index": _probe_index}
    for section, probe in probes.items():
        try:
            await probe(config)
        except CachesrvError as error:
            mistakes.append(f"{section}: {error}")
    return mistakes


def _check_owner(directory: Path) -> None:
    """As root, to open a database of the server's makes files that the server cannot write."""
    from cachesrv.errors import ConfigError

    if os.geteuid() == 0 and directory.exists() and directory.stat().st_uid != 0:
        owner = directory.owner()
        raise ConfigError(
            f"{directory} belongs to {owner}: probe as that user (sudo -u {owner} cachesrv check-config …)"
        )


def _wrong_sockets(config: Config) -> Iterator[str]:
    from cachesrv.web.listen import UnixAddress, parse_address

    for address in map(parse_address, config.server.listen):
        if isinstance(address, UnixAddress):
            folder = Path(address.path).parent
            if not os.access(folder, os.W_OK | os.X_OK):
                yield f"server.listen = 'unix:{address.path}': expected a folder {folder} that this user can write"


def _wrong_keys(config: Config) -> Iterator[str]:
    """Keys that are not there yet are right when the first start will make them."""
    from cachesrv.errors import ConfigError
    from cachesrv.services.data_directory import DataDirectory, parse_secret_key, read_secret

    for cache in config.cache:
        own = DataDirectory(config.data_dir).secret_key(cache.name)
        files = (own,) if os.access(own, os.F_OK) else ()
        for file in files if cache.signing_key_files is None else map(Path, cache.signing_key_files):
            try:
                parse_secret_key(read_secret(file), file)
            except ConfigError as error:
                yield f"cache {cache.name}: signing_key_files: {error}"


async def _probe_tls(config: Config) -> None:
    from cachesrv.web.server import tls_context

    tls_context(config.server.tls_certificate, config.server.tls_private_key)


async def _probe_storage(config: Config) -> None:
    from cachesrv import wiring
    from cachesrv.errors import StoreError
    from cachesrv.services.probe import probe_storage

    if config.storage.kind == "s3":
        if problems := await wiring.problems_of_bucket(config):
            raise StoreError("\nstorage: ".join(problems))
        return
    try:
        storage = wiring.open_storage(config)
        try:
            await probe_storage(storage, {cache.place for cache in config.cache})
        finally:
            await storage.close()
    except StoreError as error:
        raise StoreError(
            f"{error}: expected a folder that this user can read and write, on a disk with room"
        ) from error


async def _probe_catalog(config: Config) -> None:
    from cachesrv import wiring
    from cachesrv.services.probe import probe_catalog

    catalog = await wiring.open_catalog(config)
    try:
        await probe_catalog(catalog)
    finally:
        await catalog.close()


async def _probe_index(config: Config) -> None:
    from cachesrv import wiring
    from cachesrv.services.probe import probe_index

    index = wiring.open_index(config)
    try:
        probe_index(index)
    finally:
        index.close()
