"""What commands share that work on a server's stores, beside it, on its machine and as its user."""

from __future__ import annotations

import asyncio
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cachesrv.cli.options import data_dir_of_server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cachesrv.catalog.base import Catalog
    from cachesrv.config import Config
    from cachesrv.services.caches import ServedCache
    from cachesrv.web.site import Services

Result = TypeVar("Result")

HASTY = 0.2
"""Rest after each step that others may have to wait for, in parts of the time that it took, when somebody waits for the
end.
"""


def server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--config` and `--data-dir`, which say whose stores these are."""
    config = click.option(
        "--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="Of the server."
    )
    return config(data_dir_of_server(function))


cache_option = click.option("--cache", metavar="NAME", help="Which one.  [default: the only one, or the one at /]")


def load(config_file: Path | None, data_dir: str | None) -> Config:
    """The configuration of a server that has been started before. Raises ConfigError."""
    from cachesrv import config, telemetry
    from cachesrv.errors import ConfigError
    from cachesrv.services.data_directory import DataDirectory

    telemetry.configure_logging()
    loaded = config.load(config_file, config.data_dir(data_dir, os.environ), os.environ)
    # A mistyped directory would get a catalog of its own, in which no server ever looks. Where one has been started, a
    # catalog may be gone all the same: then a new one is what is wanted.
    try:
        started = DataDirectory(loaded.data_dir).push_token.exists()
    except OSError as error:
        raise ConfigError(
            f"the data directory {loaded.data_dir} cannot be read: {error.strerror}: run this as the user of the server"
        ) from error
    if loaded.catalog.url is None and not started:
        raise ConfigError(
            f"no server has been started with the data directory {loaded.data_dir}: say --data-dir, or start it once"
        )
    return loaded


def with_catalog(config: Config, use: Callable[[Catalog], Awaitable[Result]]) -> Result:
    """What `use` makes of the catalog."""
    from cachesrv import wiring

    async def opened() -> Result:
        catalog = await wiring.open_catalog(config)
        try:
            return await use(catalog)
        finally:
            await catalog.close()

    wiring.private_umask()
    return asyncio.run(opened())


def with_services(config: Config, use: Callable[[Services], Awaitable[Result]], *, makes_room: bool = False) -> Result:
    """What `use` makes of the services on all stores. What makes room may need some: it has the reserves of disks."""
    from cachesrv import wiring
    from cachesrv.telemetry import Metrics

    async def opened() -> Result:
        async with wiring.open_services(config, Metrics()) as services:
            return await use(services)

    wiring.private_umask()
    with wiring.open_disk_room(config).given_up_if_full() if makes_room else nullcontext():
        return asyncio.run(opened())


def chosen_cache(config: Config, name: str | None) -> ServedCache:
    """The cache of this name; without one, the only cache or the one at the root. Raises ConfigError."""
    from cachesrv import wiring
    from cachesrv.errors import ConfigError

    caches = wiring.served_caches(config)
    if name is not None:
        if name not in caches:
            raise ConfigError(f"no cache is called {name}; there are {', '.join(caches)}")
        return caches[name]
    candidates = list(caches.values()) if len(caches) == 1 else [cache for cache in caches.values() if cache.root]
    if not candidates:
        raise ConfigError(f"which cache? say --cache; there are {', '.join(caches)}")
    return candidates[0]


def seconds(text: str, option: str) -> int:
    """A time such as "30d". Raises click.BadParameter."""
    from cachesrv.config import with_unit

    try:
        found = with_unit(text, "duration")
    except ValueError:
        found = 0
    if not 0 < found < 2**40:
        raise click.BadParameter(
            'expected a time such as "30d" or "12 h"', click.get_current_context(), param_hint=option
        )
    return found


def user() -> str:
    """Who runs this command."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in containers, users without a name
        return f"user {os.getuid()}"
